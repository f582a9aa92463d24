"""Tables of `compare` from its rows: every number pooled from counts and sums over tensors, never from averages.

Pure: rows in (what `compare.measure_tensor` gives), plain dicts out. Names: METRICS.md, "Between runs".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import isfinite
from typing import Any

import numpy as np

from deltalens.metrics.overlap import magnitude_correlation

__all__ = ["pair_rows", "pooled_rows", "tensor_rows"]

Row = dict[str, Any]
Columns = dict[str, np.ndarray]

BOOTSTRAP_DRAWS = 1000
NOT_CORE = ("embedding", "lm_head")
KINDS = ("", "_nonzero")
SIDES = ("right", "left")
MOMENTS = ("n", "a1", "b1", "a2", "b2", "ab")
# Means and ratios that carry a 95 % interval, by bootstrap over tensors.
INTERVALS = (
    "lift", "excess", "lift_nonzero", "excess_nonzero", "sign_agreement", "sign_agreement_nonzero",
    "magnitude_correlation", "cosine", "sim16_right", "sim16_left", "sim16_right_excess", "sim16_left_excess",
)  # fmt: skip


def pooled_rows(rows: Sequence[Row], names: Sequence[str], seed: int) -> list[Row]:
    """A row for each pair of runs and each of global, core, role, layer, module: the columns of pairs.parquet."""
    groups = list(_groups(rows))
    weights = [_weights(len(members), seed) for _, _, members in groups]
    heads = [{"scope": scope, "key": key, "tensors": len(members)} for scope, key, members in groups]
    out = []
    for at, (a, b) in enumerate(combinations(range(len(names)), 2)):
        columns = _columns(rows, at, a, b)
        each = np.stack(list(columns.values()))
        found = []
        for (_, _, members), resampled in zip(groups, weights, strict=True):
            sums = each[:, members] @ resampled.T
            found.append(_statistics(dict(zip(columns, sums, strict=True))))
        values = {name: np.array([one[name][0] for one in found]) for name in found[0]}
        bounds = dict(zip(INTERVALS, np.stack([_bounds(one) for one in found], axis=1), strict=True))
        draws = {side: _draw_means([row["pairs"][at].get(f"sim_{side}_draws") for row in rows]) for side in SIDES}
        spread = {
            f"sim16_{side}_null_std": [_spread(draws[side][members]) for _, _, members in groups] for side in SIDES
        }
        lines = _lines(_public(values, bounds) | spread)
        out += [{"a": names[a], "b": names[b]} | head | line for head, line in zip(heads, lines, strict=True)]
    return out


def pair_rows(pooled: Sequence[Row]) -> list[Row]:
    """The pairs of summary.json: the global row of each, the one without embedding and LM head under `core`."""
    outside = ("a", "b", "scope", "key")
    core = {(r["a"], r["b"]): {k: v for k, v in r.items() if k not in outside} for r in pooled if r["scope"] == "core"}
    return [
        {key: value for key, value in row.items() if key not in ("scope", "key")}
        | {"core": core.get((row["a"], row["b"]))}
        for row in pooled
        if row["scope"] == "global"
    ]


def tensor_rows(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """A row for each pair of runs and each tensor."""
    out = []
    undefined = dict.fromkeys(INTERVALS, np.full((len(rows), 2), np.nan))  # there is nothing to resample
    for at, (a, b) in enumerate(combinations(range(len(names)), 2)):
        values = _public(_statistics(_columns(rows, at, a, b)), undefined)
        pairs = [row["pairs"][at] for row in rows]
        for side in SIDES:
            values[f"sim16_{side}_null_std"] = [_spread(_draw_means([pair.get(f"sim_{side}_draws")])) for pair in pairs]
        values["sim16_rank"] = [pair.get("sim_rank") for pair in pairs]
        values["delta_energy"] = [row["delta_energy"][a] + row["delta_energy"][b] for row in rows]  # orders modules
        for row, line in zip(rows, _lines(values), strict=True):
            same = {name: row[name] for name in ("name", "layer", "role", "module", "shape", "parameters")}
            out.append({"a": names[a], "b": names[b]} | same | line)
    return out


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(scope, key, indices of rows); modules of a vision tower are kept apart from the language model's."""
    yield "global", "all", np.arange(len(rows))
    yield "core", "all", np.array([i for i, row in enumerate(rows) if row["role"] not in NOT_CORE], int)
    found: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(("role", row["role"]), []).append(i)
        if row["layer"] is not None:
            tower = "vision." if row["role"].startswith("vision") else ""
            found.setdefault(("layer", f"{tower}{row['layer']}"), []).append(i)
        tower = "vision." if row["role"].startswith("vision") else ""
        found.setdefault(("module", tower + (row["module"] or row["name"])), []).append(i)
    order = ("role", "layer", "module")
    for (scope, key), members in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        yield scope, key, np.array(members)


def _weights(size: int, seed: int) -> np.ndarray:
    """How often each tensor counts: once in the first line, as resampled in the others (none of one tensor alone)."""
    once = np.ones((1, size))
    if size < 2:
        return once
    rng = np.random.default_rng(seed)
    return np.concatenate([once, rng.multinomial(size, np.full(size, 1 / size), BOOTSTRAP_DRAWS)])


def _columns(rows: Sequence[Row], at: int, a: int, b: int) -> Columns:
    """What is summed, a value a tensor. `null_…` columns are zero for tensors whose null is undefined."""
    pairs = [row["pairs"][at] for row in rows]
    size = np.array([row["parameters"] for row in rows], float)
    out: Columns = {"parameters": size}
    for kind in KINDS:
        counted = "visible" if kind == "" else "nonzero"
        na, nb = (np.array([row[counted][run] for row in rows], float) for run in (a, b))
        both = np.array([pair[counted] for pair in pairs], float)
        expected = [pair["expected" + kind] for pair in pairs]
        known = np.array([one is not None for one in expected], float)
        out |= {
            f"a{kind}": na,
            f"b{kind}": nb,
            f"both{kind}": both,
            f"same{kind}": np.array([pair[f"{counted}_same"] for pair in pairs], float),
            f"random{kind}": na * nb / size,
            f"null{kind}": np.array([one or 0.0 for one in expected]),
            f"null_a{kind}": known * na,
            f"null_b{kind}": known * nb,
            f"null_both{kind}": known * both,
        }
    out["energy_a"], out["energy_b"] = (np.array([row["delta_energy"][run] for row in rows]) for run in (a, b))
    out["dot"] = np.array([pair["dot"] for pair in pairs])
    for i, name in enumerate(MOMENTS):
        out[name] = np.array([pair["moments"][i - 1] if i else pair["visible"] for pair in pairs], float)
        out[f"null_{name}"] = np.array([(pair["expected_moments"] or (0.0,) * 6)[i] for pair in pairs])
    sizes = [[int(side) for side in row["shape"].split("x")] for row in rows]
    for side in SIDES:
        sims = [pair.get(f"sim_{side}") for pair in pairs]
        ambient = [shape[-1] if side == "right" else shape[0] for shape in sizes]
        random = [
            0.0 if sim is None else min(pair["sim_rank"] / n, 1.0)
            for sim, pair, n in zip(sims, pairs, ambient, strict=True)
        ]
        means = [float(np.mean(draws)) if (draws := pair.get(f"sim_{side}_draws")) else None for pair in pairs]
        both_known = [sim is not None and mean is not None for sim, mean in zip(sims, means, strict=True)]
        out |= {
            f"{side}_matrices": np.array([sim is not None for sim in sims], float),
            f"{side}_sim": np.array([sim or 0.0 for sim in sims]),
            f"{side}_random": np.array(random),
            f"{side}_null_matrices": np.array(both_known, float),
            f"{side}_null": np.array([mean or 0.0 if k else 0.0 for mean, k in zip(means, both_known, strict=True)]),
            f"{side}_null_sim": np.array([sim or 0.0 if k else 0.0 for sim, k in zip(sims, both_known, strict=True)]),
        }
    return out


def _statistics(s: Columns) -> Columns:
    """Every number of one pair from sums (any shape, the same for all); NaN where undefined."""
    out: Columns = {"parameters": s["parameters"]}
    with np.errstate(divide="ignore", invalid="ignore"):
        for kind in KINDS:
            a, b, both = s[f"a{kind}"], s[f"b{kind}"], s[f"both{kind}"]
            random, null = s[f"random{kind}"], s[f"null{kind}"]
            null_a, null_b = s[f"null_a{kind}"], s[f"null_b{kind}"]
            out |= {
                f"density_a{kind}": a / s["parameters"],
                f"density_b{kind}": b / s["parameters"],
                f"intersection{kind}": both,
                f"union{kind}": a + b - both,
                f"jaccard{kind}": both / (a + b - both),
                f"jaccard{kind}_random": random / (a + b - random),
                f"jaccard{kind}_null": null / (null_a + null_b - null),
                f"a_in_b{kind}": both / a,
                f"a_in_b{kind}_random": random / a,
                f"a_in_b{kind}_null": null / null_a,
                f"b_in_a{kind}": both / b,
                f"b_in_a{kind}_random": random / b,
                f"b_in_a{kind}_null": null / null_b,
                f"lift{kind}": both / random,
                f"excess{kind}": s[f"null_both{kind}"] / null,
                f"sign_agreement{kind}": s[f"same{kind}"] / both,
            }
        for prefix, name in (("", "magnitude_correlation"), ("null_", "magnitude_correlation_null")):
            count, *moments = (s[prefix + moment] for moment in MOMENTS)
            out[name] = magnitude_correlation(count, moments)
        out["cosine"] = s["dot"] / np.sqrt(s["energy_a"] * s["energy_b"])
        for side in SIDES:
            mean, null = s[f"{side}_sim"] / s[f"{side}_matrices"], s[f"{side}_null"] / s[f"{side}_null_matrices"]
            out[f"sim16_{side}"] = mean
            out[f"sim16_{side}_random"] = s[f"{side}_random"] / s[f"{side}_matrices"]
            out[f"sim16_{side}_null"] = null
            out[f"sim16_{side}_excess"] = s[f"{side}_null_sim"] / s[f"{side}_null"]
    return out


def _bounds(statistics: Columns) -> np.ndarray:
    """(INTERVALS, 2): the 95 % interval that the resampled lines of each statistic give, NaN where there is none."""
    lines = np.stack([statistics[name] for name in INTERVALS])
    out = np.full((len(INTERVALS), 2), np.nan)
    drawn, known = lines[:, 1:], np.isfinite(lines[:, 0])
    whole = known & np.isfinite(drawn).all(axis=1)
    if drawn.shape[1] > 1:
        out[whole] = np.quantile(drawn[whole], (0.025, 0.975), axis=1).T
        for i in np.flatnonzero(known & ~whole):  # undefined in some of the resamples
            defined = drawn[i][np.isfinite(drawn[i])]
            if defined.size > 1:
                out[i] = np.quantile(defined, (0.025, 0.975))
    return out


def _public(values: Columns, bounds: Columns) -> dict[str, list[Any]]:
    """Statistics (rows,) under their public names, with their intervals (rows, 2); what is undefined is None.

    The excess over the null is one number for both coverages: they share numerator and null.
    """
    out: dict[str, list[Any]] = {}
    for name, column in values.items():
        plain = _plain(column, whole=name.startswith(("intersection", "union", "parameters")))
        kind = name.removeprefix("excess")
        public = (name,) if kind == name else (f"a_in_b{kind}_excess", f"b_in_a{kind}_excess")
        out |= dict.fromkeys(public, plain)
        if name in bounds:
            low, high = (_plain(bound) for bound in bounds[name].T)
            for one in public:
                out |= {f"{one}_low": low, f"{one}_high": high}
    out["sim16_random"] = out["sim16_right_random"]
    return out


def _plain(column: np.ndarray, whole: bool = False) -> list[Any]:
    return [None if not isfinite(x) else int(x) if whole else x for x in column.tolist()]


def _lines(columns: dict[str, list[Any]]) -> Iterator[Row]:
    return (dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True))


def _draw_means(draws: Sequence[Sequence[float] | None]) -> np.ndarray:
    """(tensors, draws) similarities of the simulated null, NaN where there is none."""
    longest = max((len(one) for one in draws if one), default=0)
    out = np.full((len(draws), longest), np.nan)
    for i, one in enumerate(draws):
        if one:
            out[i, : len(one)] = one
    return out


def _spread(draws: np.ndarray) -> float | None:
    """Standard deviation over draws of the mean over tensors."""
    used = draws[~np.isnan(draws).any(axis=1)]
    if used.shape[0] == 0 or used.shape[1] < 2:
        return None
    return float(used.mean(axis=0).std(ddof=1))
