"""Compiled loops on the CPU over a tensor's trained positions: gather a gradient, write weights back, and AdamW on the
weights where they lie. One pass over the positions each; torch takes several, and int64 copies of the positions.

Imported when the first tensor on the CPU is trained with a mask. Accelerators keep to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from math import sqrt
from operator import is_
from time import perf_counter
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from deltalens.metrics.values import KERNEL, SINGLES, widen_word

__all__ = ["AdamW", "gatherer", "scatter"]

PIECE = 1 << 18  # positions that a thread takes at once
ROWS = 8  # tensors, or pieces, that a thread takes at once of many
BLOCK = 32  # positions between gathering and writing back: their cache lines are still near
AHEAD = 4 * BLOCK  # positions from those that are reached to those that are asked for

# What is done about the memory that positions jump to, by the entries to a position:
PLAIN = 0  # nothing: most lines hold a position, and the processor fetches them by itself
IN_ORDER = 1  # all entries are read in order first, which the processor fetches ahead, whereas it waits for jumps
FETCHED = 2  # the positions' lines are asked for ahead, as most hold no position
IN_ORDER_FROM, FETCHED_FROM = 8, 40  # between them whichever is faster here: a Zen 4 reads in order, a Xeon fetches
TRIED, TRIED_STEPS = 1 << 24, 40  # float32 entries (beyond a core's own caches); steps between positions are shorter
CACHED = 1 << 22  # elements of a gradient up to which it is in a cache when it comes; there the lines are fetched
CACHED_FETCHED_FROM = 10

# No check before a division, and (by unsigned positions, and by slices) none whether an index counts from the end:
# either would keep the arithmetic from becoming vector instructions.
FAST: dict[str, Any] = {**KERNEL, "error_model": "numpy"}
_INDEX = types.Array(types.uint32, 1, "C", readonly=True)
_INTO = types.float32[::1]
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Call = tuple[Any, ...]  # a kernel and its arguments


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit(inline="always", **{**FAST, "cache": False})
def _stream(words, start, stop):  # type: ignore[no-untyped-def]
    """Reads every word from `start` to `stop`; returns a number that depends on all, so that none is left out."""
    seen = np.uint32(0)
    part = words[start:stop]
    for i in range(part.size):
        seen |= part[i]
    return seen


@intrinsic
def _prefetch(typing: Any, array: Any, i: Any) -> Any:
    """Have the processor fetch array[i] into its second cache while it does other things.

    The nearest one can wait for a dozen lines only; this one waits for several times as many.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        call = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(call, [pointer, number(0), number(2), number(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return types.void(array, types.uint64), generate


@njit(inline="always", **{**FAST, "cache": False})
def _fetch(dense, coming):  # type: ignore[no-untyped-def]
    for i in range(coming.size):
        _prefetch(dense, np.uint64(coming[i]))  # type: ignore[call-arg]


_GATHER = [types.uint32(*[types.uint64] * 5, types.int64, types.boolean)]


@njit(_GATHER, **FAST)
def _gather_singles(dense, at, out, count, size, way, add):  # type: ignore[no-untyped-def]
    """Addresses of entries, positions and where they go to; how many positions, and how many entries."""
    entries = carray(_pointer(dense), size, np.float32)  # type: ignore[call-arg]
    index = carray(_pointer(at), count, np.uint32)
    result = carray(_pointer(out), count, np.float32)
    words = entries.view(np.uint32)
    stream, fetch = way == IN_ORDER, way == FETCHED
    seen, done = np.uint32(0), np.uint64(index[0])
    for start in range(0, index.size, BLOCK):
        places, into = index[start : start + BLOCK], result[start : start + BLOCK]
        if fetch:
            _fetch(entries, index[start + AHEAD : start + AHEAD + BLOCK])
        if stream:
            last = np.uint64(places[places.size - 1])
            seen |= _stream(words, done, last)
            done = last
        for i in range(places.size):
            into[i] = into[i] + entries[places[i]] if add else entries[places[i]]
    return seen


@njit(_GATHER, **FAST)
def _gather_words(dense, at, out, count, size, way, add):  # type: ignore[no-untyped-def]
    words = carray(_pointer(dense), size, np.uint16)  # type: ignore[call-arg]
    index = carray(_pointer(at), count, np.uint32)
    result = carray(_pointer(out), count, np.float32)
    stream, fetch = way == IN_ORDER, way == FETCHED
    seen, done = np.uint32(0), np.uint64(index[0])
    for start in range(0, index.size, BLOCK):
        places, into = index[start : start + BLOCK], result[start : start + BLOCK]
        if fetch:
            _fetch(words, index[start + AHEAD : start + AHEAD + BLOCK])
        if stream:
            last = np.uint64(places[places.size - 1])
            seen |= _stream(words, done, last)
            done = last
        for i in range(places.size):
            value = widen_word(words[places[i]])
            into[i] = into[i] + value if add else value
    return seen


@njit([types.uint64(t[::1], _INDEX, t[::1], types.int64) for t in (types.uint16, types.uint32, types.uint64)], **FAST)
def _scatter(dense, index, values, way):  # type: ignore[no-untyped-def]
    stream, fetch = way == IN_ORDER, way == FETCHED
    seen, done = np.uint64(0), np.uint64(index[0])
    for start in range(0, index.size, BLOCK):
        places, new = index[start : start + BLOCK], values[start : start + BLOCK]
        if fetch:
            _fetch(dense, index[start + AHEAD : start + AHEAD + BLOCK])
        if stream:
            last = np.uint64(places[places.size - 1])
            seen |= np.uint64(_stream(dense, done, last))
            done = last
        for i in range(places.size):
            dense[places[i]] = new[i]
    return seen


@njit([types.uint32(_INTO, _INDEX, SINGLES, _INTO, _INTO, *[types.float32] * 7, types.int64)], **FAST)
def _adamw(weights, index, grads, firsts, seconds, keep, rate1, beta2, rate2, size, root, eps, way):  # type: ignore[no-untyped-def]
    new = np.empty(BLOCK, np.float32)
    words = weights.view(np.uint32)
    stream, fetch = way == IN_ORDER, way == FETCHED
    seen, done = np.uint32(0), np.uint64(index[0])
    for start in range(0, index.size, BLOCK):
        places, g = index[start : start + BLOCK], grads[start : start + BLOCK]
        m, v = firsts[start : start + BLOCK], seconds[start : start + BLOCK]
        w = new[: places.size]
        if fetch:
            _fetch(weights, index[start + AHEAD : start + AHEAD + BLOCK])
        if stream:
            last = np.uint64(places[places.size - 1])
            seen |= _stream(words, done, last)
            done = last
        for i in range(places.size):
            w[i] = weights[places[i]]
        for i in range(places.size):
            m[i] += rate1 * (g[i] - m[i])
            v[i] = beta2 * v[i] + rate2 * g[i] * g[i]
            w[i] = w[i] * keep - size * m[i] / (np.sqrt(v[i]) * root + eps)
        for i in range(places.size):
            weights[places[i]] = w[i]
    return seen


@njit([types.uint32(types.uint64[:, ::1], types.Array(types.float32, 2, "C", readonly=True))], **FAST)
def _adamw_all(rows, numbers):  # type: ignore[no-untyped-def]
    """`_adamw` for each row: addresses of weights, positions, gradient and both moments; how many positions and how
    many weights there are; and which of `numbers`."""
    seen = np.uint32(0)
    for weights, at, grad, first, second, count, size, way, kind in rows:
        keep, rate1, beta2, rate2, length, root, eps = numbers[kind]
        seen |= _adamw(
            carray(_pointer(weights), size, np.float32),  # type: ignore[call-arg]
            carray(_pointer(at), count, np.uint32),  # type: ignore[call-arg]
            carray(_pointer(grad), count, np.float32),  # type: ignore[call-arg]
            carray(_pointer(first), count, np.float32),  # type: ignore[call-arg]
            carray(_pointer(second), count, np.float32),  # type: ignore[call-arg]
            keep, rate1, beta2, rate2, length, root, eps, np.int64(way),
        )  # fmt: skip
    return seen


@njit([types.float32[::1](types.uint64[::1])], **FAST)
def _count_up(addresses):  # type: ignore[no-untyped-def]
    """Adds 1 to the float32 at each address; returns them."""
    out = np.empty(addresses.size, np.float32)
    for i in range(addresses.size):
        step = carray(_pointer(addresses[i]), 1, np.float32)  # type: ignore[call-arg]
        step[0] += np.float32(1)
        out[i] = step[0]
    return out


def gatherer(index: Tensor, out: Tensor, size: int) -> Callable[[Tensor, bool], None]:
    """A function of (dense, add) that does out ← dense[index], or out ← out + dense[index] with `add`.

    Args:
        index: int32 (count,), ascending; it and `out` must outlive the function, which knows their addresses.
        out: float32 (count,), contiguous.
        size: elements of `dense`, which is float32 or bfloat16; positions count through it flattened.
    """
    count = index.numel()
    assert out.numel() == count
    assert index.dtype == torch.int32
    assert out.dtype == torch.float32
    assert index.is_contiguous()
    assert out.is_contiguous()
    # Addresses, as to hand arrays to a loop takes longer than the loop over a small tensor.
    at, into = index.data_ptr(), out.data_ptr()
    if size <= CACHED:
        way = FETCHED if size >= CACHED_FETCHED_FROM * count else PLAIN
    else:
        way = max(IN_ORDER, _way(size, count))
    pieces = [
        (at + 4 * start, into + 4 * start, min(PIECE, count - start), size, way) for start in range(0, count, PIECE)
    ]

    def gather(dense: Tensor, add: bool) -> None:
        assert dense.numel() == size
        dense = dense.contiguous()
        first, kernel = dense.data_ptr(), _gather_words if dense.dtype == torch.bfloat16 else _gather_singles
        if len(pieces) == 1:
            kernel(first, *pieces[0], add)
        else:
            run([(kernel, first, *piece, add) for piece in pieces])

    return gather


def scatter(dense: Tensor, index: Tensor, values: Tensor) -> None:
    """dense[index] ← values, as bits. Both flat and of one dtype; `index` int32, no position twice."""
    into, at = _bits(dense), index.numpy().view(np.uint32)
    if at.size:
        way = _way(into.size, at.size)
        if way == IN_ORDER and dense.element_size() == 2:  # lines of so many entries hold a position mostly
            way = PLAIN
        run([(_scatter, into, places, part, way) for places, part in _pieces(at, _bits(values))])
    torch.autograd.graph.increment_version(dense)


Update = tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Any]]


class AdamW:
    """`torch.optim.AdamW` on weights[index] of several tensors, step by step.

    Their addresses are kept: to look at each tensor in each step takes longer than the loop over a small one.
    """

    def __init__(self, tensors: Sequence[Update]) -> None:
        """
        Args:
            tensors: (weights, index, grad, state, group) each. `weights`: float32, contiguous. `index`: int32 (count,),
                ascending, flat. `grad`: float32 (count,), contiguous. `state`: torch's `step`, `exp_avg` and
                `exp_avg_sq`. `group`: torch's `lr`, `betas`, `eps` and `weight_decay`.
        """
        self.tensors = list(tensors)
        self._parts = list(chain.from_iterable(tensors))
        rows: list[tuple[int, ...]] = []
        for i, (weights, index, grad, state, _) in enumerate(self.tensors):
            count, total = index.numel(), weights.numel()
            moments = state["exp_avg"], state["exp_avg_sq"]
            # An address tells nothing of what lies there.
            assert all(each.numel() == count and each.dtype == torch.float32 for each in (grad, *moments))
            assert all(each.is_contiguous() for each in (index, grad, *moments))
            assert index.dtype == torch.int32
            assert state["step"].dtype == torch.float32
            way = _way(total, count)
            arrays = [each.data_ptr() for each in (index, grad, *moments)]
            for start in range(0, count, PIECE):
                at = [address + 4 * start for address in arrays]
                rows.append((0, *at, min(PIECE, count - start), total, way, i))
        self._table = np.array(rows, np.uint64).reshape(-1, 9)
        self._owner = self._table[:, -1].astype(np.int64)  # of each row
        self._steps = np.array([state["step"].data_ptr() for _, _, _, state, _ in self.tensors], np.uint64)

    def serves(self, tensors: Sequence[Update]) -> bool:
        """Whether these are the very tensors that this was made for."""
        parts = list(chain.from_iterable(tensors))
        return len(parts) == len(self._parts) and all(map(is_, parts, self._parts))

    def step(self) -> None:
        """Update the weights and the state."""
        all_weights = [weights for weights, *_ in self.tensors]
        assert all(weights.dtype == torch.float32 and weights.is_contiguous() for weights in all_weights)
        sizes = np.array([weights.numel() for weights in all_weights], np.uint64)
        assert (sizes[self._owner] == self._table[:, 6]).all()
        counts = _count_up(self._steps).tolist()
        kinds: dict[tuple[int, float], int] = {}
        numbers: list[tuple[float, ...]] = []
        kind_of = []
        for (*_, group), step in zip(self.tensors, counts, strict=True):
            kind = kinds.setdefault((id(group), step), len(numbers))
            if kind == len(numbers):
                (beta1, beta2), lr = group["betas"], float(group["lr"])
                keep, size, root = 1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 / sqrt(1 - beta2**step)
                numbers.append((keep, 1 - beta1, beta2, 1 - beta2, size, root, group["eps"]))
            kind_of.append(kind)
        table, constants = self._table, np.array(numbers, np.float32)
        table[:, 0] = np.array([weights.data_ptr() for weights in all_weights], np.uint64)[self._owner]
        table[:, -1] = np.array(kind_of, np.uint64)[self._owner]
        together = len(table) if torch.get_num_threads() == 1 else ROWS
        run([(_adamw_all, table[i : i + together], constants) for i in range(0, len(table), together)])
        torch.autograd.graph.increment_version(all_weights)


def _way(size: int, count: int) -> int:
    """How `count` of `size` entries are reached where none of them is in a cache."""
    if size < IN_ORDER_FROM * count:
        return PLAIN
    return FETCHED if size >= FETCHED_FROM * count else _faster_way()


@cache
def _faster_way() -> int:
    """IN_ORDER or FETCHED, whichever gathers one entry in twenty faster on this processor: tried once (0.1 s)."""
    dense = np.ones(TRIED, np.float32)
    index = np.cumsum(np.random.default_rng(0).integers(1, TRIED_STEPS, TRIED // (TRIED_STEPS // 2))).astype(np.uint32)
    index = index[index < TRIED]
    out = np.empty(index.size, np.float32)
    seconds = dict.fromkeys((IN_ORDER, FETCHED), np.inf)
    for way in (IN_ORDER, FETCHED) * 3:  # in turns, the least of three: other work only ever adds
        start = perf_counter()
        _gather_singles(dense.ctypes.data, index.ctypes.data, out.ctypes.data, index.size, TRIED, way, False)
        seconds[way] = min(seconds[way], perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)


def run(queue: list[Call]) -> None:
    """Run kernels on as many threads as torch has; they let go of the interpreter."""
    if len(queue) == 1:
        kernel, *arguments = queue[0]
        kernel(*arguments)
        return
    rest = iter(queue)  # hands every call to one thread

    def work() -> None:
        for kernel, *arguments in rest:
            kernel(*arguments)

    helpers = min(torch.get_num_threads(), len(queue)) - 1
    started = [_pool().submit(work) for _ in range(helpers)]
    work()
    for one in started:
        one.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="deltalens")


def _pieces(*arrays: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    size = arrays[0].size
    if size <= PIECE:
        return [arrays]
    return [tuple(array[start : start + PIECE] for array in arrays) for start in range(0, size, PIECE)]


def _bits(flat: Tensor) -> np.ndarray:
    size = flat.element_size()
    return flat.view(_BITS[size]).numpy().view(_UNSIGNED[size])
