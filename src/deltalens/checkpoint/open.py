"""Open whatever a path or Hub id names as a `Checkpoint`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltalens.checkpoint.base import Checkpoint, TensorSource
from deltalens.checkpoint.formats.safetensors import SafetensorsSource, shards_of_index
from deltalens.checkpoint.hub import download, split_hub_id
from deltalens.errors import CheckpointError

__all__ = ["open_checkpoint"]

# Files of a training folder that torch.save wrote and that hold no weights.
_NO_WEIGHTS = (
    "training_args",
    "optimizer",
    "scheduler",
    "rng_state",
    "random_states",
    "scaler",
    "extra_state",
    "optim",
)
_LOOKED_FOR = (
    "an adapter_config.json, *.safetensors with or without an index, pytorch_model*.bin or *.pt, a .metadata of "
    "torch.distributed.checkpoint, model_world_size_*_rank_*.pt, *.gguf"
)
# Where trainers put the weights below the folder that they name a checkpoint.
_BELOW = ("pytorch_model_fsdp_0", "actor", "model", "sharded_state_dict")


def open_checkpoint(spec: str | Path, *, base: Checkpoint | None = None, stored: bool = False) -> Checkpoint:
    """Open a checkpoint without reading any tensor.

    Args:
        spec: a directory, a file, or a Hub id with an optional `@revision` (only what is needed is downloaded).
        base: the opened SOURCE; a PEFT adapter needs it, other formats ignore it.
        stored: leave scaled float8 weights as they are stored, rather than multiplied out.

    Raises:
        CheckpointError: nothing usable is there; the message says what was looked for.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        hub_id = split_hub_id(str(spec))
        if hub_id is None:
            raise CheckpointError(f"{spec}: there is no such file or directory")
        path = download(*hub_id)
    folder = path if path.is_dir() else path.parent
    if path.name.startswith("adapter_model.") or (path.is_dir() and (path / "adapter_config.json").is_file()):
        return _open_adapter(str(spec), folder, base)
    source, notes, folder = _detect(path, folder)
    config, described = _read_config(folder)
    if not stored and any(entry.dtype.startswith("F8") for entry in source.entries.values()):
        from deltalens.checkpoint.formats.fp8 import dequantise_float8

        source, said = dequantise_float8(source, config)
        notes += said
    return Checkpoint(str(spec), source, config, described, notes)


def _detect(path: Path, folder: Path) -> tuple[TensorSource, tuple[str, ...], Path]:
    """The reader, what it has to say, and the folder that it read."""
    if path.is_file():
        return (*_open_file(path), folder)
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return (*_open_file(folder / index), folder)
    if files := sorted(folder.glob("*.safetensors")):
        single = folder / "model.safetensors"  # beside it, others hold the same weights under other names
        return SafetensorsSource([single] if single in files else files), (), folder
    if (folder / ".metadata").is_file():
        from deltalens.checkpoint.formats.distributed import open_distributed

        return (*open_distributed(folder), folder)
    if any(folder.glob("model_world_size_*_rank_*.pt")):
        from deltalens.checkpoint.formats.verl import open_verl, verl_shards

        return open_verl(verl_shards(folder)), (), folder
    if files := _torch_files(folder):
        from deltalens.checkpoint.formats.torch_file import open_torch

        return open_torch(files), (), folder
    if files := sorted(folder.glob("*.gguf")):
        if len(files) > 1 and not all("-of-" in file.name for file in files):
            raise CheckpointError(f"{folder}: holds {len(files)} GGUF files; give one of them")
        return (*_open_gguf(files), folder)
    for name in _BELOW:
        if (folder / name).is_dir():
            return _detect(folder / name, folder / name)
    raise CheckpointError(f"{folder}: holds no checkpoint that deltalens knows (looked for {_LOOKED_FOR})")


def _open_file(path: Path) -> tuple[TensorSource, tuple[str, ...]]:
    if path.name.endswith(".gguf"):
        return _open_gguf([path])
    torch_file = path.suffix in (".bin", ".pt", ".pth") or path.name.endswith(".bin.index.json")
    files, weight_map = shards_of_index(path) if path.name.endswith(".index.json") else ([path], None)
    if not torch_file:
        return SafetensorsSource(files, weight_map), ()
    from deltalens.checkpoint.formats.torch_file import open_torch

    return open_torch(files, weight_map), ()


def _torch_files(folder: Path) -> list[Path]:
    """The folder's torch.save files that can hold weights: `pytorch_model*.bin`, else `*.bin`, `*.pt`, `*.pth`."""
    named = sorted(folder.glob("pytorch_model*.bin"))
    found = named or sorted(file for ending in ("bin", "pt", "pth") for file in folder.glob(f"*.{ending}"))
    return [file for file in found if not file.name.startswith(_NO_WEIGHTS)]


def _open_gguf(files: list[Path]) -> tuple[TensorSource, tuple[str, ...]]:
    from deltalens.checkpoint.formats.gguf import GGUFSource

    source = GGUFSource(files)
    return source, source.notes


def _open_adapter(spec: str, folder: Path, base: Checkpoint | None) -> Checkpoint:
    from deltalens.checkpoint.formats.peft import LoraSource, read_adapter_config

    config = read_adapter_config(folder)
    if base is None:
        raise CheckpointError(
            f"{spec}: is a PEFT adapter, which holds no weights of its own; give it as TRAINED and its base "
            f"({config.get('base_model_name_or_path') or 'the model it was trained on'}) as SOURCE"
        )
    adapter: TensorSource
    if (folder / "adapter_model.safetensors").is_file():
        adapter = SafetensorsSource([folder / "adapter_model.safetensors"])
    elif (folder / "adapter_model.bin").is_file():
        from deltalens.checkpoint.formats.torch_file import open_torch

        adapter = open_torch([folder / "adapter_model.bin"])
    else:
        raise CheckpointError(f"{folder}: has an adapter_config.json but neither adapter_model.safetensors nor .bin")
    source = LoraSource(folder, adapter, config, base)
    return replace(base, path=spec, tensors=source, folder=folder, notes=())


def _read_config(folder: Path) -> tuple[dict[str, Any], Path]:
    """config.json and the folder that has it: the checkpoint's own, verl's `huggingface`, or the one above."""
    for place in (folder, folder / "huggingface", folder.parent):
        file = place / "config.json"
        if not file.is_file() or (place == folder.parent and folder.name not in _BELOW):
            continue
        try:
            config = json.loads(file.read_text())
        except ValueError:
            raise CheckpointError(f"{file}: is not valid JSON") from None
        return (config if isinstance(config, dict) else {}), place
    return {}, folder
