"""Which published run an update resembles: a plain rule, and what it cannot tell.

The rule: each run is a point (log₁₀ relative norm, sparsity at 1e-5, mean top-16 energy, log₁₀ mean stable rank),
every coordinate divided by its standard deviation over the published rows; the distance is the root mean square
of the differences; the regime is the nearest row's. Rows that do not give every figure the run has are left out.
No call is made where the nearest row is farther than `FAR`, and two regimes are named where the runner-up regime
is nearer than `MARGIN` times the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import pstdev
from typing import Any

from deltalens.report.published import GEOMETRY_MARKERS, OPD, PUBLISHED, RLVR, PublishedRow

__all__ = ["FAR", "MARGIN", "Placement", "place", "run_figures"]

FAR = 1.0
MARGIN = 1.5

_LABELS = {
    "relative_norm": "relative norm",
    "sparsity": "sparsity",
    "top16_energy": "top-16 energy",
    "stable_rank": "stable rank",
}
_LOGARITHMIC = {"relative_norm", "stable_rank"}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a run lies among the published rows.

    `regimes` holds the regimes that the run looks like: none (no call), one, or two (too close to call).
    `distances` holds the rows that were compared, nearest first, with their distance in standard deviations.
    """

    regimes: tuple[str, ...]
    verdict: str
    why: str
    caveats: tuple[str, ...]
    distances: tuple[tuple[PublishedRow, float], ...] = ()


def run_figures(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The run's own values of the figures in the published table, by `PublishedRow` field; None where undefined.

    Sparsity is taken at 1e-5 whatever the run's own threshold; stable rank and top-16 energy are means over
    matrices; coverages are pooled over all matrices, as in the paper.
    """
    overall = summary.get("global") or {}
    at = overall.get("sparsity_at") or {}
    figures = {
        "relative_norm": overall.get("relative_norm"),
        "sparsity": at.get("1e-05", overall.get("sparsity")),
        "top16_energy": _inner(overall.get("top16_energy"), "mean"),
        "stable_rank": _inner(overall.get("stable_rank"), "mean"),
        "principal_coverage": _inner(overall.get("principal_coverage_10pct"), "pooled"),
        "low_magnitude_coverage": _inner(overall.get("low_magnitude_coverage_10pct"), "pooled"),
    }
    return {key: value if value is not None and math.isfinite(value) else None for key, value in figures.items()}


def place(summary: Mapping[str, Any]) -> Placement:
    """Place the run of a schema-1 summary among the published rows by the rule of this module."""
    run = {key: value for key, value in run_figures(summary).items() if key in _LABELS}
    if run["relative_norm"] == 0:
        return Placement((), "No update: the two checkpoints are the same.", "", ())
    if run["relative_norm"] is None or run["sparsity"] is None:
        return Placement((), "Not placed: the summary has no relative norm or sparsity.", "", ())
    point = {key: _coordinate(key, value) for key, value in run.items() if value}
    if run["sparsity"] == 0:
        point["sparsity"] = 0.0
    distances = sorted(_distances(point), key=lambda pair: pair[1])
    nearest, distance = distances[0]
    other = next((pair for pair in distances if pair[0].regime != nearest.regime), None)
    used = ", ".join(_LABELS[key] for key in point)
    why = f"By {used}, the nearest published row is {nearest.name} ({distance:.2f} standard deviations away)"
    why += f"; the nearest of another regime is {other[0].name} ({other[1]:.2f})." if other else "."
    if distance > FAR:
        regimes: tuple[str, ...] = ()
        verdict = f"Like none of the published runs (nearest: {nearest.regime}, but {distance:.1f} away)."
    elif other is not None and other[1] < MARGIN * distance:
        regimes = (nearest.regime, other[0].regime)
        verdict = f"Between {regimes[0]} and {regimes[1]}: too close to call."
    else:
        regimes = (nearest.regime,)
        verdict = f"Looks like {nearest.regime}."
    return Placement(regimes, verdict, why, _caveats(summary, regimes), tuple(distances))


def _inner(value: Any, key: str) -> float | None:
    return value.get(key) if isinstance(value, Mapping) else value


def _coordinate(key: str, value: float) -> float:
    return math.log10(value) if key in _LOGARITHMIC else value


def _distances(point: Mapping[str, float]) -> list[tuple[PublishedRow, float]]:
    rows = [row for row in PUBLISHED if all(getattr(row, key) is not None for key in point)]
    total = dict.fromkeys(rows, 0.0)
    for key, value in point.items():
        coordinates = {row: _coordinate(key, getattr(row, key)) for row in rows}
        scale = pstdev(coordinates.values())
        for row in rows:
            total[row] += ((value - coordinates[row]) / scale) ** 2
    return [(row, math.sqrt(square / len(point))) for row, square in total.items()]


def _caveats(summary: Mapping[str, Any], regimes: tuple[str, ...]) -> tuple[str, ...]:
    caveats = [
        "Sparsity and relative norm follow from learning rate, number of steps and bf16 rounding at least as much as "
        "from the training method: a short or gentle SFT run can land among the OPD rows."
    ]
    if OPD in regimes or RLVR in regimes:
        caveats.append(
            "OPD and RLVR overlap in these figures: left out of the table, the one RLVR row with all four would be "
            "called OPD."
        )
    marker = _marker(summary)
    if marker:
        caveats.append(marker)
    settings = summary.get("settings") or {}
    dtype = settings.get("compare_dtype")
    if dtype not in (None, "bf16"):
        caveats.append(f"The published rows were compared in bf16, this run in {dtype}: its sparsity is not theirs.")
    return tuple(caveats)


def _marker(summary: Mapping[str, Any]) -> str | None:
    """A second witness, from [G]: the share that did not move by more than 1e-3 of the weight."""
    share = (summary.get("global") or {}).get("relative_sparsity")
    if share is None:
        return None
    nearest = min(GEOMETRY_MARKERS, key=lambda marker: abs(marker.relative_sparsity - share))
    known = ", ".join(f"{marker.regime} {100 * marker.relative_sparsity:.1f} %" for marker in GEOMETRY_MARKERS)
    return (
        f"A second witness: {100 * share:.1f} % of the weights moved by no more than 1e-3 of themselves; arXiv "
        f"2606.07082 has {known} on Qwen3-8B, of which {nearest.regime} is nearest."
    )
