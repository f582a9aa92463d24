"""Verdicts on claims: pure functions of effects and their intervals over seeds. docs/study.md has the rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CONTRADICTED",
    "EXPLAINED",
    "NOT_HERE",
    "NOT_RUN",
    "REPRODUCED",
    "Interval",
    "Verdict",
    "interval",
    "judge",
    "paired",
]

REPRODUCED, NOT_HERE, EXPLAINED, CONTRADICTED = (
    "reproduced", "not at this scale", "explained by rounding", "contradicted",
)  # fmt: skip
NOT_RUN = "not run"

Values = Mapping[str, float]
"""A number of each seed (or pair of runs) by its name."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over n values and its 95 % t interval; `low`, `high` are -inf, inf where n is 1 and no spread is known."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """`effect`: of what the claim is about; `explained`: share of it that the control gives; `why`: one sentence."""

    verdict: str
    effect: Interval | None
    explained: float | None
    why: str


def interval(values: Sequence[float], spread: float | None = None) -> Interval:
    """The 95 % t interval of a mean; of one value, that value ± `spread`.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError("an interval needs one finite value or more")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        half = math.inf if spread is None else spread
    else:
        from scipy.stats import t

        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(a: Values, b: Values | float) -> dict[str, float]:
    """a − b by name. A b of one value, or one that shares no name with a, counts with its mean for every a."""
    if isinstance(b, Mapping):
        shared = [name for name in a if name in b]
        if shared and len(b) > 1:
            return {name: a[name] - b[name] for name in shared}
        b = math.fsum(b.values()) / len(b)
    return {name: value - b for name, value in a.items()}


def judge(
    rule: Literal["above", "below", "same"],
    seen: Values,
    chance: Values | float,
    null: Values | None = None,
    *,
    margin: float = 0.0,
    share: float = 0.9,
    spread: float | None = None,
) -> Verdict:
    """Decide a claim.

    Args:
        rule: `above`: seen − chance > margin; `below`: chance − seen > margin; `same`: |seen − chance| < margin.
        seen, chance: a number for each seed; runs that were not made are not in it.
        null: what rounding alone gives, or a control run that knows only what rounding knows; None: no such question.
        margin: see `rule`.
        share: the null explains the effect where it gives this share of it or more.
        spread: half-width of the interval of an effect that one seed alone measured.

    Returns:
        The verdict; `not run` where `seen` or `chance`, or a null that was asked for, has no value.
    """
    lacking = [
        name
        for name, values in (("seen", seen), ("chance", chance), ("control", null))
        if isinstance(values, Mapping) and not values
    ]
    if lacking:
        return Verdict(NOT_RUN, None, None, f"no run has given a value for: {', '.join(lacking)}")
    sign = -1.0 if rule == "below" else 1.0
    effects = {name: sign * value for name, value in paired(seen, chance).items()}
    effect = interval(list(effects.values()), spread)
    if rule == "same":
        return _same(effect, margin)
    if effect.high < -margin:
        return Verdict(CONTRADICTED, effect, None, "the whole interval lies on the other side")
    if effect.low <= margin:
        one = " (one seed, and no spread was stated)" if math.isinf(effect.low) else ""
        return Verdict(NOT_HERE, effect, None, f"the interval reaches what does not count{one}")
    if null is None:
        return Verdict(REPRODUCED, effect, None, "the whole interval lies on the claimed side")
    beyond = interval([sign * value for value in paired(seen, null).values()], spread)
    explained = 1 - beyond.mean / effect.mean
    needed = (1 - share) * effect.mean
    if beyond.mean <= needed:
        return Verdict(EXPLAINED, effect, explained, f"the control alone gives {explained:.0%} of the effect")
    if beyond.low > needed:
        return Verdict(REPRODUCED, effect, explained, f"the control alone gives {explained:.0%} of the effect, no more")
    why = f"on the claimed side; more than the control gives ({explained:.0%} of the effect) or not, cannot be told"
    return Verdict(NOT_HERE, effect, explained, why)


def _same(effect: Interval, margin: float) -> Verdict:
    if -margin < effect.low and effect.high < margin:
        return Verdict(REPRODUCED, effect, None, "the whole interval lies within the margin")
    if effect.low > margin or effect.high < -margin:
        return Verdict(CONTRADICTED, effect, None, "the whole interval lies outside the margin")
    return Verdict(NOT_HERE, effect, None, "the interval reaches beyond the margin: neither the same nor different")
