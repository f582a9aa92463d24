"""Compiled loops on the CPU over a tensor's trained positions: gather a gradient, write weights back, and AdamW on the
weights where they lie. One pass over the positions each; torch takes several, and int64 copies of the positions.

Imported when the first tensor on the CPU is trained with a mask. Accelerators keep to torch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from deltalens.metrics.values import KERNEL, SINGLES, WORDS, widen_word

__all__ = ["adamw", "gather", "places", "scatter"]

PIECE = 1 << 18  # positions that a thread takes at once
ROWS = 8  # tensors, or pieces, that a thread takes at once of many
BLOCK, SPARSE_BLOCK = 128, 64  # positions between gathering and writing back: their cache lines are still near
# Entries to a position, from where the processor no longer guesses what to fetch next: when only reading, and when
# writing back too.
SPARSE_READ, SPARSE = 4, 10
AHEAD = 2 * BLOCK  # positions from those that are read to those that are fetched

# No check before a division, and (by unsigned positions, and by slices) none whether an index counts from the end:
# either would keep the arithmetic from becoming vector instructions.
FAST: dict[str, Any] = {**KERNEL, "error_model": "numpy"}
_INDEX = types.Array(types.uint32, 1, "C", readonly=True)
_INTO = types.float32[::1]
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Call = tuple[Any, ...]  # a kernel and its arguments


@intrinsic
def _prefetch(typing: Any, array: Any, i: Any) -> Any:
    """Have the processor fetch array[i], to write it, while it does other things."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        call = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(call, [pointer, number(1), number(3), number(1)])  # to write, into the nearest cache, data
        return context.get_dummy_value()

    return types.void(array, types.uint64), generate


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit(inline="always", **{**FAST, "cache": False})
def _fetch(dense, index, start, count):  # type: ignore[no-untyped-def]
    coming = index[start : start + count]
    for i in range(coming.size):
        _prefetch(dense, coming[i])  # type: ignore[call-arg]


@njit([types.void(SINGLES, _INDEX, _INTO, types.boolean, types.boolean)], **FAST)
def _gather_singles(dense, index, out, add, sparse):  # type: ignore[no-untyped-def]
    for start in range(0, index.size, BLOCK):
        if sparse:
            _fetch(dense, index, start + AHEAD, BLOCK)
        places, into = index[start : start + BLOCK], out[start : start + BLOCK]
        for i in range(places.size):
            into[i] = into[i] + dense[places[i]] if add else dense[places[i]]


@njit([types.void(WORDS, _INDEX, _INTO, types.boolean, types.boolean)], **FAST)
def _gather_words(dense, index, out, add, sparse):  # type: ignore[no-untyped-def]
    for start in range(0, index.size, BLOCK):
        if sparse:
            _fetch(dense, index, start + AHEAD, BLOCK)
        places, into = index[start : start + BLOCK], out[start : start + BLOCK]
        for i in range(places.size):
            value = widen_word(dense[places[i]])
            into[i] = into[i] + value if add else value


@njit([types.void(t[::1], _INDEX, t[::1]) for t in (types.uint16, types.uint32, types.uint64)], **FAST)
def _scatter(dense, index, values):  # type: ignore[no-untyped-def]
    for i in range(index.size):
        dense[index[i]] = values[i]


@njit([types.void(_INTO, _INDEX, SINGLES, _INTO, _INTO, *[types.float32] * 7, types.boolean)], **FAST)
def _adamw(weights, index, grads, firsts, seconds, keep, rate1, beta2, rate2, size, root, eps, sparse):  # type: ignore[no-untyped-def]
    block = SPARSE_BLOCK if sparse else BLOCK
    new = np.empty(block, np.float32)
    for start in range(0, index.size, block):
        places, g = index[start : start + block], grads[start : start + block]
        m, v = firsts[start : start + block], seconds[start : start + block]
        w = new[: places.size]
        if sparse:
            _fetch(weights, index, start + 2 * block, block)
        for i in range(places.size):
            w[i] = weights[places[i]]
        for i in range(places.size):
            m[i] += rate1 * (g[i] - m[i])
            v[i] = beta2 * v[i] + rate2 * g[i] * g[i]
            w[i] = w[i] * keep - size * m[i] / (np.sqrt(v[i]) * root + eps)
        for i in range(places.size):
            weights[places[i]] = w[i]


@njit([types.void(types.uint64[:, ::1], types.Array(types.float32, 2, "C", readonly=True))], **FAST)
def _adamw_all(rows, numbers):  # type: ignore[no-untyped-def]
    """`_adamw` for each row: addresses of weights, positions, gradient and both moments; how many positions and how
    many weights there are; and which of `numbers`."""
    for weights, at, grad, first, second, count, size, kind in rows:
        keep, rate1, beta2, rate2, length, root, eps = numbers[kind]
        _adamw(
            carray(_pointer(weights), size, np.float32),  # type: ignore[call-arg]
            carray(_pointer(at), count, np.uint32),  # type: ignore[call-arg]
            carray(_pointer(grad), count, np.float32),  # type: ignore[call-arg]
            carray(_pointer(first), count, np.float32),  # type: ignore[call-arg]
            carray(_pointer(second), count, np.float32),  # type: ignore[call-arg]
            keep, rate1, beta2, rate2, length, root, eps, SPARSE * count < size,
        )  # fmt: skip


def places(index: Tensor) -> np.ndarray:
    """Positions (int32, on the CPU) as the loops take them, uint32; shares memory."""
    return index.numpy().view(np.uint32)


def gather(dense: Tensor, at: np.ndarray, out: np.ndarray, *, add: bool) -> None:
    """out ← dense[at], or out ← out + dense[at].

    Args:
        dense: float32 or bfloat16; positions count through it flattened.
        at: from `places`, ascending.
        out: float32, as long as `at`.
    """
    kernel = _gather_words if dense.dtype == torch.bfloat16 else _gather_singles
    values = (_bits(dense) if dense.dtype == torch.bfloat16 else dense.numpy()).reshape(-1)
    sparse = SPARSE_READ * at.size < values.size
    run([(kernel, values, part, into, add, sparse) for part, into in _pieces(at, out)])


def scatter(dense: Tensor, at: np.ndarray, values: Tensor) -> None:
    """dense[at] ← values, as bits. Both flat and of one dtype; `at` from `places`, no position twice."""
    into = _bits(dense)
    run([(_scatter, into, places, part) for places, part in _pieces(at, _bits(values))])
    torch.autograd.graph.increment_version(dense)


Update = tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Any]]


def adamw(tensors: list[Update]) -> None:
    """One step of `torch.optim.AdamW` on weights[index], for each of (weights, index, grad, state, group).

    `weights`: float32, contiguous. `index`: int32 (count,), ascending, flat. `grad`: float32 (count,), contiguous.
    `state`: torch's `step`, `exp_avg` and `exp_avg_sq`. `group`: torch's `lr`, `betas`, `eps` and `weight_decay`.
    """
    torch._foreach_add_([state["step"] for _, _, _, state, _ in tensors], 1)
    # Addresses, and one call for many tensors: to hand each of its arrays to a loop takes as long as its loop.
    rows: list[tuple[int, ...]] = []
    kinds: dict[tuple[int, float], int] = {}
    numbers: list[tuple[float, ...]] = []
    for weights, index, grad, state, group in tensors:
        step = float(state["step"])
        kind = kinds.setdefault((id(group), step), len(numbers))
        if kind == len(numbers):
            (beta1, beta2), lr = group["betas"], float(group["lr"])
            keep, size, root = 1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 / sqrt(1 - beta2**step)
            numbers.append((keep, 1 - beta1, beta2, 1 - beta2, size, root, group["eps"]))
        count, total = index.numel(), weights.numel()
        arrays = index, grad, state["exp_avg"], state["exp_avg_sq"]  # 4 bytes an entry
        # An address tells nothing of what lies there.
        assert all(each.numel() == count and each.element_size() == 4 and each.is_contiguous() for each in arrays)
        assert weights.dtype == torch.float32
        assert weights.is_contiguous()
        first, others = weights.data_ptr(), [each.data_ptr() for each in arrays]
        for start in range(0, count, PIECE):
            at = [address + 4 * start for address in others]
            rows.append((first, *at, min(PIECE, count - start), total, kind))
    table, constants = np.array(rows, np.uint64).reshape(-1, 8), np.array(numbers, np.float32)
    together = len(table) if torch.get_num_threads() == 1 else ROWS
    run([(_adamw_all, table[i : i + together], constants) for i in range(0, len(table), together)])
    torch.autograd.graph.increment_version([weights for weights, *_ in tensors])


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
