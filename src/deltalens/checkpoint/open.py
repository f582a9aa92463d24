"""Open whatever a path or Hub id names as a `Checkpoint`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltalens.checkpoint.base import Checkpoint, TensorSource
from deltalens.checkpoint.formats.safetensors import SafetensorsSource, shards_of_index
from deltalens.errors import CheckpointError

__all__ = ["open_checkpoint"]


def open_checkpoint(spec: str | Path) -> Checkpoint:
    """Open a checkpoint without reading any tensor.

    Args:
        spec: a directory, a file, or a Hub id with an optional `@revision`.

    Raises:
        CheckpointError: nothing usable is there; the message says what was looked for.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        raise CheckpointError(f"{spec}: there is no such file or directory")
    source = _detect(path)
    folder = path if path.is_dir() else path.parent
    return Checkpoint(str(spec), source, _read_config(folder), folder)


def _detect(path: Path) -> TensorSource:
    if path.is_file():
        if path.name.endswith(".index.json"):
            return SafetensorsSource(*shards_of_index(path))
        return SafetensorsSource([path])
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return SafetensorsSource(*shards_of_index(index))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: holds no checkpoint that deltalens knows (looked for *.safetensors)")
    return SafetensorsSource(files)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError:
        raise CheckpointError(f"{file}: is not valid JSON") from None
    return config if isinstance(config, dict) else {}
