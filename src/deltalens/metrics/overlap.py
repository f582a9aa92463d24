"""What the updates of several runs share: joint counts, correlation of magnitudes, leading subspaces.

Definitions: METRICS.md, "Between runs". What rounding makes of them is in `overlap_null`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from deltalens.metrics.blocks import block_slices, cut, is_tall
from deltalens.metrics.coordinate_kernels import BINS, NONFINITE
from deltalens.metrics.lapack import add_gram, leading_eigenvectors, mirror
from deltalens.metrics.overlap_kernels import count_magnitudes, join_runs, mark_run, subtract, word_magnitudes
from deltalens.metrics.values import word_values

__all__ = [
    "SUBSPACE",
    "Joint",
    "RunCounts",
    "Subspaces",
    "histogram_energy",
    "leading_subspaces",
    "magnitude_correlation",
    "measure_overlap",
    "subspace_similarities",
    "subspace_similarity",
]

SUBSPACE = 16  # K of Sim_K
BAND = 1 << 14  # coordinates taken at a time: the differences of a few runs stay in the cache
SINGLE_GAP = 1e-4  # (λ_K − λ_{K+1})/λ₁ below which a float32 Gram matrix does not separate the two
RANK = 1e-12  # λ/λ₁ below which a direction is rounding noise
DENSE = 48  # shorter sides up to which all eigenvectors cost less than a few


@dataclass(frozen=True, slots=True)
class RunCounts:
    """One run's coordinates with |Δ| > τ and Δ ≠ 0, and ‖Δ‖²."""

    visible: int
    nonzero: int
    energy: float


@dataclass(frozen=True, slots=True)
class Joint:
    """Two runs A, B of one source.

    visible, nonzero: coordinates that both changed (|Δ| > τ, Δ ≠ 0); visible_same, nonzero_same: of these, with one
    sign. dot: Σ ΔA·ΔB over all coordinates. moments: over the coordinates that both changed visibly, Σ|ΔA|, Σ|ΔB|,
    ΣΔA², ΣΔB², Σ|ΔA||ΔB|.
    """

    visible: int
    visible_same: int
    nonzero: int
    nonzero_same: int
    dot: float
    moments: tuple[float, ...]


def measure_overlap(
    source: np.ndarray, runs: Sequence[np.ndarray], thresholds: Sequence[float]
) -> tuple[np.ndarray, list[RunCounts], list[Joint], int]:
    """Counts of every run and of every pair of runs, in one pass over all of them.

    Args:
        source, runs: flat and prepared by `values.prepare` (uint16 bf16 words, or floats), of one length.
        thresholds: τ of each run, rounded by `values.round_threshold`.

    Returns:
        int64[32768] histogram of |W| by its upper 16 bits; a `RunCounts` a run; a `Joint` for each of
        `itertools.combinations(runs, 2)`, in that order; the number of coordinates at which a Δ is NaN or infinite,
        summed over runs: where it is not 0 the rest means nothing.
    """
    pairs = list(combinations(range(len(runs)), 2))
    histogram = np.zeros(BINS, np.int64)
    counts, energies = np.zeros((len(runs), 2), np.int64), np.zeros(len(runs))
    joint, sums = np.zeros((len(pairs), 4), np.int64), np.zeros((len(pairs), 6))
    taus, nonfinite = np.array(thresholds, np.float64), 0
    wide = any(side.dtype == np.float64 for side in (source, *runs))
    for start in range(0, source.size, BAND):
        part = slice(start, min(start + BAND, source.size))
        size = part.stop - part.start
        if start == 0 or size < BAND:
            deltas = np.zeros((len(runs), -(-size // 64) * 64), np.float64 if wide else np.float32)
            marks = np.empty((len(runs), 3, deltas.shape[1] // 64), np.uint64)
        for i, run in enumerate(runs):
            subtract(source[part], run[part], deltas[i, :size])
            energy = mark_run(deltas[i], taus[i], marks[i], counts[i])
            energies[i] += energy
            if not np.isfinite(energy):
                nonfinite += size - int(np.isfinite(deltas[i, :size]).sum())
        join_runs(deltas, taus, marks, joint, sums)
    step = 1 << 30  # the word counters are 32 bits wide
    count = word_magnitudes if source.dtype == np.uint16 else count_magnitudes
    for start in range(0, source.size, step):
        count(source[start : start + step], histogram)
    return (
        histogram,
        [RunCounts(int(c[0]), int(c[1]), float(e)) for c, e in zip(counts, energies, strict=True)],
        [
            Joint(int(c[0]), int(c[1]), int(c[2]), int(c[3]), float(s[0]), tuple(map(float, s[1:])))
            for c, s in zip(joint, sums, strict=True)
        ],
        nonfinite,
    )


def histogram_energy(histogram: np.ndarray) -> float:
    """‖W‖² from the int64[32768] histogram of finite magnitudes; exact for bf16, else to a bin's width (0.8 %)."""
    return float((histogram[:NONFINITE] * word_values(np.arange(NONFINITE)).astype(np.float64) ** 2).sum())


def magnitude_correlation(count: np.ndarray, moments: Sequence[np.ndarray]) -> np.ndarray:
    """Pearson correlation of |ΔA| and |ΔB| from sums over `count` coordinates, in the order of `Joint.moments`.

    Arrays of any one shape (or numbers); NaN where undefined: nothing in common, or magnitudes that are all alike.
    """
    count, (a1, b1, a2, b2, ab) = np.asarray(count, float), moments
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_a, spread_b = a2 - a1**2 / count, b2 - b1**2 / count
        defined = (count > 0) & (spread_a > 1e-12 * a2) & (spread_b > 1e-12 * b2)
        spread = np.sqrt(np.where(defined, spread_a * spread_b, np.nan))
        return np.asarray(np.clip((ab - a1 * b1 / count) / spread, -1.0, 1.0))


@dataclass(frozen=True, slots=True)
class Subspaces:
    """The leading left and right singular vectors of an update.

    left: (m, r) float32, right: (n, r) float32, orthonormal columns; r = min(K, m, n, rank of the update).
    """

    left: np.ndarray
    right: np.ndarray


def leading_subspaces(before: np.ndarray, after: np.ndarray, k: int = SUBSPACE) -> Subspaces:
    """The top `k` singular vectors of after − before, from the smaller Gram matrix by ARPACK's Lanczos iteration.

    The Gram matrix is float32 unless the gap below the k-th eigenvalue is too small for it (`SINGLE_GAP`); then it is
    made again in float64. ARPACK is asked for a relative accuracy of 1e-7, and LAPACK answers where it gives up.

    Args:
        before, after: (m, n) matrices prepared by `values.prepare`.
        k: dimensions; fewer come back where the update has fewer.
    """
    width = min(before.shape)
    wanted = min(k, width)
    kind: type = np.float32
    values, vectors, separate = _leading(_gram(before, after, kind), wanted)
    if not separate:
        kind = np.float64
        values, vectors, _ = _leading(_gram(before, after, kind), wanted)
    rank = int(np.count_nonzero(values > RANK * values[0])) if values[0] > 0 else 0
    short = np.ascontiguousarray(vectors[:, :rank], np.float32)
    long = np.empty((max(before.shape), rank), np.float32)
    if rank:
        turn: np.ndarray = vectors[:, :rank].astype(kind)
        for part, block in _blocks(before, after, kind):
            long[part] = block @ turn
        long /= np.sqrt(np.einsum("mk,mk->k", long, long, dtype=np.float64)).astype(np.float32)
    left, right = (long, short) if is_tall(before.shape) else (short, long)
    return Subspaces(left, right)


def _blocks(before: np.ndarray, after: np.ndarray, kind: type) -> Iterator[tuple[slice, np.ndarray]]:
    """(slice, block (b, d) of Δ) along the longer side."""
    exact = np.float64 if np.float64 in (before.dtype, after.dtype) else np.float32
    for part in block_slices(before.shape):
        ours, theirs = cut(before, part), cut(after, part)
        out = np.empty(ours.shape, exact)
        subtract(ours.reshape(-1), theirs.reshape(-1), out.reshape(-1))
        yield part, (out if is_tall(before.shape) else out.T).astype(kind, copy=False)


def _gram(before: np.ndarray, after: np.ndarray, kind: type) -> np.ndarray:
    """c·ΔᵀΔ or c·ΔΔᵀ, the smaller, summed in `kind`, as float64 (d, d); the scalar c keeps the squares of tiny updates
    inside float32's range."""
    total = np.zeros((min(before.shape),) * 2, kind)
    scale = 0.0
    for _, block in _blocks(before, after, kind):
        if scale == 0.0 and (largest := float(np.abs(block).max(initial=0.0))) > 0.0:
            scale = 2.0 ** -np.frexp(largest)[1]
        block *= kind(scale)
        add_gram(total, block)
    return mirror(total).astype(np.float64, copy=False)


def _leading(gram: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """(eigenvalues (k,) over the trace, vectors (d, k), whether the gap below is wide enough for a float32 matrix)."""
    d = gram.shape[0]
    size = float(np.trace(gram))
    if size == 0.0:
        return np.zeros(k), np.zeros((d, k)), True
    scaled = gram / size
    more = min(k + 1, d)
    values = vectors = None
    if d > DENSE:
        try:
            start = np.random.default_rng(d).standard_normal(d)
            values, vectors = eigsh(scaled, k=more, tol=1e-7, v0=start, which="LA")
            order = np.argsort(values)[::-1]
            values, vectors = values[order], vectors[:, order]
        except ArpackNoConvergence:
            values = None
    if values is None or vectors is None:
        values, vectors = leading_eigenvectors(scaled, more)
    below = float(values[k]) if k < d else -np.inf
    separate = float(values[k - 1]) - below > SINGLE_GAP * float(values[0])
    return np.maximum(values[:k], 0.0), np.ascontiguousarray(vectors[:, :k]), separate


def subspace_similarity(a: np.ndarray, b: np.ndarray) -> tuple[float | None, int]:
    """Sim_K = ‖AᵀB‖²_F / K of two bases (size, r), with K = min of the two r; None where K is 0. Returns it and K.

    1 for one and the same subspace, K/size on average for independent ones. Where one update has fewer directions than
    the other, only as many of the leading ones are compared.
    """
    return subspace_similarities([a, b])[0]


def subspace_similarities(bases: Sequence[np.ndarray | None]) -> list[tuple[float | None, int]]:
    """`subspace_similarity` of each of `itertools.combinations(bases, 2)`, by one product; (None, 0) beside a None."""
    held = [base for base in bases if base is not None]
    if len(held) < 2:
        return [(None, 0)] * (len(bases) * (len(bases) - 1) // 2)
    joined = np.concatenate(held, axis=1, dtype=np.float64)
    squares = (joined.T @ joined) ** 2
    ranks = [0 if base is None else base.shape[1] for base in bases]
    starts = np.concatenate([[0], np.cumsum(ranks)])
    found: list[tuple[float | None, int]] = []
    for a, b in combinations(range(len(bases)), 2):
        k = min(ranks[a], ranks[b])
        block = squares[starts[a] : starts[a] + k, starts[b] : starts[b] + k]
        found.append((float(block.sum() / k) if k else None, k))
    return found
