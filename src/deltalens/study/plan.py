"""From a study to its steps, each with what it rests on, in an order in which they can be made."""

from __future__ import annotations

from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError
from deltalens.study.spec import Instance, MaskOf, SmallVLM, Study, expand, instance_of
from deltalens.train.config import METHODS, load_config

__all__ = ["ModelRef", "Plan", "Step", "model_of", "plan", "select", "train_config"]

_OWN = ("method", "checkpoint", "model", "teacher", "mask", "seeds", "rates", "best_seeds")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model: where it lies in the study's folder and the step that makes it, or a folder or Hub id (`step` None)."""

    spec: str
    step: str | None = None

    def path(self, folder: Path) -> str:
        """What to give to `analyze` and its like; `embedded` is left to the caller."""
        return self.spec if self.step is None else str(folder / self.spec)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to make.

    Attributes:
        id: `KIND:NAME`; kinds are build, train, mask, eval, analyze, compare, trajectory.
        config: plain values that decide what comes out.
        models: models that it reads, by their part in it.
        parents: ids of the steps that it rests on.
        runs: runs and instances that it belongs to, for `--only` and groups.
    """

    id: str
    config: dict[str, Any] = field(hash=False)
    models: dict[str, ModelRef] = field(default_factory=dict, hash=False)
    parents: tuple[str, ...] = ()
    runs: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        return self.id.partition(":")[0]

    @property
    def name(self) -> str:
        return self.id.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Plan:
    """A study's steps by id, in order."""

    study: Study
    steps: dict[str, Step]


def plan(study: Study) -> Plan:
    """The steps of a study in an order in which each comes after those that it rests on.

    Every training config is validated; nothing is fetched.

    Raises:
        ConfigError: a config is not valid, a name refers to no run, or runs rest on each other in a circle.
    """
    _refuse_circles(study)  # before names are followed
    found: dict[str, Step] = {}
    if isinstance(study.source, SmallVLM):
        found["build:source"] = _step("build:source", study.source.model_dump(), {}, (), {"source"})
    found["eval:source"] = _evaluation(study, "source", _source(study), frozenset({"source"}))
    for one in expand(study):
        if study.runs[one.run].checkpoint is None:
            for step in _training(study, one):
                found.setdefault(step.id, step)
        for step in _measuring(study, one):
            found[step.id] = step
    for name, runs in study.comparisons.items():
        chosen = _chosen(study, runs)
        starts = {_start(study, one) for one in chosen}
        if len(starts) > 1:
            raise ConfigError(f"study {study.name}: comparison {name}: its runs do not all start from one model")
        models = {"source": starts.pop(), **{one.name: model_of(study, one.name) for one in chosen}}
        config = {"runs": [one.name for one in chosen], "null_draws": study.analyze.compare_draws}
        found[f"compare:{name}"] = _step(f"compare:{name}", config, models, (), {name})
    for name in study.trajectories:
        one = instance_of(study, name)
        models = {"source": _start(study, one), "run": model_of(study, one.name)}
        config = {"null_draws": study.analyze.compare_draws, "spectrum": study.analyze.spectrum}
        found[f"trajectory:{one.name}"] = _step(f"trajectory:{one.name}", config, models, (), {one.run, one.name})
    order = TopologicalSorter({step.id: step.parents for step in found.values()}).static_order()
    return Plan(study, {key: found[key] for key in order})


def select(made: Plan, only: str | None) -> set[str]:
    """The steps that `--only` asks for, without those that they rest on; all of them for None.

    Raises:
        ConfigError: there is no such run, comparison or group.
    """
    if only is None:
        return set(made.steps)
    study = made.study
    if only in study.groups:
        wanted = {"source", *study.groups[only]}
    elif only in study.comparisons or only in study.runs or only == "source":
        wanted = {only}
    else:
        wanted = {instance_of(study, only).name}
    return {step.id for step in made.steps.values() if step.runs & wanted}


def model_of(study: Study, name: str, seed: int | None = None) -> ModelRef:
    """The model that a name means: `source`, a run, `RUN@STEP`, or else a folder or Hub id."""
    if name == "source":
        return _source(study)
    run, _, at = name.partition("@")
    if run not in study.runs and not any(one.name == run for one in expand(study)):
        return ModelRef(name)
    one = instance_of(study, run, seed)
    checkpoint = study.runs[one.run].checkpoint
    if checkpoint is not None:
        return ModelRef(checkpoint)
    if at and not at.isdecimal():
        raise ConfigError(f"study {study.name}: {name}: behind the @ stands the step of a snapshot, as in {run}@300")
    return ModelRef(f"runs/{one.name}/" + (f"steps/step-{at}" if at else "model"), f"train:{one.name}")


def _source(study: Study) -> ModelRef:
    return ModelRef("source", "build:source") if isinstance(study.source, SmallVLM) else ModelRef(study.source)


def _start(study: Study, one: Instance) -> ModelRef:
    return model_of(study, study.runs[one.run].model, one.seed)


def _chosen(study: Study, names: list[str]) -> list[Instance]:
    return [instance_of(study, name) for name in names]


def _step(
    name: str, config: dict[str, Any], models: dict[str, ModelRef], parents: tuple[str, ...], runs: set[str]
) -> Step:
    made_by = [model.step for model in models.values() if model.step is not None]
    return Step(name, config, models, tuple(dict.fromkeys((*made_by, *parents))), frozenset(runs))


def _training(study: Study, one: Instance) -> list[Step]:
    """The run's training, and its mask before it."""
    spec = study.runs[one.run]
    method = spec.method or ""
    extra = dict(spec.model_extra or {})
    known = METHODS[method].model_fields if method in METHODS else {}
    defaults = {key: value for key, value in study.defaults.items() if key in known or key not in _any_key()}
    config = {"method": method, "task": study.task, **defaults, **extra, "seed": one.seed}
    if one.rate is not None:
        config["learning_rate"] = one.rate
    models, steps, parents = {"model": _start(study, one)}, [], []
    if spec.teacher is not None:
        if method == "opsd":  # its teacher is itself: base, ema or live
            config["teacher"] = spec.teacher
        else:
            models["teacher"] = model_of(study, spec.teacher, one.seed)
    if isinstance(spec.mask, MaskOf):
        mask = _mask(study, one, spec.mask)
        steps += mask
        parents.append(mask[-1].id)
        config["mask"] = f"masks/{one.name}.mask"
    elif spec.mask is not None:
        config["mask"] = spec.mask
    if one.best:
        config["rates"] = {f"{rate:g}": f"{one.run}-{rate:g}-s{spec.seeds[0]}" for rate in spec.rates}
        parents += [f"eval:{other}" for other in config["rates"].values()]
    steps.append(_step(f"train:{one.name}", config, models, tuple(parents), {one.run, one.name}))
    _check(study, steps[-1])
    return steps


def _any_key() -> set[str]:
    return {key for kind in METHODS.values() for key in kind.model_fields}


def train_config(step: Step, folder: Path, rate: float | None = None) -> Any:
    """The `deltalens train` config of a train step, with its models and its mask in the study's folder."""
    content = {key: value for key, value in step.config.items() if key != "rates"}
    content |= {part: model.path(folder) for part, model in step.models.items()}
    if step.config.get("mask", "").startswith("masks/"):
        content["mask"] = str(folder / step.config["mask"])
    if rate is not None:
        content["learning_rate"] = rate
    return load_config(content)


def _check(study: Study, step: Step) -> None:
    try:
        rates = step.config.get("rates")
        train_config(step, Path("."), float(next(iter(rates))) if rates else None)
    except ConfigError as error:
        raise ConfigError(f"study {study.name}: run {step.name}: {str(error).removeprefix('config: ')}") from None


def _mask(study: Study, one: Instance, mask: MaskOf) -> list[Step]:
    """The mask's step, after the one of the mask that it is like where that is a run's visible update."""
    from deltalens.subnetwork.rules import SELECTIONS, split_rule

    kind = split_rule(mask.select, SELECTIONS).kind
    steps, parents, runs = [], [], {one.run, one.name}
    models = {"source": _start(study, one)}
    config: dict[str, Any] = {"select": mask.select, "roles": mask.roles, "layers": mask.layers, "seed": one.seed}
    config["task"] = study.task
    if mask.origin is not None:
        models["trained"] = model_of(study, mask.origin, one.seed)
        if models["trained"].step is None and mask.origin in study.runs and kind == "first":
            raise ConfigError(f"study {study.name}: run {one.run}: {mask.origin} has no snapshots, it is not trained")
    if mask.like is not None:
        other = instance_of(study, mask.like, one.seed)
        if study.runs[other.run].mask is None:
            trained = {"source": _start(study, other), "trained": model_of(study, other.name)}
            visible = {"select": "visible", "roles": None, "layers": None, "seed": 0, "task": study.task}
            steps.append(_step(f"mask:{other.name}", visible, trained, (), {other.run, other.name}))
        parents.append(f"mask:{other.name}")
        config["like"] = f"masks/{other.name}.mask"
    steps.append(_step(f"mask:{one.name}", config, models, tuple(parents), runs))
    return steps


def _evaluation(study: Study, name: str, model: ModelRef, runs: frozenset[str], at: int | None = None) -> Step:
    asked = study.evaluate
    config = {
        "tasks": asked.tasks or [study.task],
        "problems": asked.problems if at is None else asked.curve_problems,
        "samples": asked.samples,
        "max_new_tokens": asked.max_new_tokens,
    }
    return _step(f"eval:{name}" + (f"@{at}" if at is not None else ""), config, {"model": model}, (), set(runs))


def _measuring(study: Study, one: Instance) -> list[Step]:
    runs = frozenset({one.run, one.name})
    steps = [_evaluation(study, one.name, model_of(study, one.name), runs)]
    if one.run in study.evaluate.curves or one.name in study.evaluate.curves:
        steps += [
            _evaluation(study, one.name, model_of(study, f"{one.name}@{at}"), runs, at) for at in study.evaluate.steps
        ]
    main = one.run in study.tables.main or one.name in study.tables.main
    config = {"null_draws": study.analyze.null_draws if main else 0, "spectrum": study.analyze.spectrum}
    models = {"source": _start(study, one), "trained": model_of(study, one.name)}
    return [*steps, _step(f"analyze:{one.name}", config, models, (), set(runs))]


def _refuse_circles(study: Study) -> None:
    rests: dict[str, set[str]] = {}
    for run, spec in study.runs.items():
        named = [spec.model, *([spec.teacher] if spec.teacher and spec.method != "opsd" else [])]
        if isinstance(spec.mask, MaskOf):
            for name in filter(None, (spec.mask.origin, spec.mask.like)):
                instance_of(study, name)  # these can be runs only
                named.append(name)
        rests[run] = {one.run for name in named for one in expand(study) if name.split("@")[0] in (one.run, one.name)}
    try:
        list(TopologicalSorter(rests).static_order())
    except CycleError as error:
        circle = " → ".join(error.args[1])
        raise ConfigError(f"study {study.name}: runs rest on each other in a circle: {circle}") from None
