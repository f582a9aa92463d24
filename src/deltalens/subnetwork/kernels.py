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
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from deltalens.metrics.values import KERNEL, SINGLES, WORDS, widen_word

__all__ = ["adamw", "gather", "scatter"]

PIECE = 1 << 18  # positions that a thread takes at once
BLOCK = 128  # positions between gathering and writing back: their cache lines are still near
SPARSE = 10  # weights to a position, from where the processor no longer guesses what to fetch next

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


@njit([types.void(SINGLES, _INDEX, _INTO, types.boolean)], **FAST)
def _gather_singles(dense, index, out, add):  # type: ignore[no-untyped-def]
    for i in range(index.size):
        out[i] = out[i] + dense[index[i]] if add else dense[index[i]]


@njit([types.void(WORDS, _INDEX, _INTO, types.boolean)], **FAST)
def _gather_words(dense, index, out, add):  # type: ignore[no-untyped-def]
    for i in range(index.size):
        value = widen_word(dense[index[i]])
        out[i] = out[i] + value if add else value


@njit([types.void(t[::1], _INDEX, t[::1]) for t in (types.uint16, types.uint32, types.uint64)], **FAST)
def _scatter(dense, index, values):  # type: ignore[no-untyped-def]
    for i in range(index.size):
        dense[index[i]] = values[i]


@njit([types.void(_INTO, _INDEX, SINGLES, _INTO, _INTO, *[types.float32] * 7, types.boolean)], **FAST)
def _adamw(weights, index, grads, firsts, seconds, keep, rate1, beta2, rate2, size, root, eps, sparse):  # type: ignore[no-untyped-def]
    new = np.empty(BLOCK, np.float32)
    for start in range(0, index.size, BLOCK):
        places, g = index[start : start + BLOCK], grads[start : start + BLOCK]
        m, v = firsts[start : start + BLOCK], seconds[start : start + BLOCK]
        w = new[: places.size]
        if sparse:
            coming = index[start + BLOCK : start + 2 * BLOCK]
            for i in range(coming.size):
                _prefetch(weights, coming[i])  # type: ignore[call-arg]
        for i in range(places.size):
            w[i] = weights[places[i]]
        for i in range(places.size):
            m[i] += rate1 * (g[i] - m[i])
            v[i] = beta2 * v[i] + rate2 * g[i] * g[i]
            w[i] = w[i] * keep - size * m[i] / (np.sqrt(v[i]) * root + eps)
        for i in range(places.size):
            weights[places[i]] = w[i]


def gather(dense: Tensor, index: Tensor, out: Tensor, *, add: bool) -> None:
    """out ← dense[index], or out ← out + dense[index].

    Args:
        dense: flat, contiguous, float32 or bfloat16.
        index: int32, ascending.
        out: float32, as long as `index`.
    """
    kernel = _gather_words if dense.dtype == torch.bfloat16 else _gather_singles
    values = _bits(dense) if dense.dtype == torch.bfloat16 else dense.numpy()
    run([(kernel, values, at, into, add) for at, into in _pieces(_positions(index), out.numpy())])


def scatter(dense: Tensor, index: Tensor, values: Tensor) -> None:
    """dense[index] ← values, as bits. Both of one dtype; `index` int32, no position twice."""
    into = _bits(dense)
    run([(_scatter, into, at, part) for at, part in _pieces(_positions(index), _bits(values))])
    torch.autograd.graph.increment_version(dense)


def adamw(tensors: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Any]]]) -> None:
    """One step of `torch.optim.AdamW` on weights[index], for each of (weights, index, grad, state, group).

    `weights`: flat float32. `index`: int32 (count,), ascending. `grad`: float32 (count,). `state`: torch's `step`,
    `exp_avg` and `exp_avg_sq`. `group`: torch's `lr`, `betas`, `eps` and `weight_decay`.
    """
    torch._foreach_add_([state["step"] for _, _, _, state, _ in tensors], 1)
    calls: list[Call] = []
    for weights, index, grad, state, group in tensors:
        (beta1, beta2), lr, step = group["betas"], float(group["lr"]), float(state["step"])
        keep, size, root = 1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 / sqrt(1 - beta2**step)
        flat, sparse = weights.numpy(), SPARSE * len(index) < len(weights)
        numbers = keep, 1 - beta1, beta2, 1 - beta2, size, root, group["eps"], sparse
        parts = _pieces(_positions(index), grad.numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy())
        calls += [(_adamw, flat, *arrays, *numbers) for arrays in parts]
    run(calls)
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


def _positions(index: Tensor) -> np.ndarray:
    return index.numpy().view(np.uint32)


def _bits(flat: Tensor) -> np.ndarray:
    size = flat.element_size()
    return flat.view(_BITS[size]).numpy().view(_UNSIGNED[size])
