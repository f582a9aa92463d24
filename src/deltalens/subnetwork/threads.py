"""Compiled loops over rows of work, on the threads that torch has.

torch's threads wait for work by turning in a loop for some milliseconds after each operation, and take half of two
cores from any other thread meanwhile. So what is done between torch's operations is done by these very threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from deltalens.metrics.values import KERNEL

__all__ = ["BODY", "CFUNC", "FAST", "INSIDE", "SEEN", "instruction", "pointer", "run", "take_row", "unpack"]

# No check before a division, and (by unsigned positions, and by slices) none whether an index counts from the end:
# either would keep the arithmetic from becoming vector instructions.
FAST: dict[str, Any] = {**KERNEL, "error_model": "numpy"}
INSIDE: dict[str, Any] = {**FAST, "cache": False, "inline": "always"}

# A loop that `run` takes is one of numba's `cfunc`s of this signature. It is handed seven uint64: the next row, that
# nobody has taken; address, number and width of the rows; address and number of the numbers; and a place to write to.
BODY = types.void(types.voidptr)
CFUNC: dict[str, Any] = {"cache": True, "boundscheck": False, "error_model": "numpy", "nopython": True}
_Handed = ctypes.c_uint64 * 7
SEEN = 6  # a loop writes there what depends on all that it read, so that no reading is left out


def instruction(generator: Callable[..., Any]) -> Any:
    """numba's `intrinsic`, for a type checker of the arguments that a loop gives it."""
    return intrinsic(generator)


@instruction
def pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@instruction
def take_row(typing: Any, handed: Any) -> Any:
    """The number of a row that no other thread has; from the number of rows on there is none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, context.get_constant(types.uint64, 1), "monotonic")

    return types.uint64(handed), generate


@njit(**INSIDE)
def unpack(work):  # type: ignore[no-untyped-def]
    """What a loop is handed: all of it, for `take_row` and `SEEN`; the rows; the numbers, seven each."""
    handed = carray(work, 7, np.uint64)
    shape: Any = (np.int64(handed[2]), np.int64(handed[3]))
    rows = carray(pointer(handed[1]), shape, np.uint64)
    sevens: Any = (np.int64(handed[5]), 7)
    numbers = carray(pointer(handed[4]), sevens, np.float32)
    return handed, rows, numbers


def run(body: Any, rows: np.ndarray, numbers: np.ndarray | None = None) -> None:
    """Run a loop over `rows` (uint64, two-dimensional) on as many threads as torch has, without the interpreter's lock.

    Args:
        body: numba's `cfunc` of signature `BODY`. Every thread calls it; it takes rows until there are none.
        rows: uint64 (rows, columns), contiguous.
        numbers: float32 (n, 7), contiguous, for the loop to look up.
    """
    assert rows.dtype == np.uint64
    assert rows.flags.c_contiguous
    looked_up = (0, 0)
    if numbers is not None:
        assert numbers.dtype == np.float32
        assert numbers.flags.c_contiguous
        assert numbers.shape[1] == 7
        looked_up = _address(numbers), len(numbers)
    handed = _Handed(0, _address(rows), *rows.shape, *looked_up)
    threads, address = torch.get_num_threads(), ctypes.addressof(handed)
    if min(threads, len(rows)) <= 1:
        body.ctypes(address)
    elif (parallel := _openmp()) is not None:
        parallel(body.address, address, threads, 0)
    else:
        started = [_pool().submit(body.ctypes, address) for _ in range(min(threads, len(rows)) - 1)]
        body.ctypes(address)
        for one in started:
            one.result()


def _address(array: Any) -> int:
    # NumPy's own `.ctypes.data` takes six times as long, as long as gathering from a small tensor.
    return ctypes.addressof(ctypes.c_char.from_buffer(array)) if array.size else 0


@cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel` (function, its argument, threads, flags) of the OpenMP that torch has loaded, GNU's or one that
    serves what GNU's compilers make, as LLVM's does; None where there is none. Checked against torch 2.13 on Linux.
    """
    try:
        parallel: Any = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="deltalens")
