"""From a task's examples to the rows that TRL's trainers read, and to a hash of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltalens.train.tasks import Example, to_dataset

__all__ = ["data_hash", "rows"]


def rows(examples: Sequence[Example], *, completions: bool = False) -> Any:
    """`to_dataset` with one more column: `index` (of the example), or `completion` (its answer as the assistant's
    message) where a trainer is to learn the answers."""
    table = to_dataset(examples)
    if completions:
        replies = [[{"role": "assistant", "content": example.answer}] for example in examples]
        return table.remove_columns(["answer", "privileged_context"]).add_column("completion", replies)
    return table.add_column("index", list(range(len(examples))))


def data_hash(examples: Sequence[Example]) -> str:
    """BLAKE3 of all prompts, contexts, answers and images in order."""
    hasher = blake3()
    files: dict[str, bytes] = {}
    for example in examples:
        for part in (example.prompt, example.context, example.answer, str(len(example.images))):
            encoded = part.encode()
            hasher.update(len(encoded).to_bytes(8, "little") + encoded)
        for image in example.images:
            if not isinstance(image, (str, Path)):
                hasher.update(blake3(image.tobytes()).digest())
                continue
            name = str(image)
            if name not in files:
                files[name] = blake3(Path(name).read_bytes()).digest()
            hasher.update(files[name])
    return hasher.hexdigest()
