"""The figures of a study's page as plain plotly JSON, styled by the page itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deltalens.report.plots import label
from deltalens.report.published import PUBLISHED
from deltalens.study.outcome import Outcome
from deltalens.study.verdicts import interval

__all__ = ["figures"]

COLOURS = ("#3b7dd8", "#e08a1e", "#2a9d6f", "#9a6fd0", "#d1495b", "#8a8f98", "#5b7c99", "#b0803a")
GREY = "#8a8f98"
_LEGEND = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0}
Figure = dict[str, Any]


def figures(outcome: Outcome) -> dict[str, Figure]:
    """Every figure that there are numbers for, by its place on the page."""
    made = {
        "published": _published(outcome),
        "coverage": _coverage(outcome),
        "subnetwork": _curves(outcome),
        "optimizers": _optimizers(outcome),
        "similarity": _along(outcome, "sim16_right_end", "Sim₁₆ to the end, median over matrices", [0, 1.02]),
        "rank": _along(outcome, "stable_rank", "stable rank, median over matrices", None),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _figure(traces: list[Figure], x: str, y: str, **layout: Any) -> Figure | None:
    if not traces:
        return None
    base: Figure = {
        "height": 420,
        "margin": {"l": 70, "r": 10, "t": 60, "b": 60},
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
        "legend": _LEGEND,
    }
    for key, value in layout.items():
        base[key] = {**base.get(key, {}), **value}
    return {"data": traces, "layout": base}


def _mean(values: Mapping[str, float]) -> float | None:
    return math.fsum(values.values()) / len(values) if values else None


def _published(outcome: Outcome) -> Figure | None:
    """Relative norm against sparsity, the paper's runs in grey."""
    ours = []
    for run in outcome.study.tables.main:
        norm, sparsity = (_mean(outcome.values(f"analyze:{run}:{key}")) for key in ("relative_norm", "sparsity"))
        if norm and sparsity is not None:
            ours.append((run, norm, sparsity))
    if not ours:
        return None
    points = [("paper", GREY, [(row.name, row.relative_norm, row.sparsity) for row in PUBLISHED]),
              ("this study", COLOURS[0], ours)]  # fmt: skip
    traces = [
        {
            "type": "scatter", "mode": "markers+text", "name": name, "textposition": "top center",
            "x": [100 * one[1] for one in rows], "y": [100 * one[2] for one in rows],
            "text": [label(one[0]) for one in rows], "marker": {"size": 9, "color": colour},
            "hovertemplate": "%{text}: norm %{x:.3~g} %, sparsity %{y:.3~g} %<extra></extra>",
        }
        for name, colour, rows in points
    ]  # fmt: skip
    return _figure(traces, "relative norm, %", "sparsity, %", xaxis={"type": "log"})


def _coverage(outcome: Outcome) -> Figure | None:
    """Low-magnitude coverage of the core: seen beside the null and chance."""
    runs = [run for run in outcome.study.tables.main if outcome.values(_core(run, "pooled"))]
    if not runs:
        return None
    traces = [
        {
            "type": "bar", "name": name, "x": [label(run) for run in runs], "marker": {"color": colour},
            "y": [_percent(_mean(outcome.values(_core(run, key)))) for run in runs],
            "hovertemplate": "%{x}: %{y:.3~g} %<extra>" + name + "</extra>",
        }
        for name, key, colour in (
            ("seen", "pooled", COLOURS[0]), ("rounding null", "null", COLOURS[4]), ("random", "random", GREY),
        )
    ]  # fmt: skip
    return _figure(traces, "", "updates in the smallest 10 % of the weights, %", xaxis={"type": "category"})


def _core(run: str, key: str) -> str:
    return f"analyze:{run}:low_magnitude_coverage_10pct_core.{key}"


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _curves(outcome: Outcome) -> Figure | None:
    """Accuracy along the runs of the subnetwork table, with t intervals over seeds."""
    study = outcome.study
    start = outcome.number("eval:source", "accuracy")
    traces = []
    for at, run in enumerate(study.tables.subnetwork):
        places: list[tuple[float, dict[str, float]]] = [
            (step, outcome.values(f"eval:{run}@{step}:accuracy")) for step in study.evaluate.steps
        ]
        last = _mean(outcome.values(f"train:{run}:steps"))
        places.append((last or 0, outcome.values(f"eval:{run}:accuracy")))
        points = [(step, interval(list(values.values()), 0.0)) for step, values in places if values]
        if not points:
            continue
        x, middle = [step for step, _ in points], [100 * one.mean for _, one in points]
        if start is not None:
            x, middle = [0, *x], [100 * start, *middle]
        halves = [100 * (one.high - one.mean) for _, one in points]
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": label(run), "x": x, "y": middle,
                "line": {"color": COLOURS[at % len(COLOURS)], "width": 2},
                "error_y": {"type": "data", "array": [0.0] * (len(x) - len(halves)) + halves, "thickness": 1},
                "hovertemplate": "step %{x}: %{y:.3~g} %<extra>" + label(run) + "</extra>",
            }
        )  # fmt: skip
    return _figure(traces, "step", "accuracy, %")


def _optimizers(outcome: Outcome) -> Figure | None:
    """Accuracy against learning rate."""
    traces = []
    for at, run in enumerate(outcome.study.tables.optimizers):
        found = []
        for rate in outcome.study.runs[run].rates:
            accuracy = outcome.number(f"eval:{run}-{rate:g}-s{outcome.study.runs[run].seeds[0]}", "accuracy")
            if accuracy is not None:
                found.append((rate, 100 * accuracy))
        if found:
            traces.append(
                {
                    "type": "scatter", "mode": "lines+markers", "name": label(run), "x": [one[0] for one in found],
                    "y": [one[1] for one in found], "line": {"color": COLOURS[at % len(COLOURS)], "width": 2},
                    "hovertemplate": "%{x:.3~g}: %{y:.3~g} %<extra>" + label(run) + "</extra>",
                }
            )  # fmt: skip
    return _figure(traces, "learning rate", "accuracy, %", xaxis={"type": "log"})


def _along(outcome: Outcome, key: str, title: str, span: list[float] | None) -> Figure | None:
    traces = []
    for at, (step, numbers) in enumerate(
        (step, numbers) for step, numbers in outcome.numbers.items() if step.startswith("trajectory:")
    ):
        name, colour = step.partition(":")[2], COLOURS[at % len(COLOURS)]
        for end, dash, said in (("", "solid", name), ("_null", "dot", f"{name}, rounding null")):
            points = [(one["step"], one.get(key + end)) for one in numbers["checkpoints"]]
            last = points[-1][0] or 1
            if any(value is not None for _, value in points):
                traces.append(
                    {
                        "type": "scatter", "mode": "lines+markers", "name": label(said),
                        "x": [100 * x / last for x, _ in points], "y": [value for _, value in points],
                        "line": {"color": colour, "dash": dash, "width": 2}, "marker": {"size": 5},
                        "hovertemplate": "%{x:.3~g} %: %{y:.3~g}<extra>" + label(said) + "</extra>",
                    }
                )  # fmt: skip
    return _figure(traces, "share of the run, %", title, yaxis={"range": span} if span else {"rangemode": "tozero"})
