"""The nulls of what has no closed form, by simulation (METRICS.md, "Random values"): rounding, and permutations.

Each draw is bf16(W + s·N(0, 1)) − W with the scale s of the fitted closed-form null: an update without any
preference, stored the way TRAINED was. A permutation keeps the update's own values: `metrics.permutation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deltalens.analysis.settings import Settings, ratio_suffix
from deltalens.metrics.alignment import DeltaPass, delta_pass, projections
from deltalens.metrics.blocks import is_tall
from deltalens.metrics.permutation import permuted_updates, z_score
from deltalens.metrics.spectrum import TOP_ENERGIES, Factorisation, factorise
from deltalens.metrics.values import round_to_bf16, word_values

__all__ = ["draw_update", "permutation_columns", "simulated_null"]


def draw_update(words: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    """bf16(W + scale·N(0, 1)) as words, of the shape of `words` (uint16)."""
    out = np.empty_like(words)
    for row in range(words.shape[0]):  # row by row: no float copy of the whole tensor
        noise = rng.standard_normal(words.shape[1], dtype=np.float32)
        out[row] = round_to_bf16(word_values(words[row]) + np.float32(scale) * noise)
    return out


def simulated_null(
    words: np.ndarray,
    scale: float,
    update: Callable[[np.ndarray], tuple[np.ndarray, DeltaPass]],
    ranks: Sequence[int],
    settings: Settings,
    stream: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Columns `…_null` (mean over draws) and `…_null_std` of stable rank, top-k energies and projections.

    `update` takes a draw (words) and gives its difference to the source as `SpectralColumns._update` does.
    Draws of another `stream` are independent of these.
    """
    seen: dict[str, list[float]] = {}
    for draw in range(settings.null_draws):
        rng = np.random.default_rng([settings.seed, draw, *words.shape, *stream])
        drawn = draw_update(words, scale, rng)
        singular_values, passed = update(drawn)
        energies = singular_values**2
        total = float(energies.sum())
        if total == 0:
            continue
        seen.setdefault("stable_rank", []).append(total / float(energies[0]))
        for k in TOP_ENERGIES:
            seen.setdefault(f"top{k}_energy", []).append(float(energies[:k].sum()) / total)
        for k, ratio in zip(ranks, settings.ratios, strict=True):
            joint, long, short = projections(passed, total, k)
            left, right = (long, short) if is_tall(words.shape) else (short, long)
            for side, value in (("principal", joint), ("left", left), ("right", right)):
                seen.setdefault(f"{side}_projection_{ratio_suffix(ratio)}", []).append(value)
    row: dict[str, Any] = {}
    for name, values in seen.items():
        row[f"{name}_null"] = float(np.mean(values))
        row[f"{name}_null_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row


def permutation_columns(
    before: np.ndarray,
    after: np.ndarray,
    source: Factorisation,
    sines: Callable[[np.ndarray, np.ndarray, Sequence[int]], list[float]],
    energy: float,
    ranks: Sequence[int],
    settings: Settings,
    seen: Mapping[str, Any],
) -> dict[str, Any]:
    """Columns `…_permuted`, `…_permuted_sd` and `…_z` of projections and rotations.

    Args:
        before, after: (m, n) prepared values.
        source: of `before`, with as many vectors as the largest of `ranks`.
        sines: principal angles of two bases at some ranks.
        energy: ‖Δ‖², the same for every permuted copy.
        seen: the columns of the update itself; a rotation that it lacks is not permuted.
    """
    tall, k = is_tall(before.shape), max(ranks)
    suffixes = [ratio_suffix(ratio) for ratio in settings.ratios]
    rotated = seen.get(f"rotation_{suffixes[0]}") is not None
    found: dict[str, list[float]] = {}
    for copy in permuted_updates(before, after, settings.permutation, settings.permutations, settings.seed):
        passed = delta_pass(copy.delta, source)
        for rank, suffix in zip(ranks, suffixes, strict=True):
            joint, long, short = projections(passed, energy, rank)
            left, right = (long, short) if tall else (short, long)
            for side, value in (("principal", joint), ("left", left), ("right", right)):
                found.setdefault(f"{side}_projection_{suffix}", []).append(value)
        if not rotated:
            continue
        moved = factorise(copy.trained, max(before.shape), min(before.shape), k)
        long_sines, short_sines = sines(source.long, moved.long, ranks), sines(source.short, moved.short, ranks)
        for side, values in zip(("", "_right"), (long_sines, short_sines)[:: 1 if tall else -1], strict=True):
            for suffix, value in zip(suffixes, values, strict=True):
                found.setdefault(f"rotation{side}_{suffix}", []).append(value)
        del moved  # before the next copy is factorised
    row: dict[str, Any] = {}
    for name, values in found.items():
        row[f"{name}_permuted"], row[f"{name}_permuted_sd"], row[f"{name}_z"] = z_score(seen[name], values)
    return row
