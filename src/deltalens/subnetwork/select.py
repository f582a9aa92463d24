"""`deltalens mask`: a rule in, a mask out, in one pass over the tensors (three where a threshold is global)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from deltalens.checkpoint import Checkpoint, TensorPair, open_checkpoint, pair_checkpoints
from deltalens.checkpoint.formats.peft import LoraSource
from deltalens.checkpoint.pairing import Pairing
from deltalens.errors import CheckpointError, ConfigError
from deltalens.metrics.values import Compare, ceil_share
from deltalens.subnetwork.choose import Plan, choose, scores
from deltalens.subnetwork.draw import kth_largest
from deltalens.subnetwork.mask import SubnetworkMask, in_roles, source_hash
from deltalens.subnetwork.rules import (
    SELECTIONS,
    SHARES,
    Rule,
    fraction,
    layer_numbers,
    role_names,
    split_rule,
    whole_number,
)

__all__ = ["Progress", "Scope", "compared_rows", "select_mask"]

Scope = Literal["tensor", "global"]
Progress = Callable[[int, int, str], None]
"""Called with rows' elements done, elements in all, and the name of the row just finished."""

NEEDS_TRAINED = ("visible", "top", "first")
GLOBAL = ("top", "fisher")


def select_mask(
    source: str | Path,
    trained: str | Path | None = None,
    *,
    rule: str,
    like: str | Path | SubnetworkMask | None = None,
    scope: Scope = "tensor",
    roles: str | Iterable[str] | None = None,
    layers: str | Iterable[int] | None = None,
    threshold: float = 1e-5,
    compare_dtype: Compare | None = None,
    task: str = "sums",
    examples: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> SubnetworkMask:
    """Choose a subnetwork of a source; docs/masks.md describes the rules.

    Args:
        source: the checkpoint that the mask belongs to.
        trained: what was trained from it; for `visible`, `top` and, as a run's folder, `first`.
        rule: `visible`, `top:0.1`, `random:0.1`, `rounding:0.1`, `low-magnitude:0.1`, `high-magnitude:0.1`,
            `principal:0.1`, `off-principal:0.1`, `fisher:0.1`, `first:10`, `union:A,B`, `intersection:A,B`,
            `complement:A`.
        like: a mask whose densities, matrix by matrix, replace the fraction.
        scope: of `top` and `fisher`: the largest of each matrix, or of all.
        roles, layers: only these; the other tensors are left empty.
        threshold: τ of `visible`, `first` and `rounding`.
        compare_dtype: in which `visible` and `first` subtract, and to which `rounding` rounds; as in `analyze`.
        task, examples: of `fisher`.
        seed: of every draw, those among ties too.
        progress: called after each matrix.

    Raises:
        ConfigError: the rule, a role or a range of layers makes no sense, or what the rule needs is missing.
        CheckpointError: a checkpoint or mask cannot be read, belongs to another source, or a tensor to be ranked
            holds NaN or Inf.
    """
    parsed = split_rule(rule, SELECTIONS)
    if scope not in ("tensor", "global"):
        raise ConfigError(f"there is no scope {scope!r}; there are tensor and global")
    if scope == "global" and (parsed.kind not in GLOBAL or like is not None):
        raise ConfigError(f"--scope global ranks the entries of all tensors together: of {' and '.join(GLOBAL)} only")
    wanted_roles, wanted_layers = role_names(roles), layer_numbers(layers)
    share = _share(parsed, like is not None)
    updated = _trained(parsed, trained) if parsed.kind in NEEDS_TRAINED else None
    content = source_hash(source)
    if parsed.kind in ("union", "intersection", "complement"):
        combined = _combined(parsed, content, source)
        return combined.restrict(wanted_roles, wanted_layers) if roles is not None or layers is not None else combined
    if like is not None:
        like = _fitting(like, content, source)
    with ExitStack() as stack:
        before = stack.enter_context(open_checkpoint(source))
        after = before if updated is None else stack.enter_context(open_checkpoint(updated, base=before))
        rows = [
            row
            for row in compared_rows(pair_checkpoints(before, after))
            if in_roles(row.role, wanted_roles) and (wanted_layers is None or row.layer in wanted_layers)
        ]
        if not rows:
            raise ConfigError(f"{source}: no tensor is left after --roles {roles} and --layers {layers}")
        plan = Plan(
            rule=parsed,
            share=share,
            like=like,
            threshold=threshold,
            compare=compare_dtype or ("stored" if isinstance(after.tensors, LoraSource) else "bf16"),
            seed=seed,
            fisher=_fisher(parsed, source, rows, task, examples, seed, progress),
        )
        chosen = _everywhere(before, after, rows, plan) if scope == "global" else _each(before, after, rows, plan)
        packed = _pack(before, after, rows, chosen, progress)
    said = _describe(parsed, plan, scope, task, examples, wanted_roles, wanted_layers)
    return SubnetworkMask.from_packed(packed, rule=said, source_hash=content)


def compared_rows(pairing: Pairing) -> list[TensorPair]:
    """The rows of a pairing, each part of a source tensor once.

    TRAINED may have its own LM head where SOURCE ties it to the embedding; the source's tensor then is the embedding.
    """
    seen: set[tuple[str, int]] = set()
    rows = []
    for row in pairing.pairs:
        if (row.source_name, row.source_start) not in seen:
            seen.add((row.source_name, row.source_start))
            rows.append(row)
    return rows


def _trained(rule: Rule, trained: str | Path | None) -> str | Path:
    if trained is None:
        raise ConfigError(f"{rule.kind} looks at an update: give SOURCE and TRAINED")
    if rule.kind != "first":
        return trained
    # A Trainer's checkpoints, or the snapshots of one of our runs.
    found = {
        int(number): folder
        for pattern in ("checkpoint-*", "steps/step-*")
        for folder in Path(trained).glob(pattern)
        if (number := folder.name.partition("-")[2]).isdecimal()
    }
    step = whole_number(rule)
    if step not in found:
        held = (
            f"checkpoints of steps {', '.join(map(str, sorted(found)))}"
            if found
            else "neither checkpoint-N nor steps/step-N folders"
        )
        raise ConfigError(f"{trained}: has no checkpoint-{step}; it holds {held}")
    return found[step]


def _share(rule: Rule, like: bool) -> float | None:
    """The rule's fraction; None where it takes none, or another mask says how many entries."""
    if rule.kind not in SHARES:
        if like:
            raise ConfigError(f"--like sets how many entries a rule selects; {rule.kind} has no say in that")
        return None
    if not rule.argument and not like:
        raise ConfigError(f"{rule.kind} needs a fraction, such as {rule.kind}:0.1, or --like MASK")
    if rule.argument and like:
        raise ConfigError(f"give {rule.kind} a fraction or --like, not both")
    return fraction(rule) if rule.argument else None


def _fitting(mask: str | Path | SubnetworkMask, content: str, source: str | Path) -> SubnetworkMask:
    opened = mask if isinstance(mask, SubnetworkMask) else SubnetworkMask.load(mask)
    if opened.source_hash != content:
        name = "the mask" if isinstance(mask, SubnetworkMask) else mask
        raise CheckpointError(f"{name}: was made for another source than {source}; make it again from {source}")
    return opened


def _combined(rule: Rule, content: str, source: str | Path) -> SubnetworkMask:
    files = [part.strip() for part in rule.argument.split(",") if part.strip()]
    if len(files) < 1 or (rule.kind == "complement") != (len(files) == 1):
        raise ConfigError(f"write {rule.kind}:{SELECTIONS[rule.kind]}, not {str(rule)!r}")
    masks = [_fitting(file, content, source) for file in files]
    if rule.kind == "complement":
        return ~masks[0]
    total = masks[0]
    for mask in masks[1:]:
        total = total | mask if rule.kind == "union" else total & mask
    return total


def _fisher(
    rule: Rule,
    source: str | Path,
    rows: list[TensorPair],
    task: str,
    examples: int,
    seed: int,
    progress: Progress | None,
) -> dict[str, np.ndarray]:
    if rule.kind != "fisher":
        return {}
    from deltalens.subnetwork.fisher import squared_gradients

    names = dict.fromkeys(row.source_name for row in rows)
    return squared_gradients(source, task, names, examples=examples, seed=seed, progress=progress)


def _each(
    before: Checkpoint, after: Checkpoint, rows: list[TensorPair], plan: Plan
) -> Iterator[tuple[TensorPair, np.ndarray]]:
    for row in rows:
        yield row, choose(before, after, row, plan)


def _everywhere(
    before: Checkpoint, after: Checkpoint, rows: list[TensorPair], plan: Plan
) -> Iterator[tuple[TensorPair, np.ndarray]]:
    """The largest of all rows together; ties at the edge are shared out in proportion, then drawn within a row."""
    assert plan.share is not None, "global rules have a fraction"
    count = ceil_share(plan.share, sum(row.count for row in rows))
    if count == 0:
        yield from ((row, np.zeros(row.count, np.bool_)) for row in rows)
        return
    double = plan.rule.kind == "top" and any("F64" in (row.source_dtype, row.trained_dtype) for row in rows)

    def ranked(row: TensorPair) -> np.ndarray:
        found = scores(before, after, row, plan)
        return found.astype(np.float64) if double else found

    edge, above, ties = kth_largest(partial(map, ranked, rows), count)
    passed = given = 0
    for row in rows:
        values = ranked(row)
        chosen, tied = values > edge, np.flatnonzero(values == edge)
        passed += tied.size
        share = (count - above) * passed // ties - given
        given += share
        chosen[plan.rng(row).choice(tied, share, replace=False, shuffle=False)] = True
        yield row, chosen


def _pack(
    before: Checkpoint,
    after: Checkpoint,
    rows: list[TensorPair],
    chosen: Iterable[tuple[TensorPair, np.ndarray]],
    progress: Progress | None,
) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """Bits of every compared source tensor, in the source's order; those without a row are empty."""
    found: dict[str, np.ndarray] = {}
    current, bits = "", np.zeros(0, np.bool_)
    done, total = 0, sum(row.count for row in rows)

    def close() -> None:
        if current:
            found[current] = np.packbits(bits) if bits.any() else np.zeros(0, np.uint8)

    for row, mask in chosen:
        if row.source_name != current:
            assert row.source_name not in found, "the rows of a source tensor follow one another"
            close()
            current, bits = row.source_name, np.zeros(before.entries[row.source_name].size, np.bool_)
        bits[row.source_start : row.source_start + row.count] = mask
        done += row.count
        if progress is not None:
            progress(done, total, row.name)
    close()
    every = {row.source_name for row in compared_rows(pair_checkpoints(before, after))}
    nothing = np.zeros(0, np.uint8)
    return {n: (entry.shape, found.get(n, nothing)) for n, entry in before.entries.items() if n in every}


def _describe(
    rule: Rule,
    plan: Plan,
    scope: Scope,
    task: str,
    examples: int,
    roles: tuple[str, ...] | None,
    layers: tuple[int, ...] | None,
) -> str:
    """The rule as the file tells it: with everything that another draw of it would need."""
    said = [str(rule)]
    if plan.like is not None:
        said.append(f"like=({plan.like.rule})")
    if rule.kind in ("visible", "first", "rounding"):
        said.append(f"threshold={plan.threshold:g} compare={plan.compare}")
    if rule.kind == "fisher":
        said.append(f"task={task} examples={examples}")
    if rule.kind in GLOBAL:
        said.append(f"scope={scope}")
    if rule.kind in SHARES:
        said.append(f"seed={plan.seed}")
    if roles is not None:
        said.append(f"roles={','.join(roles)}")
    if layers is not None:
        said.append(f"layers={','.join(map(str, layers))}")
    return " ".join(said)
