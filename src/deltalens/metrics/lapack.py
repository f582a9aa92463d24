"""All eigenvalues and the leading eigenvectors of a symmetric matrix, from one tridiagonalisation.

`numpy.linalg.eigh` turns every eigenvector back, `scipy.linalg.eigh(subset_by_index=…)` leaves out the other
eigenvalues and holds the interpreter lock (SciPy 1.17). LAPACK's own three steps, called through the addresses that
SciPy exports for Cython, need a quarter less time than the former, and ctypes lets go of the lock, so that two
matrices are factorised at once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numba.extending import get_cython_function_address

__all__ = ["all_eigenvalues", "all_singular_values_few_vectors", "leading_eigenvectors"]

BLOCK = 64  # columns a blocked Householder step takes at most; sizes the workspaces
ORTHONORMAL = 1e-12  # error of inner products beyond which vectors from inverse iteration are made again by MRRR


@cache
def _routine(name: str, arguments: int) -> Any:
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)
    return prototype(get_cython_function_address("scipy.linalg.cython_lapack", name))


def _call(name: str, *arguments: bytes | int | np.ndarray) -> None:
    """Call a LAPACK routine; integers go by reference and `info` is added at the end.

    Raises:
        numpy.linalg.LinAlgError: the routine did not converge.
    """
    info = ctypes.c_int(0)
    held: list[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            held.append(argument.ctypes.data)
        else:
            held.append(argument if isinstance(argument, bytes) else ctypes.byref(ctypes.c_int(argument)))
    _routine(name, len(arguments) + 1)(*held, ctypes.byref(info))
    assert info.value >= 0, (name, info.value)
    if info.value > 0:
        raise np.linalg.LinAlgError(f"{name} did not converge (info {info.value})")


def all_eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Every eigenvalue (n,), descending, of a symmetric float64 matrix (n, n), which is overwritten.

    `numpy.linalg.eigvalsh` takes a third more time at n = 576 (NumPy 2.4).

    Raises:
        numpy.linalg.LinAlgError: LAPACK did not converge.
    """
    return _tridiagonalised(matrix)[0][::-1].copy()


def leading_eigenvectors(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every eigenvalue and the eigenvectors of the `k` largest.

    The tridiagonal matrix's k vectors come from inverse iteration: of a fifth of n, in half the time that divide and
    conquer needs for all n.

    Args:
        matrix: (n, n) float64, symmetric; overwritten.
        k: number of eigenvectors.

    Returns:
        eigenvalues (n,), descending, and eigenvectors (n, k), orthonormal columns in the same order.

    Raises:
        numpy.linalg.LinAlgError: LAPACK did not converge.
    """
    n = matrix.shape[0]
    values, diagonal, off, reflectors = _tridiagonalised(matrix)
    if n < 2:
        return values, np.ones((n, k))
    top = _top_of_tridiagonal(diagonal, off, values, k)
    work = np.empty(k * BLOCK)
    _call("dormtr", b"L", b"L", b"N", n, k, matrix, n, reflectors, top, n, work, work.size)
    return values[::-1].copy(), np.ascontiguousarray(top[::-1].T)


def _tridiagonalised(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All eigenvalues (n,), ascending; diagonal and off-diagonal (n,) of the tridiagonal matrix, the last of these
    unused; and the reflectors' factors, the reflectors being left in `matrix`.
    """
    n = matrix.shape[0]
    assert matrix.shape == (n, n)
    assert matrix.dtype == np.float64
    assert matrix.flags.c_contiguous
    if n < 2:
        return matrix.reshape(-1).copy(), matrix.reshape(-1).copy(), np.zeros(n), np.empty(0)
    diagonal, off, reflectors = np.empty(n), np.zeros(n), np.empty(n - 1)
    work = np.empty(n * BLOCK)
    _call("dsytrd", b"L", n, matrix, n, diagonal, off, reflectors, work, work.size)
    values = diagonal.copy()
    _call("dsterf", n, values, off.copy())
    return values, diagonal, off, reflectors


def _top_of_tridiagonal(diagonal: np.ndarray, off: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """The eigenvectors (k, n) of the k largest eigenvalues, ascending, as rows.

    Args:
        diagonal, off: (n,) float64 each, the last of `off` unused; overwritten.
        values: (n,) all eigenvalues, ascending.
        k: how many.
    """
    n = diagonal.size
    small = np.finfo(np.float64).eps ** 2 * np.abs(diagonal[1:] * diagonal[:-1]) + np.finfo(np.float64).tiny
    if (off[: n - 1] ** 2 > small).all():  # else it is several matrices, whose values would have to be told apart
        top, work, integers = np.empty((k, n)), np.empty(5 * n), np.empty(n, np.int32)
        block, ends, failed = np.ones(n, np.int32), np.full(n, n, np.int32), np.empty(k, np.int32)
        try:
            _call("dstein", n, diagonal, off, k, values[n - k :].copy(), block, ends, top, n, work, integers, failed)
        except np.linalg.LinAlgError:
            pass  # a cluster of eigenvalues too close for inverse iteration
        else:
            # Beside eigenvalues that are all noise (of a matrix of low rank) the iteration may lose orthogonality.
            if np.abs(top @ top.T - np.eye(k)).max() < ORTHONORMAL:
                return top
    return _top_by_mrrr(diagonal, off, k)


def _top_by_mrrr(diagonal: np.ndarray, off: np.ndarray, k: int) -> np.ndarray:
    """The same by MRRR (Dhillon & Parlett 2004), which takes three times as long."""
    n = diagonal.size
    top, found, work = np.empty((k, n)), np.empty(n), np.empty(18 * n)
    support, integers, unused = np.empty(2 * k, np.int32), np.empty(10 * n, np.int32), np.zeros(1)
    counted, robust = np.zeros(1, np.int32), np.ones(1, np.int32)
    _call("dstemr", b"V", b"I", n, diagonal, off, unused, unused, n - k + 1, n, counted, found, top, n, k, support,
          robust, work, work.size, integers, integers.size)  # fmt: skip
    assert counted[0] == k, (int(counted[0]), k)
    return top


def all_singular_values_few_vectors(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every singular value, and the right singular vectors of the `k` largest, from one bidiagonalisation.

    The values are those of LAPACK's dqds, accurate down to the smallest. The vectors are eigenvectors of BᵀB, B being
    the bidiagonal factor: for values within 1e-2 of the largest they are as good as those of a full decomposition.

    Args:
        matrix: (m, n) float64, m ≥ n.
        k: number of vectors.

    Returns:
        values (n,), descending, and vectors (n, k), orthonormal columns in the same order.

    Raises:
        numpy.linalg.LinAlgError: LAPACK did not converge.
    """
    m, n = matrix.shape
    assert m >= n
    assert matrix.dtype == np.float64
    if n < 2:
        return np.linalg.norm(matrix, axis=0), np.ones((n, k))
    columns = np.array(matrix.T, order="C")  # LAPACK's (m, n), column by column
    diagonal, off = np.empty(n), np.zeros(n)
    left, right, work = np.empty(n), np.empty(n), np.empty((m + n) * BLOCK)
    _call("dgebrd", m, n, columns, m, diagonal, off, left, right, work, work.size)
    values, rest, none = diagonal.copy(), off.copy(), np.zeros(1)
    _call("dbdsqr", b"U", n, 0, 0, 0, values, rest, none, 1, none, 1, none, 1, np.empty(4 * n))
    squares = diagonal**2
    squares[1:] += off[: n - 1] ** 2
    coupling = np.zeros(n)
    coupling[: n - 1] = diagonal[: n - 1] * off[: n - 1]
    top = _top_of_tridiagonal(squares, coupling, values[::-1] ** 2, k)
    _call("dormbr", b"P", b"L", b"N", n, k, m, columns, m, right, top, n, work, work.size)
    return values, np.ascontiguousarray(top[::-1].T)
