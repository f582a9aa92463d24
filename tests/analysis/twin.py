"""A second, slow way to every column of a row: whole matrices in float64, full decompositions, sorts.

It shares nothing with the package but the definitions of METRICS.md.
"""

from fractions import Fraction
from math import ceil, floor
from typing import Any

import ml_dtypes
import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

BF16 = ml_dtypes.bfloat16
_WORDS = np.arange(1 << 16, dtype=np.uint16)
GRID = np.unique(_WORDS[(_WORDS & 0x7F80) != 0x7F80].view(BF16).astype(np.float64))  # finite, ascending, one zero


def ceil_of(share: float, count: int) -> int:
    return ceil(Fraction(str(share)) * count)


def rank_of(share: float, d: int) -> int:
    return max(1, floor(Fraction(str(share)) * d))


def fractional_top(size: np.ndarray, entries: int, tolerance: float) -> np.ndarray:
    """Membership of the `entries` largest, 1, 0, or the share that fits where tied."""
    threshold = np.sort(size, axis=None)[::-1][entries - 1]
    above = size > threshold + tolerance
    tied = ~above & (size >= threshold - tolerance)
    return above + tied * ((entries - above.sum()) / tied.sum())


def visible_probability(size: np.ndarray, tau: float, density: float) -> np.ndarray:
    """P(visible | w) element by element for |w| on the bf16 grid, its mean the density."""
    if tau == 0:  # the midpoints to the neighbours
        place = np.searchsorted(GRID, size)
        above, below = (GRID[place] + GRID[place + 1]) / 2, (GRID[place] + GRID[place - 1]) / 2
    else:
        upper = np.searchsorted(GRID, size + tau, "right") - 1
        lower = np.searchsorted(GRID, size - tau, "left")
        above, below = (GRID[upper] + GRID[upper + 1]) / 2, (GRID[lower] + GRID[lower - 1]) / 2

    def probability(log_scale: float) -> np.ndarray:
        wide = np.sqrt(2) * np.exp(log_scale)
        return 0.5 * (scipy.special.erfc((above - size) / wide) + scipy.special.erfc((size - below) / wide))

    return probability(
        scipy.optimize.brentq(lambda x: probability(x).mean() - density, np.log(1e-12), np.log(1e6), xtol=1e-13)
    )


def twin_row(
    before: np.ndarray,
    after: np.ndarray,
    *,
    threshold: float = 1e-5,
    ratios: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2),
    extra: tuple[int, float] | None = None,
) -> dict[str, Any]:
    """Columns of one matrix (m, n), compared in the arithmetic of its own dtype (bfloat16, float32 or float64)."""
    dtype = before.dtype
    delta = (after - before).astype(np.float64)
    tau = float(np.array(threshold, dtype).astype(np.float64))
    source, trained = before.astype(np.float64), after.astype(np.float64)
    m, n = source.shape
    d, size = min(m, n), m * n
    moved = {"": np.abs(delta) > tau, "_nonzero": delta != 0}
    energy = float((delta**2).sum())
    row: dict[str, Any] = {
        "relative_norm": np.sqrt(energy / (source**2).sum()),
        "unchanged_fraction": (delta == 0).mean(),
        "unchanged_bits": (before.view(f"u{dtype.itemsize}") == after.view(f"u{dtype.itemsize}")).mean(),
        "sparsity": (np.abs(delta) <= tau).mean(),
        "relative_sparsity": (np.abs(delta) <= 1e-3 * np.maximum(np.abs(source), np.abs(trained))).mean(),
    }
    for exponent in (8, 7, 6, 5, 4):
        edge = float(np.array(10.0**-exponent, dtype).astype(np.float64))
        row[f"sparsity_1e-{exponent:02d}"] = (np.abs(delta) <= edge).mean()
    squares = np.sort(delta**2, axis=None)[::-1]
    for key, share in (("0.1pct", 0.001), ("1pct", 0.01), ("5pct", 0.05)):
        row[f"top_energy_{key}"] = squares[: ceil_of(share, size)].sum() / energy

    s = scipy.linalg.svd(delta, compute_uv=False, lapack_driver="gesvd")
    p = s[s > 0] / s.sum()
    row |= {
        "spectral_norm": s[0],
        "stable_rank": energy / s[0] ** 2,
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        **{f"top{k}_energy": (s[:k] ** 2).sum() / energy for k in (1, 2, 4, 8, 16, 32, 64)},
        **{f"numerical_rank_1e-{e}": int((s > 10.0**-e * s[0]).sum()) for e in (4, 5, 6)},
    }
    k = max(2, ceil_of(0.1, d))
    row["hill"] = k / np.log(s[:k] / s[k]).sum() if k < d and s[k] > 0 else None

    u, values, vt = scipy.linalg.svd(source, full_matrices=False, lapack_driver="gesvd")
    up, moved_values, vtp = scipy.linalg.svd(trained, full_matrices=False, lapack_driver="gesvd")
    row["spectral_shift"] = np.linalg.norm(moved_values - values) / np.linalg.norm(values)
    masks = [(f"{100 * ratio:g}pct", rank_of(ratio, d), ratio) for ratio in ratios]
    for suffix, k, _ in masks:
        uk, vk = u[:, :k], vt[:k].T
        row[f"principal_projection_{suffix}"] = ((uk.T @ delta @ vk) ** 2).sum() / energy
        row[f"left_projection_{suffix}"] = ((uk.T @ delta) ** 2).sum() / energy
        row[f"right_projection_{suffix}"] = ((delta @ vk) ** 2).sum() / energy
        row[f"principal_projection_{suffix}_random"] = k * k / size
        row[f"left_projection_{suffix}_random"] = k / m
        row[f"right_projection_{suffix}_random"] = k / n
        row[f"rotation_{suffix}"] = np.sin(scipy.linalg.subspace_angles(uk, up[:, :k])).mean()
        row[f"rotation_right_{suffix}"] = np.sin(scipy.linalg.subspace_angles(vk, vtp[:k].T)).mean()
    if extra is not None:
        masks.append((f"rank{extra[0]}_{100 * extra[1]:g}pct", min(extra[0], d), extra[1]))
    for suffix, k, share in masks:
        rebuilt = np.abs((u[:, :k] * values[:k]) @ vt[:k])
        entries = ceil_of(share, size)
        inside = {
            "principal": fractional_top(rebuilt, entries, 1e-9 * rebuilt.max()),
            "low_magnitude": fractional_top(-np.abs(source), entries, 0.0),
        }
        for kind, updates in moved.items():
            chance = None
            if dtype == BF16 and 0 < updates.mean() < 1:
                chance = visible_probability(np.abs(source), 0.0 if kind else tau, updates.mean())
            for which, member in inside.items():
                name = f"{which}_coverage_{suffix}{kind}"
                row[name] = (member * updates).sum() / updates.sum() if updates.any() else None
                row[f"{name}_random"] = entries / size
                if chance is not None:
                    row[f"{name}_null"] = (member * chance).sum() / chance.sum()
                    row[f"{name}_excess"] = row[name] / row[f"{name}_null"]
    return row
