"""AdamW on the trained positions of several tensors: compiled loops on the CPU, one pass over weights and moments.

Float32 weights are updated where they lie; bfloat16 ones are rounded from their float32 masters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import sqrt
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from deltalens.metrics.values import SINGLES, narrow_single
from deltalens.subnetwork import kernels
from deltalens.subnetwork.kernels import AHEAD, BLOCK, FETCHED, IN_ORDER, INDEX, INTO, fetch, stream
from deltalens.subnetwork.threads import BODY, CFUNC, FAST, INSIDE, SEEN, pointer, run, take_row, unpack

__all__ = ["AdamW", "Update"]

_NUMBERS = [types.float32] * 7


class Update(NamedTuple):
    """What a step reads and writes of one tensor.

    Attributes:
        weights: float32 or bfloat16, contiguous.
        master: float32 (count,), contiguous, for bfloat16 weights; None for float32 ones.
        positions: int32 (count,), ascending, contiguous; in the flattened weights.
        grad: float32 (count,), contiguous.
        state: torch's `step`, `exp_avg` and `exp_avg_sq`.
        group: torch's `lr`, `betas`, `eps` and `weight_decay`.
    """

    weights: Tensor
    master: Tensor | None
    positions: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]


@njit(**INSIDE)
def _move(w, g, m, v, keep, rate1, beta2, rate2, size, root, eps):  # type: ignore[no-untyped-def]
    for i in range(w.size):
        m[i] += rate1 * (g[i] - m[i])
        v[i] = beta2 * v[i] + rate2 * g[i] * g[i]
        w[i] = w[i] * keep - size * m[i] / (np.sqrt(v[i]) * root + eps)


@njit([types.uint32(INTO, INDEX, SINGLES, INTO, INTO, *_NUMBERS, types.int64)], **FAST)
def _adamw_singles(weights, index, grads, firsts, seconds, keep, rate1, beta2, rate2, size, root, eps, way):  # type: ignore[no-untyped-def]
    new = np.empty(BLOCK, np.float32)
    words = weights.view(np.uint32)
    in_order, fetched = way == IN_ORDER, way == FETCHED
    seen, done = np.uint32(0), np.uint64(index[0])
    for start in range(0, index.size, BLOCK):
        places, g = index[start : start + BLOCK], grads[start : start + BLOCK]
        m, v = firsts[start : start + BLOCK], seconds[start : start + BLOCK]
        w = new[: places.size]
        if fetched:
            fetch(weights, index[start + AHEAD : start + AHEAD + BLOCK])
        if in_order:
            last = np.uint64(places[places.size - 1])
            seen |= stream(words, done, last)
            done = last
        for i in range(places.size):
            w[i] = weights[places[i]]
        _move(w, g, m, v, keep, rate1, beta2, rate2, size, root, eps)
        for i in range(places.size):
            weights[places[i]] = w[i]
    return seen


@njit([types.void(types.uint16[::1], INTO, INDEX, SINGLES, INTO, INTO, *_NUMBERS, types.int64)], **FAST)
def _adamw_words(words, masters, index, grads, firsts, seconds, keep, rate1, beta2, rate2, size, root, eps, way):  # type: ignore[no-untyped-def]
    new = np.empty(BLOCK, np.uint16)
    for start in range(0, index.size, BLOCK):
        places, g = index[start : start + BLOCK], grads[start : start + BLOCK]
        m, v = firsts[start : start + BLOCK], seconds[start : start + BLOCK]
        w, rounded = masters[start : start + BLOCK], new[: places.size]
        if way == FETCHED:
            fetch(words, index[start + AHEAD : start + AHEAD + BLOCK])
        _move(w, g, m, v, keep, rate1, beta2, rate2, size, root, eps)
        for i in range(places.size):
            rounded[i] = np.uint16(narrow_single(w[i]))
        for i in range(places.size):
            words[places[i]] = rounded[i]


@cfunc(BODY, **CFUNC)
def _adamw_rows(work):  # type: ignore[no-untyped-def]
    """Each row: addresses of weights, master (0: none), positions, gradient and both moments; how many positions
    and how many weights there are; how they are reached; and which of `numbers`."""
    handed, rows, numbers = unpack(work)
    seen, i = np.uint32(0), take_row(handed)
    while i < len(rows):
        weights, master, at, grad, first, second, count, size, way, kind = rows[i]
        keep, rate1, beta2, rate2, length, root, eps = numbers[kind]
        index = carray(pointer(at), count, np.uint32)
        g = carray(pointer(grad), count, np.float32)
        m = carray(pointer(first), count, np.float32)
        v = carray(pointer(second), count, np.float32)
        if master:
            words = carray(pointer(weights), size, np.uint16)
            w = carray(pointer(master), count, np.float32)
            _adamw_words(words, w, index, g, m, v, keep, rate1, beta2, rate2, length, root, eps, np.int64(way))
        else:
            w = carray(pointer(weights), size, np.float32)
            seen |= _adamw_singles(w, index, g, m, v, keep, rate1, beta2, rate2, length, root, eps, np.int64(way))
        i = take_row(handed)
    handed[SEEN] = seen


@njit([types.float32[::1](types.uint64[::1])], **FAST)
def _count_up(addresses):  # type: ignore[no-untyped-def]
    """Adds 1 to the float32 at each address; returns them."""
    out = np.empty(addresses.size, np.float32)
    for i in range(addresses.size):
        step = carray(pointer(addresses[i]), 1, np.float32)
        step[0] += np.float32(1)
        out[i] = step[0]
    return out


class AdamW:
    """`torch.optim.AdamW` on weights[index] of several tensors, step by step.

    Their addresses are kept: to look at each tensor in each step takes longer than the loop over a small one.
    """

    def __init__(self, tensors: Sequence[Update]) -> None:
        self.tensors = list(tensors)
        self._parts = list(chain.from_iterable(tensors))
        rows: list[tuple[int, ...]] = []
        for i, one in enumerate(self.tensors):
            count, total = one.positions.numel(), one.weights.numel()
            moments = one.state["exp_avg"], one.state["exp_avg_sq"]
            # An address tells nothing of what lies there.
            assert all(each.numel() == count and each.dtype == torch.float32 for each in (one.grad, *moments))
            assert all(each.is_contiguous() for each in (one.positions, one.grad, *moments))
            assert one.positions.dtype == torch.int32
            assert one.state["step"].dtype == torch.float32
            way = kernels.way_of(total, count, one.weights.element_size())
            arrays = [each.data_ptr() for each in (one.positions, one.grad, *moments)]
            for start in range(0, count, kernels.PIECE):
                at = [address + 4 * start for address in arrays]
                rows.append((0, 4 * start, *at, min(kernels.PIECE, count - start), total, way, i))
        self._table = np.array(rows, np.uint64).reshape(-1, 10)
        self._owner = self._table[:, -1].astype(np.int64)  # of each row
        self._starts = self._table[:, 1].copy()  # of each row, in bytes from its tensor's first
        self._steps = np.array([one.state["step"].data_ptr() for one in self.tensors], np.uint64)

    def serves(self, tensors: Sequence[tuple[Any, ...]]) -> bool:
        """Whether these are the very tensors that this was made for."""
        parts = list(chain.from_iterable(tensors))
        return len(parts) == len(self._parts) and all(map(is_, parts, self._parts))

    def step(self) -> None:
        """Update the weights, the masters and the state."""
        weights = [one.weights for one in self.tensors]
        masters = np.array([_address_of_master(one) for one in self.tensors], np.uint64)
        assert all(each.is_contiguous() for each in weights)
        sizes = np.array([each.numel() for each in weights], np.uint64)
        assert (sizes[self._owner] == self._table[:, 7]).all()
        counts = _count_up(self._steps).tolist()
        kinds: dict[tuple[int, float], int] = {}
        numbers: list[tuple[float, ...]] = []
        kind_of = []
        for one, step in zip(self.tensors, counts, strict=True):
            group = one.group
            kind = kinds.setdefault((id(group), step), len(numbers))
            if kind == len(numbers):
                (beta1, beta2), lr = group["betas"], float(group["lr"])
                keep, size, root = 1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 / sqrt(1 - beta2**step)
                numbers.append((keep, 1 - beta1, beta2, 1 - beta2, size, root, group["eps"]))
            kind_of.append(kind)
        table, constants = self._table, np.array(numbers, np.float32)
        # Weights and masters may have been moved, or exchanged for others, since the last step.
        table[:, 0] = np.array([each.data_ptr() for each in weights], np.uint64)[self._owner]
        table[:, 1] = np.where(masters[self._owner] > 0, masters[self._owner] + self._starts, np.uint64(0))
        table[:, -1] = np.array(kind_of, np.uint64)[self._owner]
        run(_adamw_rows, table, constants)
        torch.autograd.graph.increment_version(weights)


def _address_of_master(one: Update) -> int:
    """0 where there is none."""
    if one.master is None:
        assert one.weights.dtype == torch.float32
        return 0
    assert one.weights.dtype == torch.bfloat16
    assert one.master.dtype == torch.float32
    assert one.master.numel() == one.positions.numel()
    assert one.master.is_contiguous()
    return one.master.data_ptr()
