"""Random and adversarial float64 matrices, and LAPACK's answers for them."""

from collections.abc import Iterator
from math import ceil

import numpy as np
import scipy.linalg

FAMILIES = ("gaussian", "clustered", "deficient", "condition_1e8", "tall", "wide", "row", "column", "duplicated",
            "decaying")  # fmt: skip


def orthonormal(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((n, k)))[0]


def with_spectrum(rng: np.random.Generator, m: int, n: int, values: np.ndarray) -> np.ndarray:
    return (orthonormal(rng, m, values.size) * values) @ orthonormal(rng, n, values.size).T


def matrix(family: str, seed: int) -> np.ndarray:
    """(m, n) float64 of one family; scales from 1e-4 to 1e4."""
    rng = np.random.default_rng([FAMILIES.index(family), seed])
    m, n = (int(v) for v in rng.integers(24, 96, 2))
    d = min(m, n)
    scale = 10.0 ** rng.uniform(-4, 4)
    if family == "gaussian":
        return scale * rng.standard_normal((m, n))
    if family == "clustered":  # a few bunches of singular values that agree to 1e-10
        levels = np.repeat(2.0 ** -np.arange(ceil(d / 8)), 8)[:d]
        return scale * with_spectrum(rng, m, n, levels * (1 + 1e-10 * rng.standard_normal(d)))
    if family == "deficient":
        r = int(rng.integers(1, d))
        return scale * (rng.standard_normal((m, r)) @ rng.standard_normal((r, n)))
    if family == "condition_1e8":
        return scale * with_spectrum(rng, m, n, np.logspace(0, -8, d))
    if family == "tall":
        return scale * rng.standard_normal((int(rng.integers(400, 900)), int(rng.integers(2, 40))))
    if family == "wide":
        return scale * rng.standard_normal((int(rng.integers(2, 40)), int(rng.integers(400, 900))))
    if family == "row":
        return scale * rng.standard_normal((1, n))
    if family == "column":
        return scale * rng.standard_normal((m, 1))
    if family == "duplicated":  # rows come in threes
        return scale * np.repeat(rng.standard_normal((ceil(m / 3), n)), 3, axis=0)
    return scale * with_spectrum(rng, m, n, 0.7 ** np.arange(d))


def every_matrix(each: int = 20) -> Iterator[tuple[str, np.ndarray]]:
    for family in FAMILIES:
        for seed in range(each):
            yield f"{family}-{seed}", matrix(family, seed)


def lapack_svd(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U (m, d), σ (d,), V (n, d) by QR iteration (gesvd), not the divide and conquer that the package uses."""
    u, s, vt = scipy.linalg.svd(values, full_matrices=False, lapack_driver="gesvd")
    return u, s, vt.T


def has_gap(s: np.ndarray, k: int, share: float = 1e-2) -> bool:
    """Whether the k-th subspace is well determined."""
    return k == s.size or s[k - 1] - s[k] > share * s[k - 1] > 1e-9 * s[0]
