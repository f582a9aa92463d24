"""verl's FSDP checkpoints: one `model_world_size_N_rank_R.pt` a rank, each a state dict of DTensor shards.

A DTensor carries its mesh and placements, from which follows where the rank's block lies in the whole
(https://docs.pytorch.org/docs/stable/distributed.tensor.html: Shard splits as torch.chunk does, mesh dimension by
mesh dimension). Layout of the folder: https://verl.readthedocs.io/en/latest/advance/checkpoint.html.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deltalens.checkpoint.base import TensorEntry
from deltalens.checkpoint.formats.pread import Chunk, ChunkedSource
from deltalens.checkpoint.formats.torch_file import load_structure, quiet_logger, stored_chunk
from deltalens.errors import CheckpointError

__all__ = ["open_verl", "verl_shards"]

_NAME = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt$")


def verl_shards(folder: Path) -> list[Path]:
    """The folder's rank files in the order of ranks, [] where there are none."""
    found = {
        int(match[2]): file for file in folder.glob("model_world_size_*_rank_*.pt") if (match := _NAME.match(file.name))
    }
    return [found[rank] for rank in sorted(found)]


def open_verl(files: list[Path]) -> ChunkedSource:
    """Open the files of all ranks as one checkpoint.

    Raises:
        CheckpointError: a rank's file is absent; a tensor is placed in a way that cannot be undone here (pending
            sums, strided shards of tensor parallelism).
    """
    worlds = {int(_NAME.match(file.name)[1]) for file in files}  # type: ignore[index]
    if len(worlds) > 1:
        raise CheckpointError(f"{files[0].parent}: holds shards of several world sizes ({sorted(worlds)}); keep one")
    (world,) = worlds
    if len(files) != world:
        there = {int(_NAME.match(file.name)[2]) for file in files}  # type: ignore[index]
        missing = sorted(set(range(world)) - there)
        raise CheckpointError(f"{files[0].parent}: the shards of ranks {missing} of {world} are missing")
    entries: dict[str, TensorEntry] = {}
    chunks: dict[str, list[Chunk]] = {}
    for rank, file in enumerate(files):
        meshes = _meshes(file)
        loaded = load_structure(file)
        for name, tensor in loaded.items():
            if not hasattr(tensor, "dtype"):
                continue
            local = getattr(tensor, "_local_tensor", tensor)
            entry, chunk = stored_chunk(name, local, file)
            shape = entry.shape
            if local is not tensor:
                shape = tuple(int(n) for n in tensor.shape)
                block, offsets = _block(tensor._spec.placements, meshes[name], rank, shape, name, file)
                if block != chunk.shape:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} has a block of shape {list(chunk.shape)} where its placement "
                        f"{tensor._spec.placements} asks for {list(block)}"
                    )
                chunk = Chunk(file, chunk.at, block, offsets, chunk.stride)
            known = entries.setdefault(name, TensorEntry(name, entry.dtype, shape, file))
            if (known.dtype, known.shape) != (entry.dtype, shape):
                raise CheckpointError(
                    f"{file}: tensor {name!r} is {list(shape)} {entry.dtype} here and {list(known.shape)} "
                    f"{known.dtype} in {known.file.name}; the ranks do not belong together"
                )
            chunks.setdefault(name, []).append(chunk)
    if not entries:
        raise CheckpointError(f"{files[0].parent}: the rank files hold no tensors")
    return ChunkedSource("verl FSDP shards", files, entries, chunks)


def _meshes(file: Path) -> dict[str, Any]:
    """Tensor name → the array of ranks of its mesh. Fake tensors have no values, so this load maps the file."""
    import torch
    import torch.distributed.tensor  # registers DTensor as safe to unpickle

    try:
        with quiet_logger("torch.distributed.device_mesh"):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        load_structure(file)  # the same failure, said in our words
        raise
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file}: holds no state dict")
    return {name: value.device_mesh.mesh.numpy().copy() for name, value in loaded.items() if hasattr(value, "_spec")}


def _block(
    placements: tuple[Any, ...], mesh: Any, rank: int, shape: tuple[int, ...], name: str, file: Path
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offsets of the rank's block of a tensor."""
    where = (mesh == rank).nonzero()
    if len(where[0]) != 1:
        raise CheckpointError(f"{file}: tensor {name!r} lies on a mesh without rank {rank}")
    block, offsets = list(shape), [0] * len(shape)
    for size, position, placement in zip(mesh.shape, (int(axis[0]) for axis in where), placements, strict=True):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise CheckpointError(
                f"{file}: tensor {name!r} is placed as {placement}, which deltalens does not put together; "
                "merge the checkpoint with `python -m verl.model_merger merge` first"
            )
        dim = placement.dim % len(shape)
        each = -(-block[dim] // size)
        first = min(position * each, block[dim])
        offsets[dim] += first
        block[dim] = min(first + each, block[dim]) - first
    return tuple(block), tuple(offsets)
