"""The rounding null of what has no closed form, by simulation (METRICS.md, "Random values").

Each draw is bf16(W + s·N(0, 1)) − W with the scale s of the fitted closed-form null: an update without any
preference, stored the way TRAINED was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltalens.analysis.settings import Settings, ratio_suffix
from deltalens.metrics.alignment import DeltaPass, projections
from deltalens.metrics.blocks import is_tall
from deltalens.metrics.spectrum import TOP_ENERGIES
from deltalens.metrics.values import round_to_bf16, word_values

__all__ = ["draw_update", "simulated_null"]


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
    singular_values: Callable[[np.ndarray], np.ndarray],
    delta_pass: Callable[[np.ndarray], DeltaPass],
    ranks: Sequence[int],
    settings: Settings,
) -> dict[str, Any]:
    """Columns `…_null` (mean over draws) and `…_null_std` of stable rank, top-k energies and projections.

    `singular_values` and `delta_pass` take a draw (words) and give those of its difference to the source.
    """
    seen: dict[str, list[float]] = {}
    for draw in range(settings.null_draws):
        rng = np.random.default_rng([settings.seed, draw, *words.shape])
        drawn = draw_update(words, scale, rng)
        energies = singular_values(drawn) ** 2
        total = float(energies.sum())
        if total == 0:
            continue
        seen.setdefault("stable_rank", []).append(total / float(energies[0]))
        for k in TOP_ENERGIES:
            seen.setdefault(f"top{k}_energy", []).append(float(energies[:k].sum()) / total)
        passed = delta_pass(drawn)
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
