"""Tasks: what a model is asked, what its teacher may see, and when a reply counts as right.

A task's name may carry one argument after a colon: `sums`, `easy-vqa`, `jsonl:PATH`, `math:HUB_ID`,
`reasoning-gym:NAME`. Importing this package imports neither torch nor any of the tasks' own libraries.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from deltalens.errors import ConfigError
from deltalens.train.tasks.base import Example, Task, messages, passes, reply_limit, to_dataset
from deltalens.train.tasks.easy_vqa import EasyVQA
from deltalens.train.tasks.jsonl import JSONLines
from deltalens.train.tasks.math import Math
from deltalens.train.tasks.reasoning_gym import ReasoningGym
from deltalens.train.tasks.sums import Sums

__all__ = [
    "TASKS",
    "EasyVQA",
    "Example",
    "JSONLines",
    "Math",
    "ReasoningGym",
    "Sums",
    "Task",
    "get_task",
    "messages",
    "passes",
    "reply_limit",
    "to_dataset",
]

# What the argument after the colon is; None: the task takes none.
_ARGUMENTS: dict[str, str | None] = {
    "easy-vqa": None,
    "jsonl": "PATH",
    "math": "HUB_ID",
    "reasoning-gym": "NAME",
    "sums": None,
}

TASKS: dict[str, Callable[..., Task]] = {
    "easy-vqa": EasyVQA,
    "jsonl": JSONLines.named,
    "math": Math.named,
    "reasoning-gym": ReasoningGym,
    "sums": Sums,
}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none (the message lists those there are and names the nearest), or its argument, the
            package it needs or its data is missing.
    """
    kind, colon, argument = name.partition(":")
    if kind not in TASKS:
        known = [kind if what is None else f"{kind}:{what}" for kind, what in _ARGUMENTS.items()]
        near = difflib.get_close_matches(kind, list(_ARGUMENTS), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"unknown task {name!r}{hint}; there is: {', '.join(known)}")
    what = _ARGUMENTS[kind]
    if what is None:
        if colon:
            raise ConfigError(f"task {name!r}: {kind} takes no argument; write {kind}")
        return TASKS[kind]()
    if not argument:
        raise ConfigError(f"task {name!r}: say which, as {kind}:{what}")
    return TASKS[kind](argument)
