"""Running a study: what has been made is known by the hash of what it rests on, and is not made again.

    FOLDER/records/KIND-NAME.json   what a step rested on (a hash), what it made (a hash), its small numbers
    FOLDER/source runs masks evals analysis compare trajectory   what the steps made
    FOLDER/study.html study.md      the pages

RESULTS (docs/results/study-NAME) holds the records of each group in one small file, to be committed: a step whose
record is there and whose inputs hash to the same is not made again on another machine, unless what it makes is needed.
RESULTS/NAME.patch (`deltalens pack`), where it is there, gives a trained model that others need without training.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltalens._version import __version__
from deltalens.errors import ConfigError
from deltalens.files import whole_file
from deltalens.study import steps as making
from deltalens.study.plan import Plan, Step, plan, select
from deltalens.study.spec import Study

__all__ = ["Record", "Runner", "hash_of", "made_with"]

Record = dict[str, Any]
Report = Callable[[str], None]
SCHEMA = 1
REST = "rest"


class Runner:
    """The steps of one study in one folder.

    Args:
        study: from `load_study`.
        folder: of the runs, the records and the pages.
        results: folder of the committed records; read where it is there.
        perform, restore: make a step, and a trained model from a patch (`deltalens.study.steps`).
        report: called with a line a step.

    Raises:
        ConfigError: the study cannot be planned, or a record cannot be read.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        *,
        results: Path | None = None,
        perform: Callable[..., making.Made] = making.perform,
        restore: Callable[..., None] = making.restore,
        report: Report = lambda line: None,
        quiet: bool = True,
    ) -> None:
        self.study, self.folder, self.results = study, Path(folder), results
        self.plan: Plan = plan(study)
        self._perform, self._restore, self._report, self._quiet = perform, restore, report, quiet
        self.records: dict[str, Record] = {**_committed(results, self.plan), **self._own()}
        self._identities: dict[str, str] = {}

    def run(self, only: str | None = None) -> list[str]:
        """Make what is wanted and not there; returns the ids of the steps made.

        Where a parent made again came out different (another machine), what rests on it is made again too.
        """
        wanted = self.with_parents(select(self.plan, only))
        made: list[str] = []
        while True:
            todo = [step for step in wanted if not self.current(step)]
            if not todo:
                return made
            for at, step in enumerate(todo):
                if not self.current(step):  # a parent of an earlier one may have been made meanwhile
                    self._make(self.plan.steps[step], f"{at + 1}/{len(todo)}", made)

    def with_parents(self, chosen: set[str]) -> list[str]:
        """These steps and what they rest on, in order."""
        found: set[str] = set()
        waiting = list(chosen)
        while waiting:
            step = waiting.pop()
            if step not in found:
                found.add(step)
                waiting += self.plan.steps[step].parents
        return [step for step in self.plan.steps if step in found]

    def current(self, step: str) -> bool:
        """Whether a record says that the step has been made from what it rests on now."""
        record = self.records.get(step)
        return record is not None and record["hash"] == self._hash(self.plan.steps[step])

    def numbers(self) -> dict[str, dict[str, Any]]:
        """The small numbers of every step that has been made and whose inputs are the same still."""
        return {step: self.records[step]["numbers"] for step in self.plan.steps if self.current(step)}

    def outdated(self) -> list[str]:
        """Steps with a record of other inputs."""
        return [step for step in self.plan.steps if step in self.records and not self.current(step)]

    def commit(self, results: Path, command: str) -> list[Path]:
        """Write the current records of each group to `results`; a group without any is left out.

        Raises:
            ConfigError: records there would be lost, because what they rest on was made again here and came out
                different. Nothing is written.
        """
        if lost := self._lost(results):
            parent, steps = lost
            raise ConfigError(
                f"{results}: {parent} was made again in {self.folder} and came out different (as on another kind of "
                f"processor), so that {len(steps)} committed records would be dropped, {steps[0]} among them; nothing "
                "was written there. Give another folder for these results, or remove the files there to start over"
            )
        written = []
        grouped: set[str] = set()
        groups = {group: set(select(self.plan, group)) for group in self.study.groups}
        for wanted in groups.values():
            grouped |= wanted
        groups[REST] = set(self.plan.steps) - grouped
        for group, wanted in groups.items():
            wanted = set(self.with_parents(wanted)) if group != REST else wanted
            held = {step: self.records[step] for step in self.plan.steps if step in wanted and self.current(step)}
            if not held:
                continue
            content = {"schema": SCHEMA, "study": self.study.name, "group": group, "command": command, "records": held}
            file = results / f"{group}.json"
            with whole_file(file) as temporary:
                temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
            written.append(file)
        return written

    def _lost(self, results: Path) -> tuple[str, list[str]] | None:
        """A step that came out otherwise than its committed record says, and the committed records that are stale."""
        committed = _committed(results, self.plan)
        for step, record in committed.items():
            own = self.records[step]
            if own["hash"] == record["hash"] and own["output"] != record["output"]:
                stale = [other for other in committed if not self.current(other)]
                return (step, stale) if stale else None
        return None

    def _make(self, step: Step, place: str, made: list[str]) -> None:
        for parent in step.parents:
            self._need(self.plan.steps[parent], place, made)
        wanted, earlier = self._hash(step), self.records.get(step.id)
        if earlier is not None and earlier["hash"] != wanted:
            self._clear(step)
        self._report(f"{place} {step.kind} {step.name}")
        started = time.monotonic()
        output, numbers = self._perform(step, self.folder, rate=self._rate(step), quiet=self._quiet)
        record: Record = {
            "step": step.id,
            "hash": wanted,
            "output": output,
            "numbers": json.loads(json.dumps(numbers)),
            "seconds": round(time.monotonic() - started, 1),
            "made_with": made_with(),
        }
        with whole_file(self._file(step.id)) as temporary:
            temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        self.records[step.id] = record
        made.append(step.id)

    def _need(self, step: Step, place: str, made: list[str]) -> None:
        """What a step makes, at hand: a committed record alone is no file to read."""
        if self.current(step.id) and (step.kind not in ("build", "train", "mask") or self._there(step)):
            return
        patch = None if self.results is None else self.results / f"{step.name}.patch"
        if step.kind == "train" and self.current(step.id) and patch is not None and patch.is_file():
            for parent in step.parents:
                if parent == step.models["model"].step:
                    self._need(self.plan.steps[parent], place, made)
            self._report(f"{place} {step.kind} {step.name}, from {patch}")
            self._restore(step, self.folder, patch, self.records[step.id]["output"])
        else:
            self._make(step, place, made)

    def _there(self, step: Step) -> bool:
        made = making.made_at(step, self.folder)
        return {
            "build": made / "config.json",
            "train": made / "model" / "config.json",
        }.get(step.kind, made).exists()

    def _clear(self, step: Step) -> None:
        """Remove what the step made from other inputs. Hours of training are never removed: `train` refuses them."""
        made = making.made_at(step, self.folder)
        if step.kind == "train":
            return
        if made.is_dir():
            shutil.rmtree(made)
        else:
            made.unlink(missing_ok=True)

    def _rate(self, step: Step) -> float | None:
        """The learning rate with the highest accuracy, of a step that takes the best; ties go to the smaller one."""
        rates: Mapping[str, str] | None = step.config.get("rates") if step.kind == "train" else None
        if not rates or not all(f"eval:{name}" in self.records for name in rates.values()):
            return None
        accuracy = {float(rate): self.records[f"eval:{name}"]["numbers"]["accuracy"] for rate, name in rates.items()}
        return max(sorted(accuracy), key=lambda rate: accuracy[rate])

    def _hash(self, step: Step) -> str:
        """Of the step's config and of what its parents made; of a run at the best rate: of the rate."""
        config = {key: value for key, value in step.config.items() if key not in ("checkpoint_every", "report_to")}
        parents = [p for p in step.parents if not (step.kind == "train" and p.startswith("eval:"))]
        content = {
            "step": step.id,
            "config": config,
            "rate": self._rate(step),
            "models": {part: model.spec for part, model in step.models.items() if model.step is not None},
            "outside": {part: self._identity(model) for part, model in step.models.items() if model.step is None},
            "parents": {parent: self.records.get(parent, {}).get("output") for parent in parents},
        }
        return hash_of(content)

    def _identity(self, model: Any) -> str:
        if model.spec not in self._identities:
            self._identities[model.spec] = making.identity(model)
        return self._identities[model.spec]

    def _file(self, step: str) -> Path:
        return self.folder / "records" / f"{step.replace(':', '-', 1)}.json"

    def _own(self) -> dict[str, Record]:
        found = {}
        for step in self.plan.steps:
            file = self._file(step)
            if file.is_file():
                found[step] = _read(file)
        return found


def _committed(results: Path | None, plan: Plan) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for file in sorted(results.glob("*.json")) if results is not None else ():
        content = _read(file, ("records",))
        found |= {step: record for step, record in content["records"].items() if step in plan.steps}
    return found


def _read(file: Path, keys: tuple[str, ...] = ("hash", "output", "numbers")) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        if all(key in content for key in keys):
            return content
    except (OSError, ValueError, TypeError):
        pass
    raise ConfigError(f"{file}: is no record of a study; remove it, and the step is made again")


def hash_of(content: Any) -> str:
    """BLAKE3 of plain values as JSON, keys in order."""
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


def made_with() -> dict[str, Any]:
    """Versions and kind of machine, as results name them."""
    names = ("torch", "transformers", "trl", "numpy", "polars")
    return {
        "deltalens": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }
