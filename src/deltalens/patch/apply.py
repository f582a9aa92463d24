"""`apply` and `verify`: a source and a chain of patches in, the trained checkpoint out, every hash checked.

The result is made in a folder of a temporary name beside the output and renamed when all of it is there and right.
A run that was cut short is taken up again: a tensor whose bytes already have the right hash is not made twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from deltalens.checkpoint import Checkpoint, open_checkpoint
from deltalens.checkpoint.writer import WeightFile
from deltalens.errors import PatchError
from deltalens.patch.codec import Encoding, decode_tensor
from deltalens.patch.format import CarriedFile, PatchFile, PatchTensor
from deltalens.patch.pack import Progress, workers

__all__ = ["ApplyResult", "apply", "apply_in_place", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyResult:
    """What a chain of patches gives: `path` is None for `verify`; `resumed` counts tensors that were already there."""

    path: Path | None
    patches: int
    tensors: int
    changed: int
    bytes: int
    result_hash: str
    resumed: int = 0


def apply(
    source: str | Path,
    patches: Sequence[str | Path],
    output: str | Path,
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ApplyResult:
    """Write the checkpoint that the patches give, from first to last, in one pass over the tensors.

    Args:
        source: what the first patch was made from; it is only read.
        patches: one patch, or a chain in which each starts where the one before ends.
        output: a folder that does not exist yet, or is empty.
        jobs: threads; one a processor by default.
        progress: called after each tensor.

    Raises:
        PatchError: a patch is damaged, the chain does not fit together, `source` is not what the first was made from
            (the first tensor that differs is named), or the output cannot be written.
        CheckpointError: `source` cannot be read.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PatchError(f"{output}: exists already; apply writes a new folder and changes nothing that is there")
    whole = Path(os.path.abspath(output))
    partial = whole.parent / f".{whole.name}.partial"
    with _opened(source, patches) as (before, chain):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            resumed = _write_tensors(before, chain, partial, jobs or workers(), progress)
            _write_files(before, chain, partial)
            _keep_only(partial, {*chain[-1].weights, *(file.path for file in chain[-1].files)})
            for file in partial.iterdir():
                _sync(file)
            if output.exists():
                output.rmdir()
            partial.rename(output)
        except OSError as error:
            raise PatchError(
                f"{output}: cannot be written ({error.strerror}); what is done is kept in {partial.name}, and the same "
                "command goes on from there"
            ) from None
        return _result(chain, output, resumed)


def verify(
    source: str | Path, patches: Sequence[str | Path], *, jobs: int | None = None, progress: Progress | None = None
) -> ApplyResult:
    """Whether the patches would apply, and to what: every frame is decoded and every hash checked; nothing is written.

    Raises:
        PatchError, CheckpointError: as `apply`.
    """
    with _opened(source, patches) as (before, chain):
        entries = list(chain[-1].tensors.values())

        def check(entry: PatchTensor) -> bool:
            _make(before, chain, entry.name)
            return False

        _run(check, entries, jobs or workers(), progress)
        for file in chain[-1].files:
            _file_bytes(before, chain, len(chain) - 1, file)
        return _result(chain, None, 0)


def apply_in_place(state_dict: MutableMapping[str, Any], patch: str | Path) -> int:
    """Apply one patch to loaded weights: NumPy arrays or torch tensors (on any device), changed in place.

    All sources and frames are checked before anything is written. Returns the number of tensors changed.

    Raises:
        PatchError: the patch is damaged, adds, removes or reshapes tensors, or a tensor is not what it was made from.
    """
    with PatchFile(patch) as opened:
        if opened.removed:
            raise PatchError(f"{patch}: removes tensor {opened.removed[0]!r}; load the result of apply instead")
        wanted = [entry for entry in opened.tensors.values() if entry.codec != "unchanged"]
        for entry in wanted:
            if entry.source_hash is None or entry.name not in state_dict:
                raise PatchError(f"{patch}: tensor {entry.name!r} is new or reshaped; load the result of apply instead")
            opened.frame(entry)
        for entry in opened.tensors.values():
            if (
                entry.name in state_dict
                and blake3(_bytes_of(state_dict[entry.name]).data).hexdigest() != entry.source_hash
            ):
                raise PatchError(f"{patch}: tensor {entry.name!r} is not what the patch was made from")
        for entry in wanted:
            source = _bytes_of(state_dict[entry.name])
            if blake3(source.data).hexdigest() == entry.result_hash:
                continue  # tied to one that has been written
            made = _decode(opened, entry, source)
            _write_back(state_dict[entry.name], made)
        return len(wanted)


def _bytes_of(tensor: Any) -> np.ndarray:
    """A tensor's bytes (uint8, flat, a copy where needed)."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _write_back(tensor: Any, made: np.ndarray) -> None:
    if isinstance(tensor, np.ndarray):
        tensor[...] = made.view(tensor.dtype).reshape(tensor.shape)
        return
    import torch

    with torch.no_grad():
        tensor.copy_(torch.from_numpy(made.copy()).view(tensor.dtype).reshape(tensor.shape))


@contextmanager
def _opened(source: str | Path, patches: Sequence[str | Path]) -> Iterator[tuple[Checkpoint, list[PatchFile]]]:
    if not patches:
        raise PatchError("no patch was given")
    with ExitStack() as stack:
        chain = [stack.enter_context(PatchFile(path)) for path in patches]
        for first, second in pairwise(chain):
            if first.result_hash != second.source_hash:
                raise PatchError(f"{second.path}: does not start where {first.path} ends; give the patches in order")
            for entry in second.tensors.values():
                made = first.tensors.get(entry.name)
                ends = made and (made.dtype, made.shape, made.result_hash)
                if entry.source_hash is not None and ends != (entry.dtype, entry.shape, entry.source_hash):
                    raise PatchError(f"{second.path}: tensor {entry.name!r} does not start where {first.path} ends")
        yield stack.enter_context(open_checkpoint(source, stored=True)), chain


def _make(before: Checkpoint, chain: Sequence[PatchFile], name: str) -> np.ndarray:
    """A tensor of the result: through every patch of the chain, each step checked."""
    data: np.ndarray | None = None
    for step, patch in enumerate(chain):
        entry = patch.tensors.get(name)
        if entry is None:
            data = None
        elif entry.source_hash is None:
            data = _decode(patch, entry, None)
        else:
            if step == 0:
                data = _source_bytes(before, patch, entry)
            if data is None:
                raise PatchError(f"{patch.path}: tensor {name!r} has no source in the chain")
            data = data if entry.codec == "unchanged" else _decode(patch, entry, data)
    assert data is not None, "the last patch holds every tensor of the result"
    return data


def _source_bytes(before: Checkpoint, patch: PatchFile, entry: PatchTensor) -> np.ndarray:
    stored = before.entries.get(entry.name)
    if stored is None or (stored.dtype, stored.shape) != (entry.dtype, entry.shape):
        found = "is absent" if stored is None else f"is {stored.dtype} {list(stored.shape)}"
        raise PatchError(
            f"{before.path}: tensor {entry.name!r} {found}; {patch.path} was made from {entry.dtype} "
            f"{list(entry.shape)}. Is this the right source?"
        )
    data = before.read(entry.name)
    if blake3(data.data).hexdigest() != entry.source_hash:
        raise PatchError(
            f"{before.path}: tensor {entry.name!r} is not what {patch.path} was made from; give the right source"
        )
    return data


def _decode(patch: PatchFile, entry: PatchTensor, source: np.ndarray | None) -> np.ndarray:
    if source is None:
        source = np.empty(entry.nbytes, np.uint8)  # `new` reads its length only
    elif source.size != entry.nbytes:
        raise PatchError(f"{patch.path}: tensor {entry.name!r} was made from one of another size")
    try:
        encoding = Encoding(entry.codec, patch.frame(entry), entry.model)
        made = decode_tensor(encoding, source, entry.dtype, entry.width, columns=entry.columns)
    except PatchError as error:
        if str(patch.path) in str(error):
            raise
        raise PatchError(f"{patch.path}: tensor {entry.name!r}: {error}") from None
    if blake3(made.data).hexdigest() != entry.result_hash:
        raise PatchError(f"{patch.path}: tensor {entry.name!r} does not come out as its hash says; get the patch again")
    return made


def _write_tensors(
    before: Checkpoint,
    chain: Sequence[PatchFile],
    folder: Path,
    jobs: int,
    progress: Progress | None,
) -> int:
    """Write every tensor to its place; returns how many were there already."""
    last = chain[-1]
    weights: dict[str, WeightFile] = {}
    earlier = {path for path in last.weights if (folder / path).exists()}
    try:
        for path, header in last.weights.items():
            nbytes = sum(entry.nbytes for entry in last.tensors.values() if entry.file == path)
            weights[path] = WeightFile(folder / path, header, nbytes)

        def write(entry: PatchTensor) -> bool:
            file = weights[entry.file]
            if entry.file in earlier and _there(file, entry):
                return True
            file.write(entry.place, _make(before, chain, entry.name))
            return False

        return _run(write, list(last.tensors.values()), jobs, progress)
    finally:
        for opened in weights.values():
            opened.close()


def _there(file: WeightFile, entry: PatchTensor) -> bool:
    data = file.read(entry.place, entry.nbytes)
    return len(data) == entry.nbytes and blake3(data).hexdigest() == entry.result_hash


def _run(
    work: Callable[[PatchTensor], bool], entries: Sequence[PatchTensor], jobs: int, progress: Progress | None
) -> int:
    """Do `work` on each entry in a few threads; counts those that say True. The first error in order is raised."""
    done, total, counted = 0, sum(entry.nbytes for entry in entries), 0
    with ThreadPoolExecutor(jobs) as pool:
        futures: list[Future[bool]] = [pool.submit(work, entry) for entry in entries]
        try:
            for entry, future in zip(entries, futures, strict=True):
                counted += future.result()
                done += entry.nbytes
                if progress is not None:
                    progress(done, total, entry.name)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return counted


def _file_bytes(before: Checkpoint, chain: Sequence[PatchFile], step: int, file: CarriedFile) -> bytes:
    """A carried file, followed back through the chain to where its bytes are."""
    if file.length:
        return chain[step].file_bytes(file)
    if step > 0:
        earlier = next((f for f in chain[step - 1].files if f.path == file.path and f.hash == file.hash), None)
        if earlier is None:
            raise PatchError(f"{chain[step].path}: file {file.path!r} is not in the result of {chain[step - 1].path}")
        return _file_bytes(before, chain, step - 1, earlier)
    place = None if before.folder is None else before.folder / file.path
    data = place.read_bytes() if place is not None and place.is_file() else b""
    if blake3(data).hexdigest() != file.hash:
        raise PatchError(f"{before.path}: file {file.path!r} is not what {chain[0].path} was made from")
    return data


def _write_files(before: Checkpoint, chain: Sequence[PatchFile], folder: Path) -> None:
    for file in chain[-1].files:
        (folder / file.path).write_bytes(_file_bytes(before, chain, len(chain) - 1, file))


def _keep_only(folder: Path, names: set[str]) -> None:
    """Drop what an earlier, different run left in the temporary folder."""
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _result(chain: Sequence[PatchFile], output: Path | None, resumed: int) -> ApplyResult:
    last = chain[-1]
    names = {e.name for patch in chain for e in patch.tensors.values() if e.codec != "unchanged"}
    return ApplyResult(
        path=output,
        patches=len(chain),
        tensors=len(last.tensors),
        changed=len(names & set(last.tensors)),
        bytes=sum(entry.nbytes for entry in last.tensors.values()),
        result_hash=last.result_hash,
        resumed=resumed,
    )
