"""Teachers: local models, several of them routed by a dataset column, or one behind an endpoint.

For a batch of sequences each gives views of its distributions at the N response tokens (`LocalRows`, `ServedRows`).
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import urllib3
from torch import Tensor

from deltalens.errors import ConfigError, DeltalensError
from deltalens.train.losses import Head, compute_dtype, teacher_top

__all__ = ["EndpointTeacher", "LocalRows", "LocalTeachers", "ServedRows", "check_names", "check_tokenizers"]

_log = logging.getLogger(__name__)
_PROBE = "What is 42 + 87? Reply with the number only.\n\tΣ_x  naïve — 東京"


def check_tokenizers(student: Any, teacher: Any, names: tuple[str, str]) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    Args:
        student, teacher: tokenizers, or processors that hold one.
        names: what to call the student and the teacher.

    Raises:
        ConfigError: the vocabularies differ; names both, their sizes and the first difference.
    """
    a, b = (getattr(t, "tokenizer", t).get_vocab() for t in (student, teacher))
    if a == b:
        return
    words = [{number: word for word, number in vocabulary.items()} for vocabulary in (a, b)]
    first = next(i for i in sorted({*words[0], *words[1]}) if words[0].get(i) != words[1].get(i))
    here, there = (repr(w[first]) if first in w else "nothing" for w in words)
    raise ConfigError(
        f"student {names[0]} ({len(a)} tokens) and teacher {names[1]} ({len(b)} tokens) have different vocabularies: "
        f"id {first} is {here} for the student and {there} for the teacher; distillation compares distributions over "
        "tokens, so choose a teacher with the student's tokenizer"
    )


def check_names(names: Iterable[Any], known: Iterable[str], column: str) -> None:
    """Refuse rows that name a teacher that is not there.

    Raises:
        ConfigError: names the first unknown value and the nearest known one.
    """
    teachers = sorted(known)
    for name in sorted({str(n) for n in names}):
        if name not in teachers:
            near = difflib.get_close_matches(name, teachers, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "every value must name one of them"
            raise ConfigError(f"column {column!r} names teacher {name!r}, and the teachers are {teachers}; {hint}")


@dataclass(frozen=True)
class LocalRows:
    """A local teacher's hidden states (n, H) at some tokens, and its head in the dtype to compute in."""

    hidden: Tensor
    head: Head

    def take(self, rows: Tensor) -> LocalRows:
        """The same for some of the tokens."""
        return LocalRows(self.hidden[rows], self.head)

    def chunk(self, part: slice | Tensor) -> LocalChunk:
        """The distributions at a slice of the tokens."""
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            logits = self.head.finish(self.head.project(self.hidden[part], self.head.weight.dtype))
        return LocalChunk(logits)


@dataclass(frozen=True)
class LocalChunk:
    """Logits (n, V)."""

    logits: Tensor

    def logprob(self, tokens: Tensor) -> Tensor:
        """Log-probability of one token at each place, shape (n,)."""
        return self.logits.gather(-1, tokens[:, None])[:, 0] - self.logits.logsumexp(-1)

    def top(self, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `losses.teacher_top`."""
        return teacher_top(self.logits, k)

    def take(self, rows: Tensor) -> LocalChunk:
        """The same for some of the places."""
        return LocalChunk(self.logits[rows])


@dataclass(frozen=True)
class ServedRows:
    """What an endpoint tells of n tokens: the likeliest ids and their log-probabilities (n, k), the log-probability of
    all others (n,) and that of the sampled token (n,)."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    sampled: Tensor

    def take(self, rows: Tensor | slice) -> ServedRows:
        """The same for some of the tokens."""
        return ServedRows(self.ids[rows], self.logprobs[rows], self.tail[rows], self.sampled[rows])

    chunk = take

    def logprob(self, tokens: Tensor) -> Tensor:
        """Log-probability of the sampled token at each place, shape (n,)."""
        return self.sampled

    def top(self, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `losses.teacher_top`; `k` is what was asked of the endpoint."""
        return self.ids, self.logprobs, self.tail


class LocalTeachers:
    """Models by name. With one of them every row is its; with several a row's name says whose it is."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.models = models
        self.names = list(models)

    def rows(
        self, keep: Tensor, owner: Tensor | None, states: Callable[[Any, list[int] | None], tuple[Tensor, Head]]
    ) -> list[tuple[Tensor, LocalRows]]:
        """The teachers' views of the response tokens.

        Args:
            keep: which of the places (B, T) are response tokens; N of them.
            owner: index of each sequence's teacher, shape (B,); None: the only one's.
            states: runs a model over some sequences of the batch (None: all); returns hidden states (b, T, H) and head.

        Returns:
            for each teacher that has tokens: which of the N are its, and its view of them.
        """
        found = []
        for index, name in enumerate(self.names):
            mine = torch.ones(keep.shape[0], dtype=torch.bool) if owner is None else owner.cpu() == index
            sequences = None if bool(mine.all()) else mine.nonzero()[:, 0].tolist()
            if sequences == []:
                # A sharded teacher needs every process in its forward pass, even one without rows for it.
                if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                    states(self.models[name], [0])
                continue
            hidden, head = states(self.models[name], sequences)
            mask = keep & mine.to(keep.device)[:, None]
            places = mask[keep].nonzero()[:, 0]
            chosen = hidden[mask if sequences is None else mask[sequences]]
            found.append((places, LocalRows(chosen, head.cast(compute_dtype(chosen)))))
        return found


@dataclass(frozen=True)
class EndpointTeacher:
    """A teacher served by vLLM, or by another server whose `/v1/completions` takes token ids and `prompt_logprobs`.

    It gives the k likeliest tokens, so it serves the losses `topk_forward_kl` and `k1`, at temperature 1. vLLM must be
    started with `--max-logprobs` of at least k.

    Attributes:
        url: of the server, with or without `/v1`.
        model: the name that it serves the teacher under.
        api_key: sent as a bearer token.
        timeout: seconds to wait for an answer.
        retries: further attempts after a refused connection or one of the states 429, 500, 502, 503, 504.
        backoff: the wait doubles from this many seconds.
    """

    url: str
    model: str
    api_key: str | None = None
    timeout: float = 600.0
    retries: int = 5
    backoff: float = 0.5

    def check(self, student: Any) -> None:
        """See before training that the server is there, serves the model, and counts tokens as the student does.

        Raises:
            ConfigError: it does not.
        """
        served = [entry.get("id") for entry in self._ask("GET", "/v1/models", None).get("data", [])]
        if self.model not in served:
            raise ConfigError(f"{self._root}: serves no model {self.model!r}; it serves {served}")
        tokenizer = getattr(student, "tokenizer", student)
        body = {"model": self.model, "prompt": _PROBE, "add_special_tokens": False}
        try:
            theirs = self._ask("POST", "/tokenize", body)["tokens"]
        except (DeltalensError, KeyError):
            _log.warning("%s has no /tokenize: whether its tokenizer is the student's cannot be checked", self._root)
            return
        ours = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        if theirs != ours:
            raise ConfigError(
                f"the student's tokenizer ({len(tokenizer)} tokens) and that of {self.model} at {self._root} give "
                f"different ids for the same text ({ours[:8]}… and {theirs[:8]}…); choose a teacher with the student's "
                "tokenizer"
            )

    def rows(self, sequences: Sequence[Sequence[int]], starts: Sequence[int], k: int, device: Any) -> ServedRows:
        """The teacher's view of the tokens of each sequence from its start on, one sequence after the other.

        Raises:
            DeltalensError: the server does not answer, or not with the log-probabilities asked for.
        """
        body = {
            "model": self.model,
            "prompt": [list(ids) for ids in sequences],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
        }
        answer = self._ask("POST", "/v1/completions", body)
        ids, values, sampled = [], [], []
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            for choice, sequence, start in zip(choices, sequences, starts, strict=True):
                places = choice["prompt_logprobs"]
                for place, token in zip(places[start:], sequence[start:], strict=True):
                    told = {int(word): float(entry["logprob"]) for word, entry in place.items()}
                    best = sorted(told, key=told.__getitem__, reverse=True)[:k]
                    if len(best) < k:
                        raise ValueError(f"{len(best)} log-probabilities at a place, and {k} were asked for")
                    ids.append(best)
                    values.append([told[word] for word in best])
                    sampled.append(told[token])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DeltalensError(
                f"{self._root}/v1/completions: the answer has no usable prompt_logprobs ({type(error).__name__}: "
                f"{error}); the endpoint must be vLLM's or return them as vLLM does"
            ) from None
        logprobs = torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, k)
        rest = torch.log1p(-logprobs.exp().sum(-1).clamp(max=1))
        numbers = torch.tensor(ids, dtype=torch.long, device=device).reshape(-1, k)
        return ServedRows(numbers, logprobs, rest, torch.tensor(sampled, dtype=torch.float32, device=device))

    @property
    def _root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        url = self._root + path
        retry = urllib3.Retry(
            total=self.retries,
            backoff_factor=self.backoff,
            status_forcelist=[429, 500, 502, 503, 504],
            allowed_methods=None,  # POST too: asking twice for log-probabilities changes nothing
            raise_on_status=False,
        )
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body)
        try:
            answer = urllib3.request(
                method, url, body=data, headers=headers, retries=retry, timeout=urllib3.Timeout(self.timeout)
            )
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ConfigError(
                f"{url}: the teacher's endpoint does not answer after {self.retries + 1} attempts ({reason})"
            ) from None
        if answer.status != 200:
            text = " ".join(answer.data.decode(errors="replace").split())[:300]
            hint = "; start vLLM with --max-logprobs of at least the loss's k" if "logprobs" in text else ""
            raise ConfigError(f"{url}: the teacher's endpoint answers with status {answer.status}: {text}{hint}")
        try:
            decoded = json.loads(answer.data)
        except ValueError:
            decoded = None
        if not isinstance(decoded, dict):
            raise ConfigError(f"{url}: the teacher's endpoint answers with status 200 and no JSON object")
        return decoded
