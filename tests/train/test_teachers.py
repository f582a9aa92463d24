"""Teachers: tokenizers, names, and an endpoint that the test starts itself."""

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from deltalens.errors import ConfigError, DeltalensError
from deltalens.train.losses import Head, teacher_top
from deltalens.train.models import load_model, load_tokenizer, quiet_libraries
from deltalens.train.teachers import EndpointTeacher, LocalTeachers, check_names, check_tokenizers


class Vocabulary:
    def __init__(self, *words: str) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self._words)}


def test_different_vocabularies_are_refused_with_both_named() -> None:
    check_tokenizers(Vocabulary("a", "b"), Vocabulary("a", "b"), ("s", "t"))
    with pytest.raises(ConfigError, match=r"small \(3 tokens\) and teacher big \(4 tokens\).*id 1 is 'b' .* and 'x'"):
        check_tokenizers(Vocabulary("a", "b", "c"), Vocabulary("a", "x", "c", "d"), ("small", "big"))
    with pytest.raises(ConfigError, match=r"id 2 is nothing for the student and 'c' for the teacher"):
        check_tokenizers(Vocabulary("a", "b"), Vocabulary("a", "b", "c"), ("small", "big"))


def test_an_unknown_teacher_is_refused_with_the_nearest_one() -> None:
    check_names(["math", "code"], ["code", "math", "chat"], "domain")
    with pytest.raises(ConfigError, match=r"'domain' names teacher 'maths'.*did you mean 'math'"):
        check_names(["math", "maths"], ["code", "math"], "domain")


def test_rows_go_to_their_teachers() -> None:
    """Each teacher runs over its sequences alone, and its view lies at their tokens."""
    calls: dict[str, list[int] | None] = {}
    states = torch.arange(4 * 3 * 2, dtype=torch.float32).reshape(4, 3, 2)

    def run(model: Any, sequences: list[int] | None) -> tuple[torch.Tensor, Head]:
        calls[model] = sequences
        return states if sequences is None else states[sequences], Head(torch.eye(2))

    keep = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    teachers = LocalTeachers({"a": "A", "b": "B", "c": "C"})
    views = teachers.rows(keep, torch.tensor([0, 1, 0, 1]), run)
    assert calls == {"A": [0, 2], "B": [1, 3]}
    assert [places.tolist() for places, _ in views] == [[0, 1, 3, 4, 5], [2]]
    flat = states[keep]
    for places, view in views:
        assert torch.equal(view.hidden, flat[places])
    ((places, view),) = LocalTeachers({"only": "A"}).rows(keep, None, run)
    assert calls["A"] is None
    assert places.tolist() == list(range(6))
    assert torch.equal(view.hidden, flat)


class Server:
    """A model behind the part of vLLM's interface that is needed. `fail` answers are errors before it works."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = load_tokenizer(model)
        self.model = load_model(model, "float32")
        self.fail: list[int] = []
        self.seen: list[tuple[str, Any, str | None]] = []
        self.tokenize = True
        self.drop = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                outer.seen.append((self.path, body, self.headers["Authorization"]))
                status, value = (outer.fail.pop(0), {"error": "no"}) if outer.fail else outer.answer(self.path, body)
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "teacher"}]}
        if path == "/tokenize" and self.tokenize:
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if body["prompt_logprobs"] > 40:
            return 400, {"error": {"message": "Requested prompt logprobs of 50, greater than max allowed: 40"}}
        choices = [
            {"index": i, "text": "", "prompt_logprobs": self._logprobs(ids, body["prompt_logprobs"])}
            for i, ids in enumerate(body["prompt"])
        ]
        return 200, {"choices": choices[::-1]}  # vLLM promises no order

    def _logprobs(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        with torch.no_grad():
            logp = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places: list[dict[str, Any] | None] = [None]
        for row, token in zip(logp[:-1], ids[1:], strict=True):
            best = [*row.topk(k).indices.tolist(), token]
            places.append({str(word): {"logprob": row[word].item(), "decoded_token": "?"} for word in best})
        return [None] * len(ids) if self.drop else places


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Server]:
    with quiet_libraries():
        server = Server(tiny_model)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def endpoint(server: Server, **changes: Any) -> EndpointTeacher:
    return EndpointTeacher(**{"url": server.url + "/v1/", "model": "teacher", "backoff": 0.001, **changes})


def test_an_endpoint_tells_what_the_model_behind_it_thinks(server: Server) -> None:
    sequences, starts, k = [[5, 9, 17, 33, 2], [40, 41, 42]], [2, 1], 6
    view = endpoint(server, api_key="secret").rows(sequences, starts, k, "cpu")
    assert server.seen[-1][2] == "Bearer secret"
    with torch.no_grad():
        logits = torch.cat(
            [
                server.model(torch.tensor([ids])).logits[0, start - 1 : -1]
                for ids, start in zip(sequences, starts, strict=True)
            ]
        )
    ids, logprobs, tail = teacher_top(logits, k)
    assert torch.equal(view.ids, ids)
    assert torch.allclose(view.logprobs, logprobs, atol=1e-6)
    assert torch.allclose(view.tail, tail, atol=1e-4)
    sampled = torch.tensor([17, 33, 2, 41, 42])
    assert torch.allclose(view.sampled, logits.log_softmax(-1).gather(1, sampled[:, None])[:, 0], atol=1e-6)
    chosen = torch.tensor([1, 3])
    assert torch.equal(view.take(chosen).ids, ids[chosen])
    assert torch.equal(view.chunk(slice(1, 3)).logprob(sampled[1:3]), view.sampled[1:3])


def test_an_endpoint_is_asked_again_while_it_is_busy(server: Server) -> None:
    server.fail = [503, 429]
    assert endpoint(server).rows([[1, 2, 3]], [1], 2, "cpu").ids.shape == (2, 2)
    assert [path for path, *_ in server.seen] == ["/v1/completions"] * 3


def test_an_endpoint_that_fails_is_named_with_its_status(server: Server) -> None:
    server.fail = [503] * 3
    with pytest.raises(ConfigError, match=rf"{server.url}/v1/completions: .*status 503"):
        endpoint(server, retries=2).rows([[1, 2]], [1], 2, "cpu")
    with pytest.raises(ConfigError, match=r"status 400: .*max allowed: 40.*--max-logprobs"):
        endpoint(server).rows([[1, 2]], [1], 50, "cpu")
    server.drop = True
    with pytest.raises(DeltalensError, match=r"/v1/completions: the answer has no usable prompt_logprobs"):
        endpoint(server).rows([[1, 2]], [1], 2, "cpu")
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9/.* does not answer after 2 attempts"):
        endpoint(server, url="http://127.0.0.1:9", retries=1).rows([[1, 2]], [1], 2, "cpu")


def test_an_endpoint_is_checked_before_training(
    server: Server, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    endpoint(server).check(tokenizer)
    with pytest.raises(ConfigError, match=r"serves no model 'other'; it serves \['teacher'\]"):
        endpoint(server, model="other").check(tokenizer)

    class Other:
        def __len__(self) -> int:
            return 99

        def __call__(self, *_: Any, **__: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, 2, 3]}

    with pytest.raises(ConfigError, match=r"tokenizer \(99 tokens\) and that of teacher at .* different ids"):
        endpoint(server).check(Other())
    server.tokenize = False
    endpoint(server).check(Other())
    assert "cannot be checked" in caplog.text


def test_the_mass_of_the_others_is_never_negative(server: Server) -> None:
    """Log-probabilities that sum to a hair above one leave nothing, not NaN."""
    server._logprobs = (
        lambda ids, k: (
            [None]
            + [  # type: ignore[method-assign,assignment,return-value]
                {"0": {"logprob": 1e-7}, str(t): {"logprob": -20.0}} for t in ids[1:]
            ]
        )
    )
    view = endpoint(server).rows([[1, 2, 3]], [1], 1, "cpu")
    assert view.tail.tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("loss", ["topk_forward_kl", "k1"])
def test_a_trainer_learns_the_same_from_an_endpoint(
    loss: str, server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    """As from the model itself: same rollouts, same curve, up to what log 1 − Σp loses of the tail."""
    from datasets import Dataset

    from deltalens.train.opd import OPDConfig, OPDTrainer
    from deltalens.train.tasks import Sums

    prompts = [{"prompt": [{"role": "user", "content": e.prompt}]} for e in Sums().train(8)]
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in server.model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    curves = []
    for teacher in (server.model, endpoint(server)):
        with quiet_libraries():
            run = OPDTrainer(
                model=load_model(tiny_model, "float32"),
                teacher_model=teacher,
                args=OPDConfig(
                    output_dir=str(tmp_path),
                    loss=loss,
                    topk=8,
                    max_steps=2,
                    per_device_train_batch_size=4,
                    max_completion_length=4,
                    learning_rate=1e-3,
                    token_share=0.5,
                    bf16=False,
                    use_cpu=True,
                    report_to=[],
                    save_strategy="no",
                    logging_steps=1,
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_list(prompts),
                processing_class=load_tokenizer(tiny_model),
            )
            run.train()
        curves.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(curves[0]) == 2
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert all(abs(value) > 0.01 for value in curves[0])
