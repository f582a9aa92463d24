"""Evaluation on a tiny random model."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deltalens.errors import ConfigError
from deltalens.train.evaluate import Evaluation, evaluate, generate
from deltalens.train.models import load_model, load_tokenizer, save_model
from deltalens.train.tasks import Example


@dataclass(frozen=True)
class Letters:
    """A task that a random model is sometimes right at: a reply counts if it holds the letter."""

    name: str = "letters"

    def train(self, count: int, seed: int = 0) -> list[Example]:
        return self.test(count)

    def test(self, count: int) -> list[Example]:
        return [Example(prompt=f"say {c}", context=f" ({c})", answer=c) for c in "aeiouxyzmnbktl"[:count]]

    def score(self, reply: str, example: Example) -> bool:
        return example.answer in reply


def test_numbers_follow_from_the_generations(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(
        tiny_model,
        Letters(),
        samples=6,
        problems=14,
        max_new_tokens=20,
        batch_size=32,
        on_progress=lambda *at: seen.append(at),
    )
    result.save(tmp_path / "generations.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert [(row["problem"], row["sample"]) for row in rows] == [(p, s) for p in range(14) for s in range(6)]
    assert all(row["correct"] == (row["answer"] in row["reply"]) for row in rows)
    right = [sum(row["correct"] for row in rows if row["problem"] == p) for p in range(14)]
    assert 0 < sum(right) < 14 * 6, "the fixture must give both outcomes"
    assert result.mean_at_k.value == pytest.approx(sum(right) / (14 * 6))
    assert result.pass_at_k.value == pytest.approx(sum(r > 0 for r in right) / 14)
    assert result.mean_at_k.low < result.mean_at_k.value < result.mean_at_k.high
    assert result.truncated == sum(row["truncated"] for row in rows) / len(rows)
    assert all(row["tokens"] == 20 for row in rows if row["truncated"])
    assert seen == [(32, 84), (64, 84), (84, 84)]
    assert Evaluation.from_summary(json.loads(json.dumps(result.summary()))).summary() == result.summary()


def test_sampling_is_seeded_and_leaves_the_callers_random_state(tiny_model: Path) -> None:
    def replies(seed: int) -> list[str]:
        done = evaluate(tiny_model, Letters(), samples=3, problems=4, max_new_tokens=8, seed=seed)
        return [generation.reply for generation in done.generations]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = replies(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert replies(1) == first
    assert replies(2) != first


def test_greedy_replies_do_not_depend_on_the_padding(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32"), load_tokenizer(tiny_model)
    prompts = ["a", "What is 10 + 11?", "a much longer prompt than the others are, to be sure"]
    together = generate(model, tokenizer, prompts, temperature=0, max_new_tokens=10)
    alone = [generate(model, tokenizer, [p], temperature=0, max_new_tokens=10)[0] for p in prompts]
    assert together == alone


def test_privileged_context_reaches_the_prompt(tiny_model: Path) -> None:
    done = evaluate(tiny_model, Letters(), problems=2, max_new_tokens=2, privileged=True)
    assert [generation.prompt for generation in done.generations] == ["say a (a)", "say e (e)"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_rounded_unless_told(
    dtype: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master = load_model(tiny_model, "float32")
    with torch.no_grad():
        for weights in master.parameters():
            weights.mul_(1 + 2**-11)  # a move that bfloat16 loses
    save_model(master, load_tokenizer(tiny_model), tmp_path / "master")
    seen = []

    def look(model, processor, prompts, **options):  # type: ignore[no-untyped-def]
        seen.append(model)
        return [("a", 1, False)] * len(prompts)

    monkeypatch.setattr("deltalens.train.evaluate.generate", look)
    done = evaluate(tmp_path / "master", Letters(), problems=2, dtype=dtype)  # type: ignore[arg-type]
    assert done.dtype == done.summary()["dtype"] == dtype
    for used, kept in zip(seen[0].parameters(), master.parameters(), strict=True):
        wanted = kept if dtype == "float32" else kept.bfloat16()
        assert not torch.equal(kept, kept.bfloat16().float())
        assert torch.equal(used.float(), wanted.float())


def test_bad_requests(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown task"):
        evaluate(tiny_model, "nothing")
    with pytest.raises(ConfigError, match="samples must be at least 1"):
        evaluate(tiny_model, "sums", samples=0)
    with pytest.raises(ConfigError, match="greedy replies are all the same"):
        evaluate(tiny_model, "sums", samples=2, temperature=0)
    with pytest.raises(ConfigError, match="dtype 'float16': choose bfloat16 or float32"):
        evaluate(tiny_model, "sums", dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no config\.json"):
        evaluate(tmp_path, "sums")
