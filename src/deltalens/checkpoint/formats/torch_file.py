"""torch.save files: one `.bin`, `.pt` or `.pth`, or shards with an index.

torch's restricted unpickler reads the structure (`weights_only=True`, so no code of the file runs) in fake-tensor
mode, which allocates no data and tells where in the file each storage lies
(https://docs.pytorch.org/docs/stable/generated/torch.load.html); the bytes are then read by pread, without torch.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from deltalens.checkpoint.base import DTYPE_BYTES, TensorEntry
from deltalens.checkpoint.formats.pread import Chunk, ChunkedSource
from deltalens.errors import CheckpointError

__all__ = ["TORCH_DTYPES", "load_structure", "open_torch", "quiet_logger", "stored_chunk"]

TORCH_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2fnuz": "F8_E5M2FNUZ", "torch.complex64": "C64",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.bool": "BOOL",
    "torch.uint64": "U64", "torch.uint32": "U32", "torch.uint16": "U16", "torch.uint8": "U8",
}  # fmt: skip
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_LOCK = threading.Lock()  # silencing a logger is not a thread's own matter


def open_torch(files: Sequence[Path], expected: Mapping[str, str] | None = None) -> ChunkedSource:
    """Open one or more torch.save files as a checkpoint.

    Args:
        files: the files, each a dict of tensors, or a dict with one under `state_dict`, `model` or `module`.
        expected: where an index was read, tensor name → file name.

    Raises:
        CheckpointError: a file is damaged, of the format before torch 1.6, needs more than weights to be unpickled,
            or holds no tensors; two files hold one name; the index names a tensor that its shard does not hold.
    """
    entries: dict[str, TensorEntry] = {}
    chunks: dict[str, list[Chunk]] = {}
    for file in files:
        for name, tensor in _state_dict(load_structure(file), file):
            if name in entries:
                raise CheckpointError(f"{file}: tensor {name!r} is also in {entries[name].file.name}")
            entry, chunk = stored_chunk(name, tensor, file)
            entries[name], chunks[name] = entry, [chunk]
    for name, shard in (expected or {}).items():
        if name not in entries or entries[name].file.name != shard:
            raise CheckpointError(
                f"{files[0].parent}: the index says that {shard} holds {name!r}, but it does not; "
                "download the checkpoint again"
            )
    return ChunkedSource("torch", files, entries, chunks)


def load_structure(file: Path, stream: IO[bytes] | None = None) -> Any:
    """What torch.save wrote, its tensors fake: shape, dtype, stride, and the place of the storage in the file."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with file.open("rb") as handle:
            head = handle.read(4)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        with _LOCK, FakeTensorMode(), quiet_logger("torch.distributed.device_mesh"):
            return torch.load(stream or file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if stream is None and head != b"PK\x03\x04":
            raise CheckpointError(f"{file}: not a file that torch.save wrote") from None
        reason = str(error).partition("Unsupported")[2].partition(". ")[0] or str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file}: holds more than weights, which deltalens does not unpickle (that could run code of the file): "
            f"{reason.strip(' :')}; save the state dict alone"
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file}: torch cannot load it ({reason}); is it cut short?") from None


def stored_chunk(name: str, tensor: Any, file: Path, base: int = 0) -> tuple[TensorEntry, Chunk]:
    """Entry and chunk of one fake tensor; `base` is the byte at which its torch.save stream begins in the file."""
    code = TORCH_DTYPES.get(str(tensor.dtype))
    if code is None:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {tensor.dtype}, which deltalens does not know")
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise CheckpointError(
            f"{file}: was written in the format before torch 1.6; convert it: "
            "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    shape = tuple(int(n) for n in tensor.shape)
    at = base + offset + tensor.storage_offset() * DTYPE_BYTES[code]
    stride = None if tensor.is_contiguous() else tuple(int(s) for s in tensor.stride())
    return TensorEntry(name, code, shape, file), Chunk(file, at, shape, (0,) * len(shape), stride)


def _state_dict(loaded: Any, file: Path) -> Iterator[tuple[str, Any]]:
    import torch

    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    found = 0
    for name, value in loaded.items() if isinstance(loaded, dict) else ():
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            found += 1
            if hasattr(value, "_local_tensor"):
                raise CheckpointError(f"{file}: tensor {name!r} is a shard; give the folder with every rank's file")
            yield str(name), value
    if not found:
        raise CheckpointError(f"{file}: holds no state dict (looked for tensors, and under {', '.join(_WRAPPERS)})")


@contextmanager
def quiet_logger(logger: str) -> Iterator[None]:
    """torch warns that a mesh is unpickled without process groups: nothing here communicates."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
