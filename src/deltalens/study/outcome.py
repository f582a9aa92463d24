"""What a study's records say: a number of a run over its seeds, and the verdict on each claim."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltalens.errors import ConfigError
from deltalens.study.spec import Claim, Instance, Study, expand
from deltalens.study.verdicts import Verdict, judge

__all__ = ["Outcome"]

KINDS = ("train", "mask", "eval", "analyze", "compare", "trajectory")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A study and the small numbers of its steps by id (`Runner.numbers`); steps that were not made are not in it."""

    study: Study
    numbers: Mapping[str, Mapping[str, Any]]

    def instances(self, run: str) -> list[Instance]:
        """The instances of a run; of one with several rates those at the rate of the highest accuracy."""
        every = [one for one in expand(self.study) if one.run == run or one.name == run]
        if run not in self.study.runs or not self.study.runs[run].rates:
            return every
        graded = [(self.number(f"eval:{one.name}", "accuracy"), -(one.rate or 0), one) for one in every if not one.best]
        made = [entry for entry in graded if entry[0] is not None]
        if not made:
            return []
        rate = max(made, key=lambda entry: entry[:2])[2].rate
        return [one for one in every if one.best or one.rate == rate]

    def number(self, step: str, key: str) -> float | None:
        """A number of one step; `key` may go into parts, as in `energy_share.ffn`. None where there is none."""
        value: Any = self.numbers.get(step)
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def values(self, reference: str) -> dict[str, float]:
        """The numbers that `KIND:RUN:KEY` refers to, by seed; of `compare:NAME/A>B:KEY`, by pair of runs.

        Only those that there are: a run that was not made, or does not have the number, is left out.

        Raises:
            ConfigError: it is no such reference, or names no run of the study.
        """
        kind, _, rest = reference.partition(":")
        name, _, key = rest.partition(":")
        if kind not in KINDS or not name or not key:
            raise ConfigError(f"{reference}: write KIND:RUN:KEY, KIND one of {', '.join(KINDS)}")
        if kind == "compare":
            return self._pairs(reference, name, key)
        run, at, step = name.partition("@")
        if run == "source":
            found = self.number(f"{kind}:{name}", key)
            return {} if found is None else {"source": found}
        found_values = {}
        for one in self.instances(run):
            value = self.number(f"{kind}:{one.name}{at}{step}", key)
            if value is not None:
                found_values[str(one.seed)] = value
        return found_values

    def pair(self, comparison: str, a: str, b: str) -> dict[str, Any] | None:
        """The numbers of two instances in a comparison, with a's updates in b as `a_in_b…`."""
        for one in (self.numbers.get(f"compare:{comparison}") or {}).get("pairs", ()):
            if (one["a"], one["b"]) == (a, b):
                return dict(one)
            if (one["a"], one["b"]) == (b, a):
                return {"a": a, "b": b, **_turned(one), "core": _turned(one.get("core") or {})}
        return None

    def verdict(self, claim: Claim) -> Verdict:
        """The verdict on a claim from what has been made."""
        chance = self.values(claim.chance) if isinstance(claim.chance, str) else claim.chance
        return judge(
            claim.rule,
            self.values(claim.seen),
            chance,
            None if claim.control is None else self.values(claim.control),
            margin=claim.margin,
            share=claim.share,
            spread=claim.spread,
        )

    def check_references(self, full: Study | None = None) -> None:
        """Refuse claims about runs that the study does not have (at its full scale).

        Raises:
            ConfigError: names the claim and the nearest run.
        """
        study = full or self.study
        known = ["source", *study.runs, *(one.name for one in expand(study))]
        for claim in study.claims:
            for reference in (claim.seen, claim.chance, claim.control):
                if not isinstance(reference, str):
                    continue
                self.values(reference)  # its form
                kind, name = reference.split(":")[:2]
                comparison, _, pair = name.partition("/")
                if kind == "compare" and (comparison not in study.comparisons or ">" not in pair):
                    raise ConfigError(f"claim {claim.id}: {reference}: write compare:NAME/A>B:KEY")
                for run in pair.split(">") if kind == "compare" else [name.split("@")[0]]:
                    if run not in known:
                        near = difflib.get_close_matches(run, known, n=1)
                        hint = f"; did you mean {near[0]}?" if near else ""
                        raise ConfigError(f"claim {claim.id}: {reference}: there is no run {run!r}{hint}")

    def _pairs(self, reference: str, name: str, key: str) -> dict[str, float]:
        comparison, _, pair = name.partition("/")
        a, separator, b = pair.partition(">")
        if not separator:
            raise ConfigError(f"{reference}: write compare:NAME/A>B:KEY, A and B runs of the comparison NAME")
        found: dict[str, float] = {}
        for one in self.instances(a):
            for other in self.instances(b):
                value: Any = self.pair(comparison, one.name, other.name) if one.name != other.name else None
                for part in key.split("."):
                    value = value.get(part) if isinstance(value, Mapping) else None
                if value is not None and f"{other.name}>{one.name}" not in (found if a == b else ()):
                    found[f"{one.name}>{other.name}"] = float(value)
        return found


def _turned(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The same numbers with the two runs exchanged."""
    swap = {"a_in_b": "b_in_a", "b_in_a": "a_in_b", "density_a": "density_b", "density_b": "density_a"}
    out = {}
    for key, value in pair.items():
        if key in ("a", "b", "core"):
            continue
        start = next((one for one in swap if key.startswith(one)), None)
        excess = key.startswith("a_in_b_excess")  # the same number for both
        out[key if start is None or excess else swap[start] + key.removeprefix(start)] = value
    return out
