"""summary.json from rows: every aggregate from counts and energies, never from averages of averages.

Keys: DESIGN.md, "summary.json (schema 1)". Pure: rows in, plain dict out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from deltalens.analysis.settings import HEADLINE, Settings, ratio_suffix

__all__ = ["grouped", "summarise_rows", "summary_tables"]

Row = dict[str, Any]

BOOTSTRAP_DRAWS = 1000
NOT_CORE = ("embedding", "lm_head")
SHARE_ROLES = ("ffn", "attention", "embedding", "lm_head", "norm", "vision", "other")
OVER_MATRICES = (
    "stable_rank", "stable_rank_random", "stable_rank_null", "effective_rank", "numerical_rank_fraction_1e-4",
    "top16_energy", "top16_energy_random", "top16_energy_null", "top8_energy", "hill", "spectral_shift",
)  # fmt: skip
PER_RATIO = ("principal_projection", "left_projection", "right_projection", "rotation", "rotation_right")


def summary_tables(rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """`global`, `by_role` and `by_layer` of summary.json."""
    energy = _total(rows, "delta_energy")
    return {
        "global": summarise_rows(rows, settings, whole=True),
        "by_role": grouped(rows, lambda row: row["role"], settings, energy),
        "by_layer": grouped(
            [row for row in rows if row["layer"] is not None], lambda row: row["layer"], settings, energy
        ),
    }


def grouped(
    rows: Iterable[Row], key: Callable[[Row], Any], settings: Settings, energy: float
) -> dict[str, dict[str, Any]]:
    """Aggregates of each group of rows, with its share of `energy`, the whole ‖Δ‖²."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    out = {}
    for name in sorted(groups):
        out[str(name)] = summarise_rows(groups[name], settings, whole=False)
        out[str(name)]["energy_share"] = _total(groups[name], "delta_energy") / energy if energy > 0 else None
    return out


def summarise_rows(rows: Sequence[Row], settings: Settings, *, whole: bool) -> dict[str, Any]:
    """Aggregates over some rows; `whole` adds energy shares, intervals and the `_core` coverages."""
    finite = [row for row in rows if not row["nonfinite_count"]]
    count = sum(row["parameters"] for row in finite)
    source, delta = _total(finite, "source_energy"), _total(finite, "delta_energy")
    out: dict[str, Any] = {
        "tensors": len(rows),
        "parameters": sum(row["parameters"] for row in rows),
        "nonfinite_tensors": len(rows) - len(finite),
        "visible_updates": sum(row["visible_count"] for row in finite),
        "nonzero_updates": sum(row["nonzero_count"] for row in finite),
        "relative_norm": (delta / source) ** 0.5 if source > 0 else None,
    }

    def share(name: str) -> float | None:
        return sum(row[name] for row in finite) / count if count else None

    out["unchanged_fraction"] = share("unchanged_count")
    out["unchanged_bits"] = share("unchanged_bits_count")
    visible = share("visible_count")
    out["sparsity"] = None if visible is None else sum(r["parameters"] - r["visible_count"] for r in finite) / count
    keys = [key[len("sparsity_") : -len("_count")] for key in (finite[0] if finite else {}) if _is_table(key)]
    out["sparsity_at"] = {key: share(f"sparsity_{key}_count") for key in keys}
    out["relative_sparsity"] = share("relative_sparse_count")
    for key in ("0.1pct", "1pct", "5pct"):
        held = sum((row[f"top_energy_{key}"] or 0.0) * row["delta_energy"] for row in finite)
        out[f"top_energy_{key}"] = held / delta if delta > 0 else None
    if whole:
        out["energy_share"] = {
            role: _total([r for r in finite if r["role"].split(".")[0] == role], "delta_energy") / delta
            if delta > 0
            else None
            for role in SHARE_ROLES
        }
    for name in OVER_MATRICES:
        out[name] = _spread(finite, name)
    for ratio in settings.ratios:
        for name in PER_RATIO:
            column = f"{name}_{ratio_suffix(ratio)}"
            out[column] = _spread(finite, column)
            for suffix in ("_random", "_null", "_permuted", "_z"):
                if any(row.get(column + suffix) is not None for row in finite):
                    out[column][suffix[1:]] = _spread(finite, column + suffix)["median"]
    out |= _coverages(finite, settings, whole)
    return out


def _is_table(key: str) -> bool:
    return key.startswith("sparsity_") and key.endswith("_count")


def _total(rows: Iterable[Row], name: str) -> float:
    return float(sum(row.get(name) or 0.0 for row in rows))


def _spread(rows: Sequence[Row], name: str) -> dict[str, float | None]:
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return {"mean": None, "median": None}
    return {"mean": float(np.mean(values)), "median": float(np.median(values))}


def _coverages(rows: Sequence[Row], settings: Settings, whole: bool) -> dict[str, Any]:
    ratios = settings.ratios if whole else (HEADLINE,)
    suffixes = [ratio_suffix(ratio) for ratio in ratios]
    if settings.mask_rank and whole:
        suffixes.append(f"rank{settings.mask_rank}_{ratio_suffix(settings.mask_share)}")
    core = [row for row in rows if row["role"] not in NOT_CORE]
    out: dict[str, Any] = {}
    for which in ("principal", "low_magnitude"):
        for suffix in suffixes:
            for kind, counted in (("", "visible_count"), ("_nonzero", "nonzero_count")):
                name = f"{which}_coverage_{suffix}{kind}"
                out[name] = _pooled(rows, name, counted, settings.seed if whole else None)
                if whole:
                    out[f"{name}_core"] = _pooled(core, name, counted, settings.seed)
    return out


def _pooled(rows: Sequence[Row], name: str, counted: str, seed: int | None) -> dict[str, float | None]:
    """A coverage pooled over all updates, with its random value, null, excess and the excess's 95 % interval.

    The excess compares seen and null on the matrices that have a null; the interval is a bootstrap over matrices.
    """
    used = [row for row in rows if row.get(name) is not None]
    out: dict[str, float | None] = dict.fromkeys(
        ("pooled", "median", "random", "null", "excess", "excess_low", "excess_high")
    )
    if not used:
        return out
    counts = np.array([row[counted] for row in used], float)
    seen = np.array([row[name] for row in used]) * counts
    out["pooled"] = float(seen.sum() / counts.sum())
    out["median"] = float(np.median([row[name] for row in used]))
    out["random"] = float((np.array([row[f"{name}_random"] for row in used]) * counts).sum() / counts.sum())
    if any(row.get(f"{name}_master") is not None for row in used):
        out["master_median"] = _spread(used, f"{name}_master")["median"]
    has_null = np.array([row[f"{name}_null"] is not None for row in used])
    if not has_null.any():
        return out
    expected = np.array([row[f"{name}_null"] or 0.0 for row in used]) * counts
    seen, expected, counts = seen[has_null], expected[has_null], counts[has_null]
    if expected.sum() == 0:
        return out
    out["null"] = float(expected.sum() / counts.sum())
    out["excess"] = float(seen.sum() / expected.sum())
    if seed is not None and seen.size > 1:
        picks = np.random.default_rng(seed).integers(0, seen.size, (BOOTSTRAP_DRAWS, seen.size))
        below = expected[picks].sum(axis=1)
        ratios = seen[picks].sum(axis=1)[below > 0] / below[below > 0]
        low, high = np.quantile(ratios, (0.025, 0.975))
        out["excess_low"], out["excess_high"] = float(low), float(high)
    return out
