"""Whether two checkpoints' tokenizers give the same ids to the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["tokenizer_conflict"]


def tokenizer_conflict(source: Path | None, trained: Path | None) -> str | None:
    """A warning where both folders hold a tokenizer.json and one id stands for two tokens; else None.

    Tokens that only one side has (a chat template's, say) are no conflict.
    """
    if source is None or trained is None:
        return None
    ours, theirs = source / "tokenizer.json", trained / "tokenizer.json"
    if not (ours.is_file() and theirs.is_file()) or ours.samefile(theirs):
        return None
    raw_ours, raw_theirs = ours.read_bytes(), theirs.read_bytes()
    if raw_ours == raw_theirs:
        return None
    a, b = _tokens(raw_ours), _tokens(raw_theirs)
    differ = [index for index in a.keys() & b.keys() if a[index] != b[index]]
    if not differ:
        return None
    first = min(differ)
    return (
        f"the tokenizers disagree: {len(differ)} ids stand for other tokens (id {first} is {a[first]!r} in SOURCE, "
        f"{b[first]!r} in TRAINED); SOURCE is probably not what TRAINED was trained from"
    )


def _tokens(raw: bytes) -> dict[int, str]:
    """Id → token; empty where the file is no tokenizer that we can read."""
    try:
        data = json.loads(raw)
        vocabulary = data["model"]["vocab"]
        added = {int(token["id"]): str(token["content"]) for token in data.get("added_tokens") or []}
        if isinstance(vocabulary, dict):
            return {int(index): token for token, index in vocabulary.items()} | added
        return {index: str(row[0]) for index, row in enumerate(vocabulary)} | added
    except (ValueError, KeyError, TypeError, IndexError):
        return {}
