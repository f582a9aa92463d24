"""The tables of a study's page, the paper's rows beside ours, as text cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deltalens.report.published import ENERGY_SHARES, OVERLAPS, PUBLISHED
from deltalens.report.tables import DASH, Table, number, percent
from deltalens.study.outcome import Outcome
from deltalens.study.paper import OPTIMIZERS, SUBNETWORKS, SUBNETWORKS_VLM
from deltalens.study.spec import Instance, MaskOf, expand
from deltalens.study.verdicts import NOT_RUN, Interval, interval

__all__ = [
    "claims_table",
    "coverage_table",
    "energy_table",
    "main_table",
    "optimizer_table",
    "overlap_table",
    "runs_table",
    "subnetwork_table",
    "trajectory_tables",
]

PAPER = "paper: "
SEEDS = "Mean over seeds [95 % t interval]; without an interval there is one seed."
Text = Callable[[float | None], str]


def main_table(outcome: Outcome) -> Table:
    """Norm, sparsity and spectrum of the runs in `tables.main`, then the published ones."""
    columns = ("relative_norm", "sparsity", "top16_energy.mean", "stable_rank.mean",
               "numerical_rank_fraction_1e-4.median", "principal_projection_10pct.median")  # fmt: skip
    texts: tuple[Text, ...] = (percent, percent, percent, number, percent, percent)
    rows = []
    for run in outcome.study.tables.main:
        cells = [_over(outcome, f"analyze:{run}:{key}", text) for key, text in zip(columns, texts, strict=True)]
        for at, key, text in ((2, "top16_energy", percent), (3, "stable_rank", number)):
            cells[at] += _beside(outcome, run, key, text)
        rows.append((_named(outcome, run), *cells))
    rows += [
        (PAPER + row.name, percent(row.relative_norm), percent(row.sparsity), percent(row.top16_energy),
         number(row.stable_rank), DASH, DASH)
        for row in PUBLISHED
    ]  # fmt: skip
    note = (
        f"{SEEDS} Visible: |Δ| > 1e-5 on bf16 checkpoints. Top-16 energy and stable rank are means over matrices, in "
        "brackets what a Gaussian update (random) and rounding alone (null) give; numerical rank (tolerance 1e-4, "
        "share of full rank) and joint principal projection at 10 % are medians. The paper says of the last two only: "
        "full rank; below 1 % for OPD, 2.22 % for offline distillation."
    )
    heads = ("run", "rel. norm", "sparsity", "top-16 energy", "stable rank", "num. rank", "principal projection")
    return Table("Main table: the update", heads, tuple(rows), note)


def _beside(outcome: Outcome, run: str, key: str, text: Text) -> str:
    said = []
    for name in ("random", "null"):
        found = list(outcome.values(f"analyze:{run}:{key}_{name}.mean").values())
        if found:
            said.append(f"{name} {text(math.fsum(found) / len(found))}")
    return f" ({', '.join(said)})" if said else ""


def coverage_table(outcome: Outcome) -> Table:
    """Both coverages at 10 %: seen, random, null, excess; core, then as published (all matrices)."""
    rows = []
    for mask in ("principal", "low_magnitude"):
        for run in outcome.study.tables.main:
            for end, said in (("_core", "core"), ("", "all")):
                key = f"analyze:{run}:{mask}_coverage_10pct{end}"
                if not outcome.values(f"{key}.pooled"):
                    continue
                cells = [_over(outcome, f"{key}.{one}", percent) for one in ("pooled", "random", "null")]
                rows.append((f"{_spoken(mask)}, {run}, {said}", *cells, _over(outcome, f"{key}.excess", number)))
        for row in PUBLISHED:
            seen = row.principal_coverage if mask == "principal" else row.low_magnitude_coverage
            if seen is not None:
                rows.append((f"{_spoken(mask)}, {PAPER}{row.name}", percent(seen), percent(0.1), DASH, DASH))
    note = (
        f"Share of the visible updates inside the 10 % masks. {SEEDS} Null: what rounding to bf16 makes of an update "
        "without any preference; the paper has none. Excess: seen ÷ null. Core: without embedding and LM head, which "
        "the null misfits; the paper's are over all matrices."
    )
    return Table("Main table: coverages", ("share of updates in mask", "seen", "random", "rounding null", "excess"),
                 tuple(rows), note)  # fmt: skip


def _spoken(mask: str) -> str:
    return mask.replace("_", "-")


def energy_table(outcome: Outcome) -> Table:
    """Share of ‖Δ‖² by role."""
    roles = ("ffn", "attention", "embedding", "lm_head", "vision", "norm")
    rows = []
    for run in outcome.study.tables.main:
        rows.append(
            (_named(outcome, run), *(_over(outcome, f"analyze:{run}:energy_share.{role}", percent) for role in roles))
        )
    parts = [step for step in outcome.numbers if step.startswith("analyze:")]
    if parts:
        shares = outcome.numbers[parts[0]].get("parameter_share") or {}
        rows.append(("(share of the parameters)", *(percent(shares.get(role, 0.0)) for role in roles)))
    rows += [
        (PAPER + row.name, percent(row.ffn), percent(row.attention), percent(row.embedding), percent(row.lm_head),
         percent(row.other), DASH)
        for row in ENERGY_SHARES
    ]  # fmt: skip
    heads = ("run", "FFN", "attention", "embedding", "LM head", "vision (paper: other)", "norm")
    return Table("Energy of the update by role", heads, tuple(rows), f"{SEEDS} A tied LM head counts as embedding.")


def overlap_table(outcome: Outcome) -> Table:
    """Every ordered pair of every comparison, over the core, then the published pairs."""
    rows = []
    for name in outcome.study.comparisons:
        runs = (outcome.numbers.get(f"compare:{name}") or {}).get("runs", ())
        for a in runs:
            for b in runs:
                pair = outcome.pair(name, a, b) if a != b else None
                if pair is None:
                    continue
                v: Mapping[str, Any] = pair["core"] or pair
                rows.append(
                    (f"{a} in {b}", percent(v.get("a_in_b")), percent(v.get("a_in_b_random")),
                     percent(v.get("a_in_b_null")), number(v.get("a_in_b_excess")), percent(v.get("sign_agreement")),
                     number(v.get("cosine")), number(v.get("sim16_right")))
                )  # fmt: skip
    rows += [
        (f"{PAPER}{one.a} in {one.b}", percent(one.a_in_b), percent(one.random), DASH, DASH, DASH, DASH, DASH)
        for one in OVERLAPS
    ]
    note = (
        "Share of the first run's visible updates that the second one made too. Ours without embedding and LM head; "
        "random is Σ p_A·p_B over tensors (the paper's: the second one's density). Null: two updates without any "
        "preference, each rounded. Signs agree in 50 % by chance."
    )
    heads = ("updates of", "seen", "random", "rounding null", "seen ÷ null", "signs agree", "cosine", "Sim₁₆")
    return Table("Overlap of visible updates", heads, tuple(rows), note)


def subnetwork_table(outcome: Outcome) -> Table:
    """Accuracy along the run and at its end of the runs in `tables.subnetwork`."""
    study = outcome.study
    steps = study.evaluate.steps
    rows = []
    for run in ("source", *study.tables.subnetwork):
        curve = [_over(outcome, f"eval:{run}@{step}:accuracy", percent, plain=True) for step in steps]
        late = _late(outcome, run)
        density = _over(outcome, f"mask:{run}:density", percent, plain=True)
        if density == DASH and run != "source" and not isinstance(study.runs.get(run) and study.runs[run].mask, MaskOf):
            density = "100 %"
        rows.append(
            (
                _named(outcome, run),
                density,
                *curve,
                _over(outcome, f"eval:{run}:accuracy", percent),
                _said(late, percent),
            )
        )
    blank = (DASH,) * len(steps)
    rows += [
        (f"{PAPER}{name} (AIME24/25: peak, late)", percent(density), *blank, _score(peak), _score(late_average))
        for name, density, peak, late_average in SUBNETWORKS
    ]
    rows += [
        (f"{PAPER}{name} (Geo3K: peak, last five)", DASH, *blank, _score(peak), _score(last))
        for name, peak, _, last in SUBNETWORKS_VLM
    ]
    note = (
        f"{SEEDS} Accuracy on {study.evaluate.problems} held-out problems, at snapshots on "
        f"{study.evaluate.curve_problems} (means). Late average: of the last two snapshots and the end. Peaks are not "
        "shown for ours: the largest of several noisy numbers is too high."
    )
    heads = ("trained", "density", *(f"step {step}" for step in steps), "accuracy", "late average")
    return Table("Training only a subnetwork", heads, tuple(rows), note)


def _late(outcome: Outcome, run: str) -> list[float]:
    """Of each seed, the mean of the end and of the last two snapshots, where all three are there."""
    places = [f"eval:{run}@{step}:accuracy" for step in outcome.study.evaluate.steps[-2:]] + [f"eval:{run}:accuracy"]
    found = [outcome.values(place) for place in places] if len(places) == 3 else [{}]
    seeds = [seed for seed in found[0] if all(seed in values for values in found)]
    return [math.fsum(values[seed] for values in found) / len(found) for seed in seeds]


def optimizer_table(outcome: Outcome) -> Table:
    """Every run of the learning-rate search: final accuracy, sparsity, the two diagnostics."""
    rows = []
    for run in outcome.study.tables.optimizers:
        best = {one.name for one in outcome.instances(run)}
        for one in expand(outcome.study):
            if one.run != run:
                continue
            cells = [outcome.number(f"eval:{one.name}", "accuracy"), outcome.number(f"analyze:{one.name}", "sparsity")]
            rate = outcome.number(f"train:{one.name}", "learning_rate")
            diagnostics = [_diagnostic(outcome, one, key) for key in ("momentum_gradient_cosine", "rms_variation")]
            mark = " (best rate)" if one.name in best else ""
            said = DASH if rate is None else f"{rate:g}"
            rows.append((f"{one.name}{mark}", said, percent(cells[0]), percent(cells[1]), *diagnostics))
    rows += [
        (f"{PAPER}{name} (AIME24/25)", f"{rate:g}", f"{_score(final)}, peak {_score(peak)}", DASH,
         "0.958, 0.280, 0.008" if name == "AdamW" else DASH, "mean 4.85" if name == "AdamW" else DASH)
        for name, rate, peak, final in OPTIMIZERS
    ]  # fmt: skip
    note = (
        "Three learning rates each, then the best one with another seed. m·g: cosine of the first moment with the "
        "gradient; √v: coefficient of variation of √v over coordinates; at the start, mean along the run, at the end."
    )
    heads = ("run", "learning rate", "accuracy", "sparsity", "m·g", "√v")
    return Table("Optimizers", heads, tuple(rows), note)


def _diagnostic(outcome: Outcome, one: Instance, key: str) -> str:
    values = [outcome.number(f"train:{one.name}", f"diagnostics.{key}.{at}") for at in ("first", "mean", "last")]
    return DASH if values[1] is None else ", ".join(number(value) for value in values)


# Measured as docs/trajectory.md says ("How to read locked_at").
YARDSTICK = (
    "Beside it: random parts of two final updates, which have no order of their own, pass 0.8 where they hold "
    "50 to 60 % of the coordinates."
)


def trajectory_tables(outcome: Outcome) -> list[Table]:
    """One table a trajectory."""
    tables = []
    for step, numbers in outcome.numbers.items():
        if not step.startswith("trajectory:"):
            continue
        rows = tuple(
            (str(one["step"]), percent(one["relative_norm"]), percent(one["sparsity"]), number(one["stable_rank"]),
             number(one["stable_rank_null"]), number(one["sim16_right_end"]), number(one["sim16_right_end_null"]),
             percent(one["jaccard_end"]), percent(one["jaccard_end_null"]))
            for one in numbers["checkpoints"]
        )  # fmt: skip
        locked = numbers["locked_at"]
        note = (
            "Not locked before the last checkpoint." if locked is None
            else f"Locked at step {locked}: Sim₁₆ to the end stays above 0.8 from there."
        )  # fmt: skip
        note += f" {YARDSTICK}"
        heads = ("step", "rel. norm", "sparsity", "stable rank", "its null", "Sim₁₆ to the end", "its null",
                 "Jaccard with the end", "its null")  # fmt: skip
        tables.append(Table(f"Along {step.partition(':')[2]}", heads, rows, note))
    return tables


def claims_table(outcome: Outcome) -> Table:
    """Every claim with its verdict, effect and interval."""
    rows = []
    for claim in outcome.study.claims:
        verdict = outcome.verdict(claim)
        text = percent_points if claim.unit == "fraction" else number
        effect = DASH if verdict.effect is None else _bracketed(verdict.effect, text)
        seeds = DASH if verdict.effect is None else str(verdict.effect.n)
        explained = DASH if verdict.explained is None else f"{verdict.explained:.0%}"
        where = f" ({claim.where})" if claim.where else ""
        rows.append((f"{claim.text}{where}", verdict.verdict, effect, seeds, explained, verdict.why))
    heads = ("claim", "verdict", "effect [95 %]", "n", "of it by the control", "why")
    return Table("The paper's claims", heads, tuple(rows), "The rule of each is printed below.")


def runs_table(outcome: Outcome) -> Table:
    """Every run: what was trained, accuracy, and what was not run."""
    rows = []
    for one in expand(outcome.study):
        spec = outcome.study.runs[one.run]
        trained: Mapping[str, Any] = outcome.numbers.get(f"train:{one.name}") or {}
        evaluated: Mapping[str, Any] = outcome.numbers.get(f"eval:{one.name}") or {}
        if spec.checkpoint is None and not trained:
            rows.append((one.name, spec.method or DASH, NOT_RUN, DASH, DASH, DASH))
            continue
        low, high = evaluated.get("low"), evaluated.get("high")
        within = "" if low is None or high is None else f" ({percent(low)} to {percent(high)})"
        rate = trained.get("learning_rate")
        said = DASH if rate is None else f"{rate:g}"
        steps = str(trained.get("steps", DASH))
        seconds = trained.get("seconds")
        rows.append(
            (one.name, spec.method or "checkpoint", steps, said, percent(evaluated.get("accuracy")) + within,
             DASH if seconds is None else f"{seconds:,.0f}")
        )  # fmt: skip
    note = (
        f"Accuracy on {outcome.study.evaluate.problems} held-out problems (95 % interval over problems). "
        "Seconds: of training, in its last call, with whatever else the machine did."
    )
    heads = ("run", "method", "steps", "learning rate", "accuracy", "seconds")
    return Table("Every run", heads, tuple(rows), note)


def _named(outcome: Outcome, run: str) -> str:
    """The run's name, with how many of its seeds were measured where that is not all."""
    every = [one for one in expand(outcome.study) if run in (one.run, one.name)]
    made = sum(f"eval:{one.name}" in outcome.numbers or f"analyze:{one.name}" in outcome.numbers for one in every)
    if made == len(every):
        return run
    return f"{run} ({made} of {len(every)} seeds)" if made else f"{run} ({NOT_RUN})"


def percent_points(value: float | None) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:+.3g}"


def _bracketed(effect: Interval, text: Text) -> str:
    if not math.isfinite(effect.low):
        return text(effect.mean)
    return f"{text(effect.mean)} [{text(effect.low)}, {text(effect.high)}]"


def _over(outcome: Outcome, reference: str, text: Text, *, plain: bool = False) -> str:
    """A number over seeds with its interval, or `plain` without."""
    return _said(outcome.values(reference).values(), text, plain=plain)


def _said(values: Iterable[float], text: Text, *, plain: bool = False) -> str:
    found = list(values)
    if not found:
        return DASH
    over = interval(found)
    return text(over.mean) if plain or over.n == 1 or over.low == over.high else _bracketed(over, text)


def _score(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f} %"
