"""Compiled loops on the CPU over a tensor's trained positions: gather a gradient, and write weights back.

One pass over the positions each; torch takes several, and int64 copies of the positions. AdamW is in `adamw`.

Imported when the first tensor on the CPU is trained with a mask. Accelerators keep to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from torch import Tensor

from deltalens.metrics.values import widen_word
from deltalens.subnetwork.threads import BODY, CFUNC, FAST, INSIDE, SEEN, instruction, pointer, run, take_row, unpack

__all__ = ["gather", "gatherer", "scatter", "way_of"]

PIECE = 1 << 14  # positions that a thread takes at once: some 20 µs, as the last one is waited for
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

INDEX = types.Array(types.uint32, 1, "C", readonly=True)
INTO = types.float32[::1]


@njit(**INSIDE)
def stream(words, start, stop):  # type: ignore[no-untyped-def]
    """Reads every word from `start` to `stop`; returns a number that depends on all, so that none is left out."""
    seen = np.uint32(0)
    part = words[start:stop]
    for i in range(part.size):
        seen |= part[i]
    return seen


@instruction
def prefetch(typing: Any, array: Any, i: Any) -> Any:
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


@njit(**INSIDE)
def fetch(dense, coming):  # type: ignore[no-untyped-def]
    for i in range(coming.size):
        prefetch(dense, np.uint64(coming[i]))


_GATHER = [types.uint32(*[types.uint64] * 5, types.int64, types.boolean)]


@njit(_GATHER, **FAST)
def _gather_singles(dense, at, out, count, size, way, add):  # type: ignore[no-untyped-def]
    """Addresses of entries, positions and where they go to; how many positions, and how many entries."""
    entries = carray(pointer(dense), size, np.float32)
    index = carray(pointer(at), count, np.uint32)
    result = carray(pointer(out), count, np.float32)
    words = entries.view(np.uint32)
    in_order, fetched = way == IN_ORDER, way == FETCHED
    seen, done = np.uint32(0), np.uint64(index[0])
    for start in range(0, index.size, BLOCK):
        places, into = index[start : start + BLOCK], result[start : start + BLOCK]
        if fetched:
            fetch(entries, index[start + AHEAD : start + AHEAD + BLOCK])
        if in_order:
            last = np.uint64(places[places.size - 1])
            seen |= stream(words, done, last)
            done = last
        for i in range(places.size):
            into[i] = into[i] + entries[places[i]] if add else entries[places[i]]
    return seen


@njit(_GATHER, **FAST)
def _gather_words(dense, at, out, count, size, way, add):  # type: ignore[no-untyped-def]
    words = carray(pointer(dense), size, np.uint16)
    index = carray(pointer(at), count, np.uint32)
    result = carray(pointer(out), count, np.float32)
    in_order, fetched = way == IN_ORDER, way == FETCHED
    seen, done = np.uint32(0), np.uint64(index[0])
    for start in range(0, index.size, BLOCK):
        places, into = index[start : start + BLOCK], result[start : start + BLOCK]
        if fetched:
            fetch(words, index[start + AHEAD : start + AHEAD + BLOCK])
        if in_order:
            last = np.uint64(places[places.size - 1])
            seen |= stream(words, done, last)
            done = last
        for i in range(places.size):
            value = widen_word(words[places[i]])
            into[i] = into[i] + value if add else value
    return seen


@njit([types.uint64(t[::1], INDEX, t[::1], types.int64) for t in (types.uint16, types.uint32, types.uint64)], **FAST)
def _scatter(dense, index, values, way):  # type: ignore[no-untyped-def]
    in_order, fetched = way == IN_ORDER, way == FETCHED
    seen, done = np.uint64(0), np.uint64(index[0])
    for start in range(0, index.size, BLOCK):
        places, new = index[start : start + BLOCK], values[start : start + BLOCK]
        if fetched:
            fetch(dense, index[start + AHEAD : start + AHEAD + BLOCK])
        if in_order:
            last = np.uint64(places[places.size - 1])
            seen |= np.uint64(stream(dense, done, last))
            done = last
        for i in range(places.size):
            dense[places[i]] = new[i]
    return seen


@cfunc(BODY, **CFUNC)
def _gather_rows(work):  # type: ignore[no-untyped-def]
    """Each row: addresses of entries, positions and where they go to; how many positions, and how many entries; how
    they are reached; whether to add; bytes of an entry."""
    handed, rows, _ = unpack(work)
    seen, i = np.uint32(0), take_row(handed)
    while i < len(rows):
        dense, at, out, count, size, way, add, width = rows[i]
        if width == 2:
            seen |= _gather_words(dense, at, out, count, size, np.int64(way), add != 0)
        else:
            seen |= _gather_singles(dense, at, out, count, size, np.int64(way), add != 0)
        i = take_row(handed)
    handed[SEEN] = seen


@cfunc(BODY, **CFUNC)
def _scatter_rows(work):  # type: ignore[no-untyped-def]
    """Each row: addresses of entries, positions and new entries; how many positions, and how many entries; how they
    are reached; bytes of an entry."""
    handed, rows, _ = unpack(work)
    seen, i = np.uint64(0), take_row(handed)
    while i < len(rows):
        dense, at, new, count, size, way, width = rows[i]
        index = carray(pointer(at), count, np.uint32)
        if width == 2:
            entries, values = carray(pointer(dense), size, np.uint16), carray(pointer(new), count, np.uint16)
            seen |= _scatter(entries, index, values, np.int64(way))
        elif width == 4:
            singles, replaced = carray(pointer(dense), size, np.uint32), carray(pointer(new), count, np.uint32)
            seen |= _scatter(singles, index, replaced, np.int64(way))
        else:
            doubles, others = carray(pointer(dense), size, np.uint64), carray(pointer(new), count, np.uint64)
            seen |= _scatter(doubles, index, others, np.int64(way))
        i = take_row(handed)
    handed[SEEN] = seen


def gatherer(index: Tensor, out: Tensor, size: int) -> Callable[[Tensor, bool], np.ndarray]:
    """A function of (dense, add) that returns the rows for `gather`, which do out ← dense[index], or with `add`
    out ← out + dense[index]. `dense`, contiguous, must outlive them.

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
        way = max(IN_ORDER, way_of(size, count))
    rows = np.array(
        [(0, at + 4 * s, into + 4 * s, min(PIECE, count - s), size, way, 0, 0) for s in range(0, count, PIECE)],
        np.uint64,
    ).reshape(-1, 8)

    def make(dense: Tensor, add: bool) -> np.ndarray:
        assert dense.numel() == size
        assert dense.is_contiguous()
        rows[:, 0], rows[:, 6], rows[:, 7] = dense.data_ptr(), add, dense.element_size()
        return rows

    return make


def gather(rows: Sequence[np.ndarray]) -> None:
    """Gather what `gatherer`s' functions made rows of, no tensor twice."""
    run(_gather_rows, rows[0] if len(rows) == 1 else np.concatenate(rows))


def scatter(dense: Tensor, index: Tensor, values: Tensor) -> None:
    """dense[index] ← values, as bits. Both flat, contiguous and of one dtype; `index` int32, no position twice."""
    count, size, width = index.numel(), dense.numel(), dense.element_size()
    assert values.numel() == count
    assert values.dtype == dense.dtype
    assert index.dtype == torch.int32
    assert all(each.is_contiguous() for each in (dense, index, values))
    if count:
        way = way_of(size, count, width)
        into, at, new = dense.data_ptr(), index.data_ptr(), values.data_ptr()
        rows = [
            (into, at + 4 * s, new + width * s, min(PIECE, count - s), size, way, width) for s in range(0, count, PIECE)
        ]
        run(_scatter_rows, np.array(rows, np.uint64))
    torch.autograd.graph.increment_version(dense)


def way_of(size: int, count: int, width: int = 4) -> int:
    """How `count` of `size` entries of `width` bytes are reached where none of them is in a cache."""
    if size < IN_ORDER_FROM * count:
        return PLAIN
    way = FETCHED if size >= FETCHED_FROM * count else _faster_way()
    # Where a line has many entries, most lines hold a position: the processor fetches them by itself.
    return PLAIN if width == 2 and way == IN_ORDER else way


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
