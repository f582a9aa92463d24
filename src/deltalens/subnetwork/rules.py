"""What a user writes for a mask or an intervention: `top:0.1`, `union:A.mask,B.mask`, layers `0-5,8`, roles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from deltalens.checkpoint.roles import ROLES
from deltalens.errors import ConfigError

__all__ = ["SELECTIONS", "SHARES", "Rule", "fraction", "layer_numbers", "role_names", "split_rule", "whole_number"]

SHARES = ("top", "random", "rounding", "low-magnitude", "high-magnitude", "principal", "off-principal", "fisher")
SELECTIONS = {
    "visible": "",
    **dict.fromkeys(SHARES, "FRACTION"),
    "first": "STEPS",
    "union": "FILE,FILE",
    "intersection": "FILE,FILE",
    "complement": "FILE",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule's name and what stands behind the colon, "" where there is nothing."""

    kind: str
    argument: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else self.kind


def split_rule(text: str, known: dict[str, str]) -> Rule:
    """Read `kind` or `kind:argument`.

    Args:
        known: kind → what stands behind its colon, for the message.

    Raises:
        ConfigError: no such kind; the message names the nearest and lists them.
    """
    kind, _, argument = text.strip().partition(":")
    if kind not in known:
        near = get_close_matches(kind, known, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        forms = ", ".join(f"{name}:{form}" if form else name for name, form in known.items())
        raise ConfigError(f"unknown rule {text!r}{guess} (there are: {forms})")
    return Rule(kind, argument.strip())


def fraction(rule: Rule) -> float:
    """The argument as a share. Raises ConfigError unless it lies in 0 … 1."""
    try:
        value = float(rule.argument)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"{rule.kind} takes a fraction from 0 to 1, such as {rule.kind}:0.1, not {rule.argument!r}")
    return value


def whole_number(rule: Rule) -> int:
    """The argument as a number of 0 or more, or ConfigError."""
    if not rule.argument.isdecimal():
        raise ConfigError(f"{rule.kind} takes a whole number, such as {rule.kind}:16, not {rule.argument!r}")
    return int(rule.argument)


def role_names(text: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """`ffn,attention` as names; None stays None. Raises ConfigError for a role that there is not."""
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(",")) if isinstance(text, str) else tuple(text)
    for name in names:
        if name not in ROLES and not name.startswith("vision."):
            raise ConfigError(f"there is no role {name!r}; there are: {', '.join(ROLES)}, and vision.… of a tower")
    return names


def layer_numbers(text: str | Iterable[int] | None) -> tuple[int, ...] | None:
    """`0-5,8` as numbers, ascending; None stays None. Raises ConfigError for anything else."""
    if text is None:
        return None
    if not isinstance(text, str):
        return tuple(sorted(set(text)))
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ConfigError(f"{text!r} is no range of layers; write 0-5, or 0,3,8-11")
        numbers.update(range(int(first), int(last) + 1))
    return tuple(sorted(numbers))
