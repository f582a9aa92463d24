"""The trained coordinates of one parameter: which they are, how they are gathered and written back (issue 13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from deltalens.checkpoint.pairing import bare_name
from deltalens.errors import ConfigError
from deltalens.subnetwork.distributed import local_mask, local_tensor

__all__ = ["CompactTensor", "Found", "Restriction", "find_parameters", "mover"]

_GATHERED = (torch.float32, torch.bfloat16)  # by compiled loops
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Restriction(Protocol):
    """What training is restricted to: a `SubnetworkMask`, or a `Projection`, which has `basis` too."""

    def names(self) -> list[str]:
        """Tensors as the source stores them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""

    def count(self, name: str) -> int:
        """How many of a tensor's coordinates are trained."""

    def dense(self, name: str) -> np.ndarray:
        """Which: bool, of the tensor's shape."""


@dataclass(frozen=True, slots=True)
class Found:
    """A parameter of the model, and the name under which the restriction speaks of it (None: it does not)."""

    name: str
    parameter: nn.Parameter
    own: str | None


def find_parameters(model: nn.Module, restriction: Restriction) -> list[Found]:
    """Every parameter once, with its name in the restriction: the same, an alias of a tied weight's, or the same
    behind the prefixes that wrappers put before it.

    Raises:
        ConfigError: the restriction trains nothing, or something that the model does not have, or in another shape.
    """
    wanted = {name for name in restriction.names() if restriction.count(name)}
    if not wanted:
        raise ConfigError("the mask selects no coordinate, so there is nothing to train; make one that does")
    by_bare = {bare_name(name): name for name in restriction.names()}
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    found, matched = [], set()
    for name, parameter in model.named_parameters():
        known = set(restriction.names())
        owns = [alias if alias in known else by_bare.get(bare_name(alias)) for alias in aliases[id(parameter)]]
        owns = [own for own in owns if own in wanted]
        matched.update(owns)
        own = owns[0] if owns else None
        if own is not None and tuple(restriction.shape(own)) != tuple(parameter.shape):
            raise ConfigError(
                f"{own}: the mask has shape {tuple(restriction.shape(own))}, the model {tuple(parameter.shape)}; "
                "give the mask of this model"
            )
        found.append(Found(name, parameter, own))
    if missing := sorted(wanted - matched):
        raise ConfigError(
            f"{missing[0]}: the mask trains this tensor ({len(missing)} in all), but the model has no such parameter; "
            f"its names look like {found[0].name!r}"
        )
    return found


class CompactTensor:
    """The trained coordinates of one parameter.

    Attributes:
        name: as the source stores it.
        parameter: the model's; a DTensor under FSDP2, of which only this rank's shard is looked at.
        index: flat positions in this rank's part, ascending, int32 (int64 from 2³¹ elements on); None: all of them.
        values: what torch's optimizer updates: (count,) or, where all of a matrix is trained, of the matrix's shape.
            float32 (float64 for float64 weights): the master of narrower weights, a copy of float32 ones, which saves
            gathering them in every step. Of length 0 before the first step, and where an optimizer updates the weights
            where they lie.
        grad: the accumulated gradient, of the same shape: a view into a buffer, set by `hold`.
        filled: whether there is a gradient since the last step.
        kernels: `deltalens.subnetwork.kernels` where it serves this: part of a tensor on the CPU. Known once placed.
    """

    def __init__(self, found: Found, restriction: Restriction) -> None:
        assert found.own is not None
        self.name, self.parameter = found.own, found.parameter
        weights = local_tensor(self.parameter)
        if not weights.is_contiguous() or not weights.is_floating_point():
            raise ConfigError(f"{self.name}: only contiguous floating-point weights can be trained with a mask")
        self.size = weights.numel()
        self.shape = tuple(weights.shape)
        basis = getattr(restriction, "basis", None)
        self.basis = None if basis is None else torch.from_numpy(basis(self.name)).to(weights.device, torch.float32)
        if self.basis is not None and self.shape[-1] != self.basis.shape[0]:
            raise ConfigError(f"{self.name}: gradients are projected by rows, but its rows are sharded; shard by rows")
        self.index: Tensor | None = None
        if restriction.count(self.name) < self.parameter.numel():
            mask = local_mask(self.name, self.parameter, restriction.dense(self.name))
            positions = torch.from_numpy(np.flatnonzero(mask))
            self.index = positions.to(weights.device, torch.int32 if self.size < 2**31 else torch.int64)
        self.count = self.size if self.index is None else self.index.numel()
        self.dtype = torch.promote_types(weights.dtype, torch.float32)
        self.has_master = weights.dtype != self.dtype
        self.whole_matrix = self.index is None and weights.ndim == 2
        self.values = nn.Parameter(self.nothing(weights.device), requires_grad=False)
        self.grad = self.nothing(weights.device)
        self.filled = False
        self.kernels: Any = None
        self._gather: Callable[[Tensor, bool], np.ndarray] | None = None
        self._version = -1  # torch's count of writes to the weights, after this one's own

    def nothing(self, device: torch.device) -> Tensor:
        """What `values` is while it holds nothing."""
        return torch.empty((0, 0) if self.whole_matrix else 0, dtype=self.dtype, device=device)

    @property
    def compact_shape(self) -> tuple[int, ...]:
        return self.shape if self.whole_matrix else (self.count,)

    @property
    def weights(self) -> Tensor:
        """(size,): this rank's weights, flat, sharing memory."""
        return local_tensor(self.parameter).view(-1)

    def place(self, device: torch.device) -> None:
        """Move what this holds to where the weights are by now; trainers move a model after its optimizer is made."""
        self.index = self.index if self.index is None else self.index.to(device)
        self.basis = self.basis if self.basis is None else self.basis.to(device)
        self.values.data = self.values.data.to(device)
        self.kernels = None
        if self.index is not None and self.index.dtype == torch.int32 and device.type == "cpu":
            from deltalens.subnetwork import kernels

            self.kernels = kernels

    def hold(self, grad: Tensor) -> None:
        """Accumulate into this buffer (count,) from here on."""
        self.grad, self.filled = grad.view(self.compact_shape), False
        self._gather = None
        if self.kernels is not None and self.dtype == torch.float32:
            assert self.index is not None
            self._gather = self.kernels.gatherer(self.index, self.grad, self.size)

    def may_wait(self, gradient: Tensor) -> bool:
        """Whether `collecting` serves a dense gradient, so that several tensors' are collected at once, by threads."""
        return self._gather is not None and self.basis is None and gradient.dtype in _GATHERED

    def collecting(self, gradient: Tensor) -> np.ndarray:
        """The work, for `kernels.gather`, of adding the trained entries of a contiguous dense gradient."""
        assert self._gather is not None
        rows = self._gather(gradient, self.filled)
        self.filled = True
        return rows

    def collect(self, gradient: Tensor) -> None:
        """Add the trained entries of a dense gradient (of this rank's part)."""
        if self.basis is not None:
            gradient = (gradient.to(torch.float32) @ self.basis) @ self.basis.T
        flat, into = gradient.reshape(-1), self.grad.view(-1)
        if self._gather is not None and gradient.dtype in _GATHERED:
            self.kernels.gather([self.collecting(flat)])
        elif self.index is not None and not self.filled and flat.dtype == self.dtype:
            torch.index_select(flat, 0, self.index, out=into)
        else:
            taken = flat if self.index is None else flat.index_select(0, self.index)
            into.add_(taken) if self.filled else into.copy_(taken)
        self.filled = True

    def load(self) -> None:
        """Have the weights in `values`: they are there but for the first time, and where someone else wrote a weight
        since (loaded a checkpoint, say), which then counts.
        """
        flat = self.weights
        if self.index is None and not self.has_master:
            self.values.data = flat.view(self.compact_shape)
        elif self.values.numel() != self.count or self._version != flat._version:
            taken = flat if self.index is None else flat.index_select(0, self.index)
            wide = taken.to(self.dtype).view(self.compact_shape)
            if self.values.numel() == self.count:
                same = self.values.detach().to(taken.dtype).view(-1) == taken
                wide = torch.where(same.view(self.compact_shape), self.values.detach(), wide)
            self.values.data = wide

    def store(self) -> None:
        """Write `values` to the weights, and to nothing else."""
        flat, new = self.weights, self.values.detach().view(-1)
        if self.index is None:
            if self.has_master:
                flat.copy_(new)
        else:
            new = new.to(flat.dtype)
            if self.kernels is not None:
                self.kernels.scatter(flat, self.index, new)
            else:
                bits = _INTEGERS[flat.element_size()]  # faster than bfloat16's own
                flat.view(bits).scatter_(0, self.index.long(), new.view(bits))
        self.stored()

    def stored(self) -> None:
        """The weights are what `values` says: so `load` need not look at them until someone else writes them."""
        self._version = self.weights._version

    @property
    def copied_bytes(self) -> int:
        """Bytes of `values`; 0 where they are the weights themselves."""
        shared = self.values.data_ptr() == self.weights.data_ptr()
        return 0 if shared else self.values.nbytes

    def positions(self) -> Tensor:
        """Flat positions, int64, on the CPU."""
        return torch.arange(self.size) if self.index is None else self.index.long().cpu()

    def packed(self) -> Tensor:
        """The positions as `numpy.packbits` packs them, uint8; of length 0 where all are trained."""
        bits = np.zeros(0 if self.index is None else self.size, np.bool_)
        if self.index is not None:
            bits[self.positions().numpy()] = True
        return torch.from_numpy(np.packbits(bits))


def mover(old: Mapping[str, Any], tensor: CompactTensor) -> Callable[..., Tensor]:
    """Carries a compact tensor from saved positions to those of `tensor`, on top of zeros or of a start."""
    packed, size = old["positions"].cpu().numpy(), tensor.size
    if len(packed) == 0 and tensor.index is None:
        before = after = None
    else:
        bits = np.unpackbits(packed, count=size) if len(packed) else np.ones(size, np.uint8)
        before, after = torch.from_numpy(np.flatnonzero(bits)), tensor.positions()
    if before is None or after is None or torch.equal(before, after):
        return lambda value, start=None: value.reshape(tensor.compact_shape).to(tensor.values.device, copy=True)
    place = torch.searchsorted(before, after).clamp(max=max(0, len(before) - 1))
    kept = before[place] == after if len(before) else torch.zeros(len(after), dtype=torch.bool)
    place = place[kept]

    def move(value: Tensor, start: Tensor | None = None) -> Tensor:
        device = tensor.values.device
        new = (
            torch.zeros(tensor.count, dtype=value.dtype, device=device) if start is None else start.reshape(-1).clone()
        )
        new[kept.to(device)] = value.reshape(-1).to(device)[place.to(device)]
        return new.view(tensor.compact_shape)

    return move
