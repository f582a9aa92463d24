"""What a study is: one YAML file, validated before anything is loaded; and the runs that it stands for.

A study names a source, the runs made from it (teachers and masks are other runs, by name), what is measured of them,
and the claims to be judged, each with its rule. docs/study.md describes every key.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltalens.errors import ConfigError

__all__ = [
    "Analyze",
    "Claim",
    "Evaluate",
    "Instance",
    "MaskOf",
    "RunSpec",
    "Scale",
    "SmallVLM",
    "Study",
    "Tables",
    "expand",
    "instance_of",
    "load_study",
    "packaged_studies",
]

STUDIES = Path(__file__).parent / "studies"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class MaskOf(_Strict):
    """A run's mask; the keys are those of `deltalens mask`.

    Attributes:
        select: the rule.
        origin: in YAML `from`: the run whose update the rule looks at (`visible`, `top`, `first`).
        like: a run with a mask, whose densities are matched; of a run without one, its visible update is.
        roles, layers: only these.
    """

    select: str = "visible"
    origin: str | None = Field(default=None, alias="from")
    like: str | None = None
    roles: str | None = None
    layers: str | None = None


class RunSpec(BaseModel):
    """A run, or several that differ in seed and learning rate. Any other key is one of `deltalens train`'s.

    Attributes:
        method: of training; not given with `checkpoint`.
        checkpoint: a published checkpoint, to be measured only: nothing is trained.
        model: what it starts from: `source`, a run, a run's snapshot (`teacher@300`), a folder or a Hub id.
        teacher: a run, a folder or a Hub id; of `opsd` as in `deltalens train`.
        mask: how its mask is made, or a mask file.
        seeds: one run each. The draw of a mask takes the same seed.
        rates: one run for each of these learning rates too.
        best_seeds: these seeds more, at the rate whose accuracy was highest.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    method: str | None = None
    checkpoint: str | None = None
    model: str = "source"
    teacher: str | None = None
    mask: MaskOf | str | None = None
    seeds: list[int] = Field(default=[0], min_length=1)
    rates: list[float] = []
    best_seeds: list[int] = []


class SmallVLM(_Strict):
    """The source is built: the keys are those of `deltalens small-vlm`."""

    text_layers: int | None = None
    vision_layers: int = 4
    hidden: int = 192
    seed: int = 0


class Evaluate(_Strict):
    """How runs are evaluated.

    Attributes:
        problems: held-out problems at a run's end.
        samples, max_new_tokens: as in `deltalens eval`.
        tasks: the study's task unless given; accuracy is their mean.
        curves: runs evaluated at snapshots too.
        steps: those snapshots.
        curve_problems: held-out problems there.
    """

    problems: int = Field(default=500, ge=1)
    samples: int = Field(default=1, ge=1)
    max_new_tokens: int | None = None
    tasks: list[str] = []
    curves: list[str] = []
    steps: list[int] = []
    curve_problems: int = Field(default=300, ge=1)


class Analyze(_Strict):
    """How weights are analysed: runs in `tables.main` with `null_draws` simulated nulls, the others without."""

    null_draws: int = Field(default=5, ge=0)
    compare_draws: int = Field(default=3, ge=0)
    spectrum: Literal["exact", "fast", "none"] = "exact"


class Claim(_Strict):
    """A claim of a paper and the rule that decides it, stated before there are results.

    Attributes:
        id, text, where: a short name, the claim, and where it is made.
        rule: `above`, `below` (what is seen beside `chance`, and beyond `control` where one is given) or `same`.
        seen, chance, control: numbers of the study, `KIND:RUN:KEY` (docs/study.md); `chance` may be a plain number.
        margin: an effect counts from here on; of `same`, the largest difference that does not matter.
        share: `explained by rounding` if the control gives this share of the effect.
        spread: half-width of the interval where there is one seed only.
        unit: `fraction` (shown in percentage points) or `number`.
    """

    id: str
    text: str
    where: str = ""
    rule: Literal["above", "below", "same"]
    seen: str
    chance: str | float
    control: str | None = None
    margin: float = Field(default=0.0, ge=0)
    share: float = Field(default=0.9, gt=0, le=1)
    spread: float | None = Field(default=None, ge=0)
    unit: Literal["fraction", "number"] = "fraction"


class Tables(_Strict):
    """Which runs each table of the page lists."""

    main: list[str] = []
    subnetwork: list[str] = []
    optimizers: list[str] = []


class Scale(_Strict):
    """What a variant of the study changes: `keep` these runs only; the rest replaces keys of the study."""

    keep: list[str] = []
    defaults: dict[str, Any] = {}
    runs: dict[str, dict[str, Any]] = {}
    evaluate: dict[str, Any] = {}
    analyze: dict[str, Any] = {}
    comparisons: dict[str, list[str]] | None = None
    trajectories: list[str] | None = None


class Study(_Strict):
    """A whole study; `lacking` says for a table or figure of the paper why it is not here."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    title: str = ""
    source: str | SmallVLM = "embedded"
    task: str = "sums"
    defaults: dict[str, Any] = {}
    runs: dict[str, RunSpec] = Field(min_length=1)
    evaluate: Evaluate = Evaluate()
    analyze: Analyze = Analyze()
    comparisons: dict[str, list[str]] = {}
    trajectories: list[str] = []
    groups: dict[str, list[str]] = {}
    tables: Tables = Tables()
    claims: list[Claim] = []
    lacking: dict[str, str] = {}
    notes: list[str] = []
    scales: dict[str, Scale] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One run of a study: `name` is its folder's; `rate` None: the run's own; `best`: to be chosen among `rates`."""

    name: str
    run: str
    seed: int
    rate: float | None = None
    best: bool = False


def packaged_studies() -> list[str]:
    """Names of the studies that come with deltalens."""
    return sorted(file.stem for file in STUDIES.glob("*.yaml"))


def load_study(source: str | Path | dict[str, Any], scale: str = "full") -> Study:
    """The validated study.

    Args:
        source: the name of a packaged study, a YAML file, or its content.
        scale: `full`, or one of the study's `scales`; the study's name then ends in it.

    Raises:
        ConfigError: there is no such study or scale, the file is not YAML, a key is unknown (the nearest known one is
            named), a value cannot be, or a name refers to no run.
    """
    where, content = _content(source)
    study = _validated(where, content)
    if scale != "full":
        if scale not in study.scales:
            known = ", ".join(["full", *study.scales])
            raise ConfigError(f"{where}: has no scale {scale!r}; it has {known}")
        study = _validated(f"{where} at scale {scale}", _scaled(content, study.scales[scale], scale))
    _check_names(where, study)
    return study


def expand(study: Study) -> list[Instance]:
    """Every run of a study, in the order of the file."""
    found = []
    for run, spec in study.runs.items():
        rates: list[float | None] = [*spec.rates] or [None]
        for rate in rates:
            middle = "" if rate is None else f"-{rate:g}"
            found += [Instance(name=f"{run}{middle}-s{s}", run=run, seed=s, rate=rate) for s in spec.seeds]
        found += [Instance(name=f"{run}-best-s{s}", run=run, seed=s, best=True) for s in spec.best_seeds]
    return found


def instance_of(study: Study, name: str, seed: int | None = None) -> Instance:
    """The one run that a name means: an instance's own name, or of a run's the one of this seed, else its first.

    Raises:
        ConfigError: there is none (the nearest is named), or a run with several rates is not one run.
    """
    instances = expand(study)
    for one in instances:
        if one.name == name:
            return one
    of_run = [one for one in instances if one.run == name]
    if not of_run:
        known = [*study.runs, *(one.name for one in instances)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(study.runs)}"
        raise ConfigError(f"study {study.name}: there is no run {name!r}{hint}")
    if study.runs[name].rates:
        raise ConfigError(f"study {study.name}: {name} is a run for each of several rates; name one: {of_run[0].name}")
    return next((one for one in of_run if one.seed == seed), of_run[0])


def _content(source: str | Path | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(source, dict):
        return "study", source
    path = STUDIES / f"{source}.yaml"
    if not path.is_file():
        path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{source}: is neither a study that comes with deltalens ({', '.join(packaged_studies())}) nor a YAML file"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values such as `name: my-study`")
    return str(source), content


def _validated(where: str, content: dict[str, Any]) -> Study:
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(_said(mistake) for mistake in error.errors())}") from None


_KINDS: dict[str, type[BaseModel]] = {
    "evaluate": Evaluate, "analyze": Analyze, "tables": Tables, "claims": Claim, "scales": Scale, "mask": MaskOf,
}  # fmt: skip


def _said(mistake: Any) -> str:
    path = [str(part) for part in mistake["loc"]]
    if mistake["type"] == "extra_forbidden":
        kind = next((_KINDS[part] for part in reversed(path[:-1]) if part in _KINDS), Study)
        known = [field.alias or name for name, field in kind.model_fields.items()]
        near = difflib.get_close_matches(path[-1], known, n=1)
        return f"unknown key {'.'.join(path)!r}" + (f"; did you mean {near[0]}?" if near else "")
    if mistake["type"] == "missing":
        return f"{'.'.join(path)} is missing"
    return f"{'.'.join(path)}: {mistake['msg'].removeprefix('Value error, ')} (it is {mistake['input']!r})"


def _scaled(content: dict[str, Any], scale: Scale, name: str) -> dict[str, Any]:
    """The study's content as the scale changes it; what names a run that is left out is left out too."""
    kept = set(scale.keep or content["runs"])
    strange = [run for run in (*kept, *scale.runs) if run not in content["runs"]]
    if strange:
        raise ConfigError(f"scale {name}: there is no run {strange[0]!r} in the study")
    out = {key: value for key, value in content.items() if key != "scales"}
    out["name"] = f"{content['name']}-{name}"
    out["defaults"] = {**content.get("defaults", {}), **scale.defaults}
    out["runs"] = {run: {**spec, **scale.runs.get(run, {})} for run, spec in content["runs"].items() if run in kept}
    measured = set(content.get("comparisons", {})) | kept

    def held(names: list[str]) -> list[str]:
        return [one for one in names if one in measured or one in instances]

    instances = {one.name for one in expand(_validated(name, {"name": "x", "runs": out["runs"]}))}
    evaluate = {**content.get("evaluate", {}), **scale.evaluate}
    out["evaluate"] = {**evaluate, "curves": held(evaluate.get("curves", []))}
    out["analyze"] = {**content.get("analyze", {}), **scale.analyze}
    comparisons = content.get("comparisons", {}) if scale.comparisons is None else scale.comparisons
    found = {key: held(names) for key, names in comparisons.items()}
    out["comparisons"] = {key: names for key, names in found.items() if len(names) > 1}
    out["trajectories"] = held(content.get("trajectories", []) if scale.trajectories is None else scale.trajectories)
    measured = kept | set(out["comparisons"])
    out["groups"] = {key: held(names) for key, names in content.get("groups", {}).items() if held(names)}
    out["tables"] = {key: held(names) for key, names in content.get("tables", {}).items()}
    return out


def _check_names(where: str, study: Study) -> None:
    instances = {one.name for one in expand(study)}
    for run, spec in study.runs.items():
        if (spec.method is None) == (spec.checkpoint is None):
            raise ConfigError(f"{where}: run {run} needs either a method (it is trained) or a checkpoint (it is not)")
        if spec.best_seeds and not spec.rates:
            raise ConfigError(f"{where}: run {run} has best_seeds but no rates to choose the best of")
    named = {
        "trajectories": study.trajectories,
        "evaluate.curves": study.evaluate.curves,
        **{f"comparisons.{key}": names for key, names in study.comparisons.items()},
        **{f"tables.{key}": names for key, names in study.tables.model_dump().items()},
        **{f"groups.{key}": names for key, names in study.groups.items()},
    }
    for key, names in named.items():
        known = [*study.runs, *instances, *(study.comparisons if key.startswith("groups.") else ())]
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{where}: {key} names {name!r}, and there is no such run{hint}")
