"""The mask file: which coordinates of a source are trained (DESIGN.md, "Formats of our own").

A safetensors file with one uint8 tensor a weight: the bits of its row-major flattened mask as `numpy.packbits` packs
them, or nothing where no bit is set. The metadata says the rule, the shapes, the densities and the source's hash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deltalens._version import __version__
from deltalens.checkpoint import Checkpoint, open_checkpoint, role_of
from deltalens.errors import CheckpointError
from deltalens.files import whole_file
from deltalens.patch.format import overall_hash

__all__ = ["SCHEMA", "SubnetworkMask", "in_roles", "source_hash"]

SCHEMA = "1"


def source_hash(source: str | Path | Checkpoint, progress: Callable[[int, int, str], None] | None = None) -> str:
    """BLAKE3 over every tensor of a checkpoint as it is stored: the hash that a patch names its source by too.

    Args:
        source: a directory, file or Hub id; an opened checkpoint must have been opened with `stored=True` where it
            holds float8, since the hash is of the stored bytes.
        progress: called after each tensor with bytes done, bytes in all, and its name.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source, stored=True) as opened:
            return source_hash(opened, progress)
    identity, done, total = {}, 0, source.nbytes
    for name, entry in source.entries.items():
        identity[name] = (entry.dtype, entry.shape, blake3(source.read(name).data).hexdigest())
        done += entry.nbytes
        if progress is not None:
            progress(done, total, name)
    return overall_hash(identity)


class SubnetworkMask:
    """Which coordinates of each tensor are in a subnetwork.

    Tensors are named as SOURCE stores them. A tensor that the mask does not name has nothing trained in it, exactly as
    one whose bits are all zero. Immutable; a loaded mask reads a tensor's bits from the mapped file when asked.

    Attributes:
        rule: how it was made, for people.
        source_hash: `source_hash` of the checkpoint that it belongs to.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], packed: Callable[[str], np.ndarray], *, rule: str, source_hash: str
    ) -> None:
        """Used by the constructors below. `packed` gives a tensor's bits (uint8), of length 0 where none is set."""
        self._shapes = dict(shapes)
        self._packed = packed
        self.rule = rule
        self.source_hash = source_hash

    @classmethod
    def from_dense(cls, dense: Mapping[str, np.ndarray], *, rule: str, source_hash: str) -> SubnetworkMask:
        """A mask from bool arrays of the tensors' shapes, in the source's order."""
        assert all(bits.dtype == np.bool_ for bits in dense.values()), "masks are bool"
        bits = {name: np.packbits(np.ascontiguousarray(mask).reshape(-1)) for name, mask in dense.items()}
        shapes = {name: mask.shape for name, mask in dense.items()}
        return cls(shapes, bits.__getitem__, rule=rule, source_hash=source_hash)

    @classmethod
    def from_packed(
        cls, packed: Mapping[str, tuple[tuple[int, ...], np.ndarray]], *, rule: str, source_hash: str
    ) -> SubnetworkMask:
        """A mask from each tensor's shape and packed bits (uint8, see `packed`)."""
        shapes = {name: tuple(shape) for name, (shape, _) in packed.items()}
        return cls(shapes, lambda name: packed[name][1], rule=rule, source_hash=source_hash)

    @classmethod
    def load(cls, path: str | Path, *, source: str | Path | Checkpoint | None = None) -> SubnetworkMask:
        """Open a mask file by memory map; a tensor's bits are read when they are asked for.

        Args:
            path: what `save` wrote.
            source: where given, the checkpoint whose hash the mask must have; it is read once.

        Raises:
            CheckpointError: it is no mask, is damaged or of a later schema, or belongs to another source.
        """
        try:
            handle = safe_open(path, framework="numpy")
            metadata: dict[str, Any] = handle.metadata() or {}
            if metadata.get("schema") != SCHEMA:
                found = metadata.get("schema")
                raise CheckpointError(
                    f"{path}: is a mask of schema {found}, but deltalens {__version__} reads schema {SCHEMA}; update it"
                    if found
                    else f"{path}: is no mask of deltalens; make one with `deltalens mask`"
                )
            shapes = {name: tuple(int(n) for n in shape) for name, shape in json.loads(metadata["shapes"]).items()}
            for name, shape in shapes.items():
                stored = handle.get_slice(name)
                whole = [-(-prod(shape) // 8)]
                if stored.get_dtype() != "U8" or stored.get_shape() not in ([0], whole):
                    raise CheckpointError(f"{path}: tensor {name!r} does not have the bits that its shape needs")
            rule, of = metadata["rule"], metadata["source_hash"]
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror or 'there is no such file'})") from None
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f"{path}: is no mask of deltalens, or damaged; make it again") from None
        if source is not None and source_hash(source) != of:
            name = source.path if isinstance(source, Checkpoint) else source
            raise CheckpointError(
                f"{path}: this mask was made for another source than {name} (its tensors' hash is {of[:16]}…); "
                "give the checkpoint that it was made from, or make the mask again"
            )

        def packed(name: str) -> np.ndarray:
            bits = handle.get_tensor(name)
            spare = -prod(shapes[name]) % 8
            if bits.size and int(bits[-1]) & ((1 << spare) - 1):
                raise CheckpointError(f"{path}: tensor {name!r} has bits behind its end; the file is damaged")
            return bits

        return cls(shapes, packed, rule=rule, source_hash=of)

    def save(self, path: str | Path) -> None:
        """Write the mask; the file appears when it is whole.

        Raises:
            CheckpointError: it cannot be written.
        """
        bits = {name: self.packed(name) if self.count(name) else np.zeros(0, np.uint8) for name in self._shapes}
        metadata = {
            "schema": SCHEMA,
            "deltalens": __version__,
            "rule": self.rule,
            "source_hash": self.source_hash,
            "density": repr(self.total_density()),
            "densities": json.dumps({name: self.density(name) for name in self._shapes}),
            "shapes": json.dumps({name: list(shape) for name, shape in self._shapes.items()}),
        }
        try:
            with whole_file(Path(path)) as temporary:
                save_file(bits, temporary, metadata=metadata)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None

    def content_hash(self) -> str:
        """BLAKE3 of the source's hash and of what is selected. Two files of one mask may differ: safetensors writes
        metadata in any order.
        """
        hasher = blake3(self.source_hash.encode())
        for name in sorted(self._shapes):
            bits = self.packed(name)
            hasher.update(f"\0{name}\0{bits.size}\0".encode())
            hasher.update(bits.tobytes())
        return hasher.hexdigest()

    def names(self) -> list[str]:
        """The tensors that the mask speaks of, in the source's order; some may have no bit set."""
        return list(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape. Raises KeyError for a name that the mask does not speak of."""
        return self._shapes[name]

    def packed(self, name: str) -> np.ndarray:
        """uint8[⌈N/8⌉]: `numpy.packbits` of the row-major flattened mask; zeros where nothing is set."""
        bits = self._packed(name)
        return bits if bits.size else np.zeros(-(-prod(self._shapes[name]) // 8), np.uint8)

    def flat(self, name: str) -> np.ndarray:
        """bool[N]: the mask of a tensor, row-major."""
        return np.unpackbits(self.packed(name), count=prod(self._shapes[name])).view(np.bool_)

    def dense(self, name: str) -> np.ndarray:
        """bool array of the tensor's shape."""
        return self.flat(name).reshape(self._shapes[name])

    def indices(self, name: str) -> np.ndarray:
        """int64, ascending: flat positions that are in the subnetwork."""
        return np.flatnonzero(self.flat(name)).astype(np.int64, copy=False)

    def count(self, name: str) -> int:
        """How many coordinates of a tensor are in the subnetwork."""
        return int(np.bitwise_count(self._packed(name)).sum(dtype=np.int64))

    def density(self, name: str) -> float:
        """`count` over the tensor's size; 0 for an empty tensor."""
        return self.count(name) / max(1, prod(self._shapes[name]))

    def total_density(self) -> float:
        """Share of all coordinates of the tensors it names that are in the subnetwork."""
        size = sum(prod(shape) for shape in self._shapes.values())
        return sum(self.count(name) for name in self._shapes) / max(1, size)

    def by_role(self) -> dict[str, tuple[int, int, int]]:
        """Role → number of tensors, of coordinates, and of coordinates in the subnetwork."""
        out: dict[str, tuple[int, int, int]] = {}
        for name, shape in self._shapes.items():
            role = role_of(name)[0]
            tensors, size, count = out.get(role, (0, 0, 0))
            out[role] = (tensors + 1, size + prod(shape), count + self.count(name))
        return out

    def restrict(self, roles: Collection[str] | None = None, layers: Collection[int] | None = None) -> SubnetworkMask:
        """The part in tensors of these roles (`ffn`; `vision` is every `vision.…`) and layers; the rest is emptied."""
        kept = {
            name
            for name in self._shapes
            if in_roles(role_of(name)[0], roles) and (layers is None or role_of(name)[1] in layers)
        }
        said = [f"roles={','.join(sorted(roles))}"] if roles is not None else []
        said += [f"layers={','.join(map(str, sorted(layers)))}"] if layers is not None else []
        nothing = np.zeros(0, np.uint8)
        return SubnetworkMask(
            self._shapes,
            lambda name: self._packed(name) if name in kept else nothing,
            rule=" ".join([self.rule, *said]),
            source_hash=self.source_hash,
        )

    def __and__(self, other: SubnetworkMask) -> SubnetworkMask:
        return self._combine(other, "&", np.bitwise_and)

    def __or__(self, other: SubnetworkMask) -> SubnetworkMask:
        return self._combine(other, "|", np.bitwise_or)

    def __invert__(self) -> SubnetworkMask:
        """Every other coordinate of the tensors that the mask names."""

        def packed(name: str) -> np.ndarray:
            bits = ~self.packed(name)
            if bits.size:
                bits[-1] &= (0xFF << (-prod(self._shapes[name]) % 8)) & 0xFF
            return bits

        return SubnetworkMask(self._shapes, packed, rule=f"~({self.rule})", source_hash=self.source_hash)

    def _combine(
        self, other: SubnetworkMask, sign: str, operation: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> SubnetworkMask:
        """Raises CheckpointError where the masks belong to different sources. Missing tensors are empty."""
        if self.source_hash != other.source_hash:
            raise CheckpointError(
                f"masks of different sources cannot be combined ({self.rule!r} of {self.source_hash[:16]}…, "
                f"{other.rule!r} of {other.source_hash[:16]}…); make both from one checkpoint"
            )
        shapes = self._shapes | other._shapes

        def packed(name: str) -> np.ndarray:
            both = [
                mask.packed(name) if name in mask else np.zeros(-(-prod(shapes[name]) // 8), np.uint8)
                for mask in (self, other)
            ]
            return operation(*both)

        rule = f"({self.rule}) {sign} ({other.rule})"
        return SubnetworkMask(shapes, packed, rule=rule, source_hash=self.source_hash)


def in_roles(role: str, wanted: Collection[str] | None) -> bool:
    """Whether a role is among those wanted; `vision` stands for every `vision.…`, None for all."""
    return wanted is None or role in wanted or role.partition(".")[0] in wanted
