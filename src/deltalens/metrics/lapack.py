"""All eigenvalues and some eigenvectors of a symmetric matrix, from one tridiagonalisation; Gram matrices; Q factors.

`numpy.linalg.eigh` turns every eigenvector back, `scipy.linalg.eigh(subset_by_index=…)` leaves out the other
eigenvalues and holds the interpreter lock (SciPy 1.17). LAPACK's own three steps, called through the addresses that
SciPy exports for Cython, need a quarter less time than the former, and ctypes lets go of the lock, so that two
matrices are factorised at once.

BLAS's syrk adds a block's Gram matrix up in place; `total += A.T @ A` makes it, mirrors it and adds it, half as long
again at d = 1536 (blocks of 700 rows, NumPy 2.4). NumPy's `qr` works in float64 whatever it is given, and its `qr` and
`svd` copy what they are given, which at d = 8192 is half a gigabyte each time.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numba.extending import get_cython_function_address

__all__ = [
    "SymmetricEigen",
    "add_gram",
    "leading_eigenvectors",
    "leave_r_factor",
    "mirror",
    "orthonormalised",
    "svd_values_in_place",
]

BLOCK = 64  # columns a blocked Householder step takes at most; sizes the workspaces
CROWDED = 290  # mean number of neighbours among k vectors from which MRRR costs less than inverse iteration
ORTHONORMAL = 1e-12  # error of inner products beyond which vectors from inverse iteration are made again by MRRR


@cache
def _routine(library: str, name: str, arguments: int) -> Any:
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)
    return prototype(get_cython_function_address(f"scipy.linalg.{library}", name))


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
    _routine("cython_lapack", name, len(arguments) + 1)(*held, ctypes.byref(info))
    assert info.value >= 0, (name, info.value)
    if info.value > 0:
        raise np.linalg.LinAlgError(f"{name} did not converge (info {info.value})")


def add_gram(total: np.ndarray, block: np.ndarray) -> None:
    """total += blockᵀ·block in the upper triangle, which is what `SymmetricEigen` looks at; see `mirror`.

    Args:
        total: (d, d) float64 or float32, rows contiguous.
        block: (b, d) of the same kind, rows or columns contiguous.
    """
    (b, d), by_rows = block.shape, block.flags.c_contiguous
    assert total.shape == (d, d)
    assert total.dtype == block.dtype
    assert total.flags.c_contiguous
    assert by_rows or block.flags.f_contiguous
    if b == 0:
        return
    single = total.dtype == np.float32
    one = ctypes.byref(ctypes.c_float(1) if single else ctypes.c_double(1))
    width, length, between = (ctypes.byref(ctypes.c_int(size)) for size in (d, b, d if by_rows else b))
    # Fortran counts by columns: there these are the lower triangle and (d, b), or (b, d) where columns are contiguous.
    held = total.ctypes.data, block.ctypes.data
    _routine("cython_blas", "ssyrk" if single else "dsyrk", 10)(
        b"L", b"N" if by_rows else b"T", width, length, one, held[1], between, one, held[0], width
    )


def mirror(total: np.ndarray) -> np.ndarray:
    """The upper triangle of a (d, d) matrix copied to the lower one, in place; returns it."""
    d = total.shape[0]
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        total[stop:, start:stop] = total[start:stop, stop:].T
        corner = total[start:stop, start:stop]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
    return total


def orthonormalised(block: np.ndarray) -> np.ndarray:
    """The Q factor (d, k) of a float32 (d, k) block, d ≥ k."""
    d, k = block.shape
    assert d >= k
    assert block.dtype == np.float32
    columns = np.array(block.T, order="C")  # LAPACK's (d, k), column by column
    factors, work = np.empty(k, np.float32), np.empty(k * BLOCK, np.float32)
    _call("sgeqrf", d, k, columns, d, factors, work, work.size)
    _call("sorgqr", d, k, k, columns, d, factors, work, work.size)
    return np.ascontiguousarray(columns.T)


def leave_r_factor(rows: np.ndarray) -> None:
    """In place of (m, d) float64 rows, m ≥ d, contiguous: their R factor in the first d; the others hold nothing."""
    m, d = rows.shape
    assert m >= d
    assert rows.dtype == np.float64
    assert rows.flags.c_contiguous
    factors, work = np.empty(d), np.empty(d * BLOCK)
    _call("dgelqf", d, m, rows, d, factors, work, work.size)  # of the transpose, as Fortran sees it: L there is Rᵀ
    for i in range(1, d):
        rows[i, :i] = 0


def svd_values_in_place(matrix: np.ndarray) -> np.ndarray:
    """All singular values, descending, of a (m, d) float64 matrix, m ≥ d, contiguous, which is overwritten.

    Raises:
        numpy.linalg.LinAlgError: LAPACK did not converge.
    """
    m, d = matrix.shape
    assert m >= d
    assert matrix.dtype == np.float64
    assert matrix.flags.c_contiguous
    values, integers, work = np.empty(d), np.empty(8 * d, np.int32), np.empty((3 * d + m) * BLOCK)
    unused = np.empty(1)
    _call("dgesdd", b"N", d, m, matrix, d, values, unused, 1, unused, 1, work, work.size, integers)
    return values


class SymmetricEigen:
    """Every eigenvalue of a symmetric matrix, and the eigenvectors at either end that are asked for.

    `numpy.linalg.eigvalsh` takes a third more time than the eigenvalues alone at n = 576 (NumPy 2.4).

    Attributes:
        values: (n,) float64, descending.
    """

    def __init__(self, matrix: np.ndarray) -> None:
        """Args:
            matrix: (n, n) float64, symmetric, of which the upper triangle is looked at; overwritten, and held until
                `let_go`.

        Raises:
            numpy.linalg.LinAlgError: LAPACK did not converge.
        """
        n = matrix.shape[0]
        assert matrix.shape == (n, n)
        assert matrix.dtype == np.float64
        assert matrix.flags.c_contiguous
        self._matrix = matrix  # from here on: the reflectors
        self._diagonal, self._off, self._factors = np.empty(n), np.zeros(n), np.empty(max(n - 1, 1))
        if n < 2:
            self._ascending = matrix.reshape(-1).copy()
        else:
            work = np.empty(n * BLOCK)
            _call("dsytrd", b"L", n, matrix, n, self._diagonal, self._off, self._factors, work, work.size)
            self._ascending = self._diagonal.copy()
            _call("dsterf", n, self._ascending, self._off.copy())
        self.values = self._ascending[::-1].copy()

    def leading(self, k: int) -> np.ndarray:
        """The eigenvectors (n, k) of the k largest eigenvalues: orthonormal columns, in the order of `values`.

        A view of rows in the opposite order: to be copied, once the matrix is let go, for what is to be fast with it.
        The tridiagonal matrix's vectors come from inverse iteration: of a fifth of n, in half the time that divide and
        conquer needs for all n.

        Raises:
            numpy.linalg.LinAlgError: LAPACK did not converge.
        """
        n = self.values.size
        return self._vectors(n - k, n)

    def last(self, k: int) -> np.ndarray:
        """The same of the k smallest eigenvalues, in the order of `values`."""
        return self._vectors(0, k)

    def let_go(self) -> None:
        """Of the matrix: there are no more vectors to be had."""
        self._matrix = np.empty((0, 0))

    def _vectors(self, start: int, stop: int) -> np.ndarray:
        n, k = self.values.size, stop - start
        if n < 2:
            return np.ones((n, k))
        vectors = self._of_tridiagonal(start, stop)
        work = np.empty(k * BLOCK)
        _call("dormtr", b"L", b"L", b"N", n, k, self._matrix, n, self._factors, vectors, n, work, work.size)
        return vectors[::-1].T

    def _of_tridiagonal(self, start: int, stop: int) -> np.ndarray:
        """The tridiagonal matrix's eigenvectors (k, n) of the eigenvalues start … stop, ascending, as rows."""
        n, k, diagonal, off = self.values.size, stop - start, self._diagonal, self._off
        small = np.finfo(np.float64).eps ** 2 * np.abs(diagonal[1:] * diagonal[:-1]) + np.finfo(np.float64).tiny
        coupled = off[: n - 1] ** 2 > small  # else it is several matrices, whose values would have to be told apart
        if coupled.all() and self._crowding(start, stop) < CROWDED:
            vectors, work, integers = np.empty((k, n)), np.empty(5 * n), np.empty(n, np.int32)
            block, ends, failed = np.ones(n, np.int32), np.full(n, n, np.int32), np.empty(k, np.int32)
            wanted = self._ascending[start:stop].copy()
            try:
                _call("dstein", n, diagonal, off, k, wanted, block, ends, vectors, n, work, integers, failed)
            except np.linalg.LinAlgError:
                pass  # a cluster of eigenvalues too close for inverse iteration
            else:
                # Beside eigenvalues that are all noise (of a matrix of low rank) the iteration may lose orthogonality.
                if np.abs(vectors @ vectors.T - np.eye(k)).max() < ORTHONORMAL:
                    return vectors
        return self._by_mrrr(start, stop)

    def _crowding(self, start: int, stop: int) -> float:
        """How many vectors, on average, dstein makes each one orthogonal to: those whose eigenvalues are joined to its
        own by gaps under 1e-3 of the norm. In one bunch that is k² products, which outweigh MRRR from k = 290 on."""
        wanted = self._ascending[start:stop]
        apart = np.flatnonzero(np.diff(wanted) > 1e-3 * np.abs(self._ascending).max())
        sizes = np.diff(np.concatenate([[0], apart + 1, [wanted.size]]))
        return float((sizes**2).sum() / wanted.size)

    def _by_mrrr(self, start: int, stop: int) -> np.ndarray:
        """The same by MRRR (Dhillon & Parlett 2004), which takes three times as long where eigenvalues lie apart."""
        n, k = self.values.size, stop - start
        vectors, found, work = np.empty((k, n)), np.empty(n), np.empty(18 * n)
        support, integers, unused = np.empty(2 * k, np.int32), np.empty(10 * n, np.int32), np.zeros(1)
        counted, robust = np.zeros(1, np.int32), np.ones(1, np.int32)
        diagonal, off = self._diagonal.copy(), self._off.copy()  # overwritten
        _call("dstemr", b"V", b"I", n, diagonal, off, unused, unused, start + 1, stop, counted, found, vectors, n, k,
              support, robust, work, work.size, integers, integers.size)  # fmt: skip
        assert counted[0] == k, (int(counted[0]), k)
        return vectors


def leading_eigenvectors(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every eigenvalue (n,), descending, and the eigenvectors (n, k) of the k largest; see `SymmetricEigen`."""
    eigen = SymmetricEigen(matrix)
    return eigen.values, np.ascontiguousarray(eigen.leading(k))
