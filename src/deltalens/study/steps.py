"""Making one step of a study: a call of deltalens' own functions, and the small numbers that are kept of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError
from deltalens.files import whole_file
from deltalens.study.plan import ModelRef, Step, train_config

__all__ = ["PERFORM", "Made", "identity", "made_at", "perform", "restore", "run_config"]

Numbers = dict[str, Any]
Made = tuple[str, Numbers]
"""Hash of what was made, and its small numbers (JSON)."""

_GLOBAL = (
    "tensors", "parameters", "relative_norm", "unchanged_fraction", "sparsity", "top_energy_1pct", "energy_share",
    "effective_rank", "numerical_rank_fraction_1e-4", "hill", "rotation_10pct", "spectral_shift",
)  # fmt: skip
_WITH_NULLS = (
    "stable_rank", "top16_energy", "principal_projection_10pct", "principal_coverage_10pct",
    "low_magnitude_coverage_10pct",
)  # fmt: skip
_PAIR = (
    "density_a", "density_b", "jaccard", "a_in_b", "a_in_b_random", "a_in_b_null", "a_in_b_excess",
    "a_in_b_excess_low", "a_in_b_excess_high", "b_in_a", "b_in_a_random", "b_in_a_null", "sign_agreement", "cosine",
    "sim16_right", "sim16_right_null", "sim16_random",
)  # fmt: skip
_ALONG = (
    "relative_norm", "sparsity", "stable_rank", "stable_rank_null", "sim16_right_end", "sim16_right_end_null",
    "sim16_right_start", "jaccard_end", "jaccard_end_null",
)  # fmt: skip
_DIAGNOSTICS = ("momentum_gradient_cosine", "rms_variation")


def made_at(step: Step, folder: Path) -> Path:
    """The file or folder of a study that a step makes and others read; for measurements, where their tables go."""
    return {
        "build": folder / "source",
        "train": folder / "runs" / step.name,
        "mask": folder / "masks" / f"{step.name}.mask",
        "eval": folder / "evals" / f"{step.name}.json",
        "analyze": folder / "analysis" / step.name,
        "compare": folder / "compare" / step.name,
        "trajectory": folder / "trajectory" / step.name,
    }[step.kind]


def identity(model: ModelRef) -> str:
    """What a model that no step makes is known by: its content where it is a folder, else its name.

    A name is `embedded`, or a Hub id with its revision; nothing is fetched.
    """
    if model.step is not None:
        return ""
    path = Path(model.spec).expanduser()
    if not path.is_dir():
        return model.spec
    from deltalens.train.run import model_hash

    return model_hash(path)


def perform(step: Step, folder: Path, *, rate: float | None = None, quiet: bool = True) -> Made:
    """Make a step; what it reads must be there.

    Args:
        step: of a plan.
        folder: the study's.
        rate: learning rate of a run that takes the best one.
        quiet: no progress of the training.

    Raises:
        DeltalensError: what the step calls raises it.
    """
    return PERFORM[step.kind](step, folder, rate, quiet)


def restore(step: Step, folder: Path, patch: Path, output: str) -> None:
    """Make a run's trained model, and nothing else of the run, from a patch of what it started from.

    Raises:
        DeltalensError: the patch cannot be applied, or gives another model than the record (`output`) says.
    """
    from deltalens.patch import apply
    from deltalens.train.run import model_hash

    model = made_at(step, folder) / "model"
    apply(_model(step.models["model"], folder), [patch], model)
    if model_hash(model) != output:
        raise ConfigError(f"{patch}: gives another model than the record of {step.name} says; remove it, and {model}")


def _build(step: Step, folder: Path, rate: float | None, quiet: bool) -> Made:
    from deltalens.train.embedded import embedded_model
    from deltalens.train.run import model_hash
    from deltalens.train.small_vlm import build_small_vlm

    made = made_at(step, folder)
    if not (made / "config.json").is_file():
        build_small_vlm(embedded_model(), made, **step.config)
    return model_hash(made), {}


def run_config(step: Step, folder: Path, rate: float | None = None) -> Any:
    """The config of a train step in the precision in which it is trained: that of the run where it was begun, else
    float32 where bfloat16 has no instructions and the weights are float32, unless the study says which.

    It is not in the step's hash: like the kind of processor, which changes a run's bits too, it is named in the record.
    """
    from deltalens.train.models import bfloat16_is_emulated

    run = train_config(step, folder, rate)
    begun = made_at(step, folder) / "manifest.json"
    if begun.is_file():
        precision = _config_in(begun)
    else:
        slow = run.weights == "float32" and bfloat16_is_emulated()  # bfloat16 weights are multiplied as they are
        precision = {"bf16": False, "teacher_dtype": "float32"} if slow else {}
    open_to_choice = {"bf16", "teacher_dtype"} & set(type(run).model_fields) - set(step.config)
    return run.model_copy(update={key: precision[key] for key in sorted(open_to_choice) if key in precision})


def _config_in(manifest: Path) -> Numbers:
    try:
        return dict(json.loads(manifest.read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # `train` says what is wrong with it


def _train(step: Step, folder: Path, rate: float | None, quiet: bool) -> Made:
    from deltalens.train.run import model_hash, train

    run = run_config(step, folder, rate)
    try:
        made = train(run, made_at(step, folder), quiet=quiet)
    except ConfigError as error:  # a study has no --fresh: hours of training are for a person to remove
        said = str(error).replace("use --fresh to start over, or another folder", "remove it to train it again")
        raise ConfigError(said) from None
    manifest = json.loads((made.folder / "manifest.json").read_text())
    numbers: Numbers = {
        "method": run.method,
        "optimizer": run.optimizer,
        "learning_rate": run.learning_rate,
        "steps": run.steps,
        "weights": run.weights,
        "autocast": "bfloat16" if run.bf16 else None,
        "loss": [made.log[0]["loss"], made.log[-1]["loss"]] if made.log else [],
        "seconds": manifest.get("seconds"),
    }
    if (made.folder / "geometry.parquet").is_file():
        numbers["diagnostics"] = _diagnostics(made.folder / "geometry.parquet")
    return model_hash(made.model), numbers


def _diagnostics(file: Path) -> Numbers:
    """First, mean and last value of the optimizer's two numbers along the run."""
    import polars as pl

    table = pl.read_parquet(file).filter(pl.col("scope") == "global").sort("step")
    found = {}
    for name in _DIAGNOSTICS:
        values = [] if name not in table.columns else [v for v in table[name].to_list() if v is not None and v == v]
        if values:
            found[name] = {"first": values[0], "mean": math.fsum(values) / len(values), "last": values[-1]}
    return found


def _mask(step: Step, folder: Path, rate: float | None, quiet: bool) -> Made:
    from deltalens.subnetwork import SubnetworkMask, select_mask

    made, config = made_at(step, folder), step.config
    if made.is_file():
        mask = SubnetworkMask.load(made)
    else:
        trained = step.models["trained"].path(folder) if "trained" in step.models else None
        if trained is not None and config["select"].startswith("first"):
            trained = str(Path(trained).parent)  # the run's folder, with its snapshots
        mask = select_mask(
            _model(step.models["source"], folder),
            trained,
            rule=config["select"],
            like=folder / config["like"] if "like" in config else None,
            roles=config["roles"],
            layers=config["layers"],
            task=config["task"],
            seed=config["seed"],
        )
        mask.save(made)
    roles = {role: count / max(1, size) for role, (_, size, count) in mask.by_role().items()}
    numbers = {"rule": mask.rule, "density": mask.total_density(), "density_by_role": roles}
    return mask.content_hash(), numbers


def _eval(step: Step, folder: Path, rate: float | None, quiet: bool) -> Made:
    made, asked = made_at(step, folder), step.config
    summaries = _taken_over(made, asked)
    if not summaries:
        from deltalens.train.evaluate import evaluate

        for at, task in enumerate(asked["tasks"]):
            result = evaluate(
                _model(step.models["model"], folder, must=True),
                task,
                samples=asked["samples"],
                problems=asked["problems"],
                max_new_tokens=asked["max_new_tokens"],
            )
            result.save(made.with_name(f"{step.name}.{at}.jsonl"))
            summaries.append(result.summary())
        with whole_file(made) as file:
            file.write_text(json.dumps(summaries, indent=1) + "\n")
    shares = [one["mean_at_k"]["value"] for one in summaries]
    numbers: Numbers = {"accuracy": math.fsum(shares) / len(shares), "truncated": summaries[0]["truncated"]}
    numbers |= {"problems": asked["problems"], "samples": asked["samples"]}
    if len(summaries) == 1:
        numbers |= {"low": summaries[0]["mean_at_k"]["low"], "high": summaries[0]["mean_at_k"]["high"]}
    else:
        numbers["tasks"] = {one["task"]: one["mean_at_k"] for one in summaries}
    return _hash(numbers), numbers


def _taken_over(made: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An evaluation that lies there already (`deltalens eval --json` too) and answers what is asked."""
    if not made.is_file():
        return []
    try:
        content = json.loads(made.read_text())
        found = content if isinstance(content, list) else [content]
        same = [(one["problems"], one["samples"]) for one in found] == [(asked["problems"], asked["samples"])] * len(
            asked["tasks"]
        ) and [one["task"] for one in found] == asked["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ConfigError(f"{made}: is no evaluation of {asked['problems']} problems of {asked['tasks']}; move it away")
    return list(found)


def _analyze(step: Step, folder: Path, rate: float | None, quiet: bool) -> Made:
    from deltalens.analysis import Settings, analyze

    source = _model(step.models["source"], folder)
    trained = _model(step.models["trained"], folder, must=True)
    settings = Settings(null_draws=step.config["null_draws"], spectrum=step.config["spectrum"])
    summary = analyze(source, trained, output=made_at(step, folder), settings=settings).summary
    overall = summary["global"]
    wanted = [*_GLOBAL, *(f"{name}{end}" for name in _WITH_NULLS for end in ("", "_random", "_null", "_core"))]
    numbers: Numbers = {name: overall[name] for name in wanted if name in overall}
    parameters = max(1, overall["parameters"])
    numbers["parameter_share"] = {role: part["parameters"] / parameters for role, part in summary["by_role"].items()}
    numbers["warnings"] = summary["warnings"]
    return _hash(numbers), numbers


def _compare(step: Step, folder: Path, rate: float | None, quiet: bool) -> Made:
    from deltalens.analysis.compare import compare

    names = step.config["runs"]
    result = compare(
        _model(step.models["source"], folder),
        [_model(step.models[name], folder, must=True) for name in names],
        output=made_at(step, folder),
        null_draws=step.config["null_draws"],
    )
    ours = {run["name"]: name for run, name in zip(result.summary["runs"], names, strict=True)}
    pairs = []
    for pair in result.summary["pairs"]:
        values = {key: pair[key] for key in _PAIR if key in pair}
        values["core"] = {key: pair["core"][key] for key in _PAIR if key in (pair.get("core") or {})}
        pairs.append({"a": ours[pair["a"]], "b": ours[pair["b"]], **values})
    numbers = {"runs": names, "pairs": pairs, "warnings": result.summary["warnings"]}
    return _hash(numbers), numbers


def _trajectory(step: Step, folder: Path, rate: float | None, quiet: bool) -> Made:
    from deltalens.analysis import Settings
    from deltalens.analysis.trajectory import trajectory

    snapshots = sorted((Path(step.models["run"].path(folder)).parent / "steps").glob("step-*"))
    if len(snapshots) < 2:
        raise ConfigError(
            f"trajectory of {step.name}: runs/{step.name}/steps holds no two snapshots; the run needs snapshot_every "
            "(remove its folder to train it again)"
        )
    settings = Settings(null_draws=step.config["null_draws"], spectrum=step.config["spectrum"])
    source = _model(step.models["source"], folder)
    summary = trajectory(source, snapshots, output=made_at(step, folder), settings=settings).summary
    along = []
    for one in summary["checkpoints"]:
        values = {name: _median(one["global"].get(name)) for name in _ALONG}
        along.append({"step": one["step"], **values, "energy_share": one["global"].get("energy_share")})
    last = along[-1]["step"]
    locked = summary["locked_at"]
    numbers = {
        "locked_at": locked,
        "locked_share": 1.0 if locked is None or not last else locked / last,  # at the end, if nowhere before
        "locked_at_by_role": summary["locked_at_by_role"],
        "checkpoints": along,
        "warnings": summary["warnings"],
    }
    return _hash(numbers), numbers


def _median(value: Any) -> Any:
    return value.get("median") if isinstance(value, Mapping) else value


def _model(model: ModelRef, folder: Path, *, must: bool = False) -> str:
    """Where a model lies; `embedded` is unpacked. `must`: a snapshot that a run no longer has is an error."""
    if model.step is None and model.spec == "embedded":
        from deltalens.train.embedded import embedded_model

        return str(embedded_model())
    path = model.path(folder)
    if must and model.step is not None and not (Path(path) / "config.json").is_file():
        run = model.step.partition(":")[2]
        raise ConfigError(f"{path}: is not there; remove the folder of run {run} to train it again, with snapshots")
    return path


def _hash(numbers: Numbers) -> str:
    from blake3 import blake3

    return blake3(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


PERFORM: dict[str, Callable[[Step, Path, float | None, bool], Made]] = {
    "build": _build,
    "train": _train,
    "mask": _mask,
    "eval": _eval,
    "analyze": _analyze,
    "compare": _compare,
    "trajectory": _trajectory,
}
