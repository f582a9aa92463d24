"""Tables and summary of a trajectory: the aggregates of `analyze` at every checkpoint, and what ties these together.

Pure: rows in, plain values out. The flat names are those of METRICS.md; of an aggregate that is a mean and a median
over matrices the plain name is the median, of a pooled coverage the pooled value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deltalens.analysis.settings import Settings
from deltalens.analysis.spectral import excess
from deltalens.analysis.summary import grouped, summary_tables
from deltalens.metrics.overlap import SUBSPACE
from deltalens.metrics.trajectory import locked_index

__all__ = ["LOCKED", "SIMILARITY", "checkpoint_tables", "locks"]

Row = dict[str, Any]
LOCKED = 0.8  # of `SIMILARITY`, above which a run is said to be locked
SIMILARITY = f"sim{SUBSPACE}_right_end"
SIMILARITIES = tuple(f"sim{SUBSPACE}_{side}_{which}" for which in ("end", "start") for side in ("right", "left"))
LABELS = ("name", "layer", "role", "module", "shape")
GROUPS: dict[str, Callable[[Row], Any]] = {
    "role": lambda row: row["role"],
    "layer": lambda row: row["layer"],
    "module": lambda row: row["module"],
}


def checkpoint_tables(rows: Sequence[Row], settings: Settings, span: int) -> tuple[list[Row], dict[str, Any]]:
    """Rows of trajectory.parquet for one checkpoint, without its name and step, and its part of summary.json.

    Args:
        rows: a row a tensor, of this checkpoint.
        settings: as they were measured with.
        span: steps since the checkpoint before, or since SOURCE.
    """
    tables = summary_tables(rows, settings)
    energy = sum(row.get("delta_energy") or 0.0 for row in rows)
    modules = grouped(rows, GROUPS["module"], settings, energy)
    whole = along(rows, span)
    out: list[Row] = [{"scope": "global", "key": "all"} | _flat(tables["global"]) | whole]
    roles: dict[str, Any] = {}
    for scope, aggregates in (("role", tables["by_role"]), ("layer", tables["by_layer"]), ("module", modules)):
        members = _members(rows, GROUPS[scope])
        for key, aggregate in aggregates.items():
            joined = along(members[key], span)
            out.append({"scope": scope, "key": key} | _flat(aggregate) | joined)
            if scope == "role":
                roles[key] = aggregate | joined
    for row in rows:
        numbers = {name: value for name, value in row.items() if name not in LABELS and not isinstance(value, str)}
        share = row["delta_energy"] / energy if energy > 0 and row.get("delta_energy") is not None else None
        out.append({"scope": "tensor", "key": row["name"]} | numbers | {"energy_share": share} | along([row], span))
    return out, {"global": tables["global"] | whole, "by_role": roles}


def _members(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[str, list[Row]]:
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(str(key(row)), []).append(row)
    return members


def _flat(aggregate: Mapping[str, Any]) -> Row:
    """One level of names from an aggregate of `summarise_rows`."""
    out: Row = {}
    for name, value in aggregate.items():
        if not isinstance(value, Mapping):
            out[name] = value
            continue
        stem = name.removesuffix("_at")  # the table of sparsities: sparsity_1e-08 …
        plain = "pooled" if "pooled" in value else "median"
        for key, one in value.items():
            out[stem if key == plain else f"{stem}_{key}"] = one
    return out


def along(rows: Sequence[Row], span: int) -> Row:
    """Mask growth, churn and similarities of some tensors at one checkpoint, from counts summed over them."""
    used = [row for row in rows if row.get("stepped_count") is not None]
    out: Row = dict.fromkeys(("appeared", "vanished", "returned", "ever_visible", "churn"))
    size = sum(row["parameters"] for row in used)
    counts = {name: sum(row[f"{name}_count"] for row in used) for name in _COUNTS}
    if size:
        out |= {name: counts[name] / size for name in ("appeared", "vanished", "returned")}
        out["ever_visible"] = counts["ever"] / size
        out["churn"] = (counts["appeared"] + counts["vanished"]) / counts["stepped"] if counts["stepped"] else None
    for name in ("appeared", "vanished"):
        out[f"{name}_per_step"] = None if out[name] is None else out[name] / span
    return out | _jaccard([row for row in used if row.get("union_end_count") is not None]) | _similarities(rows)


_COUNTS = ("appeared", "vanished", "returned", "stepped", "ever")


def _jaccard(rows: Sequence[Row]) -> Row:
    """With the final mask: observed, for masks placed at random, and under the rounding null."""
    out: Row = dict.fromkeys(("jaccard_end", "jaccard_end_random", "jaccard_end_null", "jaccard_end_excess"))
    union = sum(row["union_end_count"] for row in rows)
    if not union:
        return out
    out["jaccard_end"] = sum(row["intersection_end_count"] for row in rows) / union
    both = sum(row["visible_count"] + row["end_count"] for row in rows)
    for kind in ("random", "null"):
        expected = [row[f"intersection_end_{kind}"] for row in rows]
        if all(value is not None for value in expected):
            shared = sum(expected)
            out[f"jaccard_end_{kind}"] = shared / (both - shared) if both > shared else None
    out["jaccard_end_excess"] = excess(out["jaccard_end"], out["jaccard_end_null"])
    return out


def _similarities(rows: Sequence[Row]) -> Row:
    """Median and mean over matrices; what chance and rounding give, as medians."""
    out: Row = {}
    for name in SIMILARITIES:
        values = _present(rows, name)
        out[name] = float(np.median(values)) if values else None
        out[f"{name}_mean"] = float(np.mean(values)) if values else None
        for kind in ("random", "null"):
            others = _present(rows, f"{name}_{kind}")
            out[f"{name}_{kind}"] = float(np.median(others)) if others else None
        out[f"{name}_excess"] = excess(out[name], out[f"{name}_null"])
    return out


def _present(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def locks(checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`locked_at` (a step), `locked_checkpoint` and `locked_at_by_role` from the checkpoints' parts of the summary."""
    first = locked_index([one["global"].get(SIMILARITY) for one in checkpoints], LOCKED)
    roles = dict.fromkeys(role for one in checkpoints for role in one["by_role"])
    by_role = {}
    for role in roles:
        curve = [one["by_role"].get(role, {}).get(SIMILARITY) for one in checkpoints]
        if any(value is not None for value in curve):
            index = locked_index(curve, LOCKED)
            by_role[role] = None if index is None else checkpoints[index]["step"]
    return {
        "locked_at": None if first is None else checkpoints[first]["step"],
        "locked_checkpoint": None if first is None else checkpoints[first]["name"],
        "locked_at_by_role": by_role,
        "locked_above": LOCKED,
        "locked_by": f"median over matrices of {SIMILARITY}",
    }
