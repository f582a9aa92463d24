"""`deltalens intervene`: write the checkpoint that keeps a part of an update and reverts the rest to the source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from deltalens.checkpoint import DTYPE_BYTES, Checkpoint, TensorPair, open_checkpoint, pair_checkpoints
from deltalens.checkpoint.pairing import Pairing
from deltalens.checkpoint.writer import copy_files, sharded_as, write_tensors
from deltalens.errors import CheckpointError, ConfigError
from deltalens.files import whole_folder
from deltalens.metrics.blocks import is_tall
from deltalens.metrics.values import prepare, round_to_bf16, to_float64
from deltalens.subnetwork.draw import leading, rank_of
from deltalens.subnetwork.mask import SubnetworkMask, in_roles
from deltalens.subnetwork.rules import Rule, fraction, layer_numbers, role_names, split_rule, whole_number
from deltalens.subnetwork.select import Progress, Scope, select_mask

__all__ = ["KEEPS", "Intervention", "intervene", "principal_part", "truncated"]

KEEPS = {
    "top": "FRACTION",
    "mask": "FILE",
    "rank": "K",
    "principal": "RATIO",
    "off-principal": "RATIO",
    "role": "ROLE,ROLE",
    "layers": "FIRST-LAST",
    "scale": "ALPHA",
}
DEFAULT_RATIO = 0.1
_CHUNK = 1 << 20

Edit = Callable[[TensorPair, np.ndarray, np.ndarray], tuple[np.ndarray, float | None]]
"""A row, its source and trained bytes in TRAINED's dtype → the bytes to write, in the same, and the energy of the part
of Δ that they stand for, before it was rounded; None where bits were copied."""


@dataclass(kw_only=True)
class Intervention:
    """What was written.

    Attributes:
        path: the folder.
        keep: the rule.
        tensors, parameters: of the rows that both checkpoints have.
        trained_changed, changed: coordinates of TRAINED, and of what was written, whose bits differ from SOURCE's.
        trained_energy: ‖Δ‖² of TRAINED.
        energy: ‖written − SOURCE‖², after the rounding to TRAINED's dtype.
        meant_energy: the same before that rounding; equal to `energy` where bits are only copied.
        untouched: tensors that only TRAINED has, or that are no floats: as in TRAINED.
    """

    path: Path
    keep: str
    tensors: int = 0
    parameters: int = 0
    trained_changed: int = 0
    changed: int = 0
    trained_energy: float = 0.0
    energy: float = 0.0
    meant_energy: float = 0.0
    untouched: list[str] = field(default_factory=list)

    @property
    def kept(self) -> float | None:
        """`energy` over `trained_energy`; None where TRAINED is SOURCE."""
        return self.energy / self.trained_energy if self.trained_energy else None


def intervene(
    source: str | Path,
    trained: str | Path,
    output: str | Path,
    *,
    keep: str,
    scope: Scope = "tensor",
    seed: int = 0,
    progress: Progress | None = None,
) -> Intervention:
    """Write TRAINED with only a part of its update; docs/intervene.md describes the rules.

    Tensors are written one at a time, with TRAINED's names and dtypes, in files as SOURCE has them, beside TRAINED's
    config and tokenizer. Masks, roles and layers copy bits: a coordinate is TRAINED's or SOURCE's. The other rules
    compute source + part of Δ in float64 and round it once to TRAINED's dtype, to nearest even (to bf16 by way of
    float32, as torch casts).

    Args:
        source, trained: directories, files or Hub ids.
        output: a folder that does not exist yet, or is empty.
        keep: `top:0.1`, `mask:FILE`, `rank:16`, `principal`, `off-principal` (the top 10 % of directions;
            `principal:0.2` for another share), `role:ffn,attention`, `layers:0-5`, `scale:0.5`.
        scope: of `top`: the largest entries of each matrix, or of all.
        seed: of the draws among ties of `top`.
        progress: called after each matrix.

    Raises:
        ConfigError: the rule makes no sense.
        CheckpointError: a checkpoint or mask cannot be read, the mask belongs to another source, a tensor to be
            computed with holds NaN or Inf, or the output exists or cannot be written.
    """
    rule, output = split_rule(keep, KEEPS), Path(output)
    if scope == "global" and rule.kind != "top":
        raise ConfigError("--scope global ranks the entries of all tensors together: of top only")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists already; intervene writes a new folder and changes nothing there")
    done = Intervention(path=output, keep=str(rule))
    edit = _edit(rule, source, trained, scope, seed)
    with ExitStack() as stack:
        before = stack.enter_context(open_checkpoint(source))
        after = stack.enter_context(open_checkpoint(trained, base=before))
        pairing = pair_checkpoints(before, after)
        rows = _rows_of(pairing, after)
        if rule.kind in ("role", "layers") and not any(_part_of(rule)(row) for row in pairing.pairs):
            raise ConfigError(f"{trained}: no tensor is in {rule}; nothing would be kept")
        named = [replace(entry, name=name) for name, entry in after.entries.items()]
        entries = sharded_as(named, before) or sharded_as(named, after)
        entries = entries or [replace(entry, file=Path("model.safetensors")) for entry in named]
        try:
            with whole_folder(Path(os.path.abspath(output))) as folder:
                write_tensors(folder, entries, _edited(before, after, rows, edit, done, progress))
                configured = after.folder is not None and (after.folder / "config.json").is_file()
                copy_files(after if configured else before, folder)
        except OSError as error:
            raise CheckpointError(f"{output}: cannot be written ({error.strerror or error})") from None
    return done


def _rows_of(pairing: Pairing, after: Checkpoint) -> dict[str, list[TensorPair]]:
    """Trained tensor → its rows. A stored LM head that is tied is the embedding once more, and gets its rows."""
    rows: dict[str, list[TensorPair]] = {}
    for row in pairing.pairs:
        held = rows.setdefault(row.trained_name, [])
        if all(row.trained_start != other.trained_start for other in held):
            held.append(row)
    for skipped in pairing.skipped:
        _, tied, embedding = skipped.reason.partition("tied to ")
        embedding = embedding.partition(",")[0]
        if tied and skipped.tensor in after.entries and skipped.tensor not in rows:
            twins = [row for held in list(rows.values()) for row in held if row.source_name == embedding]
            rows[skipped.tensor] = [replace(row, trained_name=skipped.tensor) for row in twins]
    return rows


def _part_of(rule: Rule) -> Callable[[TensorPair], bool]:
    """Whether a row is in the roles or layers of the rule."""
    if rule.kind == "role":
        roles = role_names(rule.argument)
        return lambda row: in_roles(row.role, roles)
    layers = frozenset(layer_numbers(rule.argument) or ())
    return lambda row: row.layer in layers


def _edited(
    before: Checkpoint,
    after: Checkpoint,
    rows: dict[str, list[TensorPair]],
    edit: Edit,
    done: Intervention,
    progress: Progress | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, bytes) of every tensor of TRAINED."""
    finished, total = 0, sum(row.count for held in rows.values() for row in held)
    counted: set[tuple[str, int]] = set()
    for name in after.entries:
        data = np.array(after.read(name))
        if name not in rows:
            done.untouched.append(name)
        for row in rows.get(name, ()):
            width = DTYPE_BYTES[row.trained_dtype]
            place = slice(row.trained_start * width, (row.trained_start + row.count) * width)
            raw = before.read(row.source_name, start=row.source_start, count=row.count)
            source, trained = _cast(raw, row.source_dtype, row.trained_dtype), data[place]
            made, meant = edit(row, source, trained)
            if (key := (row.source_name, row.source_start)) not in counted:  # a tied head is the embedding again
                counted.add(key)
                _count(row, source, trained, made, meant, done)
            data[place] = made
            finished += row.count
            if progress is not None:
                progress(finished, total, row.name)
        yield name, data


def _count(
    row: TensorPair, source: np.ndarray, trained: np.ndarray, made: np.ndarray, meant: float | None, done: Intervention
) -> None:
    """Add a row to the figures."""
    width, energy = DTYPE_BYTES[row.trained_dtype], 0.0
    for start in range(0, row.count * width, _CHUNK):
        words = [side[start : start + _CHUNK].view(f"<u{width}") for side in (source, trained, made)]
        done.trained_changed += int(np.count_nonzero(words[0] != words[1]))
        done.changed += int(np.count_nonzero(words[0] != words[2]))
        with np.errstate(over="ignore", invalid="ignore"):
            w, t, m = (_float64(side[start : start + _CHUNK], row.trained_dtype) for side in (source, trained, made))
            done.trained_energy += float(((t - w) ** 2).sum())
            energy += float(((m - w) ** 2).sum())
    done.tensors += 1
    done.parameters += row.count
    done.energy += energy
    done.meant_energy += energy if meant is None else meant


def _edit(rule: Rule, source: str | Path, trained: str | Path, scope: Scope, seed: int) -> Edit:
    """The function that makes a row's bytes."""
    if rule.kind in ("role", "layers"):
        inside = _part_of(rule)
        return lambda row, ours, theirs: (theirs if inside(row) else ours, None)
    if rule.kind in ("top", "mask"):
        if rule.kind == "top":
            mask = select_mask(source, trained, rule=str(rule), scope=scope, seed=seed)
        elif rule.argument:
            mask = SubnetworkMask.load(rule.argument, source=source)
        else:
            raise ConfigError("mask needs a file: mask:FILE, made by `deltalens mask`")
        return lambda row, ours, theirs: (_masked(mask, row, ours, theirs), None)
    amount = _amount(rule)

    def computed(row: TensorPair, ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, float | None]:
        whole = _whole(rule.kind, amount, row)
        if whole is not None:
            return (theirs if whole else ours), None
        w, delta = (_float64(side, row.trained_dtype).reshape(row.shape) for side in (ours, theirs))
        with np.errstate(invalid="ignore"):
            delta -= w
        if not (np.isfinite(delta).all() and np.isfinite(w).all()):
            raise CheckpointError(
                f"{trained}: tensor {row.name!r} holds NaN or Inf on one side; leave it out by a mask"
            )
        if not delta.any():
            return theirs, None
        if rule.kind == "scale":
            part = delta * amount
        elif rule.kind == "rank":
            part = truncated(delta, int(amount))
        else:
            part = principal_part(w, delta, amount)
            part = part if rule.kind == "principal" else delta - part
        w += part
        return _encode(w.reshape(-1), row.trained_dtype), float((part**2).sum())

    return computed


def _amount(rule: Rule) -> float:
    """K, the ratio or α."""
    if rule.kind == "rank":
        return whole_number(rule)
    if rule.kind == "scale":
        try:
            alpha = float(rule.argument)
        except ValueError:
            alpha = float("nan")
        if not np.isfinite(alpha):
            raise ConfigError(f"scale takes a number, such as scale:0.5, not {rule.argument!r}")
        return alpha
    return fraction(rule) if rule.argument else DEFAULT_RATIO


def _whole(kind: str, amount: float, row: TensorPair) -> bool | None:
    """Whether TRAINED's bits (True) or SOURCE's (False) are taken as they are; None where there is to compute.

    A vector has no rank to cut and lies in no principal subspace: `rank` and `off-principal` keep it, `principal`
    reverts it.
    """
    if kind == "scale":
        return bool(amount) if amount in (0.0, 1.0) else None
    if len(row.shape) != 2:
        return kind != "principal"
    if kind == "rank" and (amount == 0 or amount >= min(row.shape)):
        return amount > 0
    return None


def truncated(delta: np.ndarray, k: int) -> np.ndarray:
    """The best rank-k approximation of a matrix (m, n) float64: its projection on the top-k singular subspace."""
    short = leading(delta, k).short
    return (delta @ short) @ short.T if is_tall(delta.shape) else short @ (short.T @ delta)


def principal_part(source: np.ndarray, delta: np.ndarray, ratio: float) -> np.ndarray:
    """U_k U_kᵀ Δ V_k V_kᵀ with the top-k singular vectors of the source, k = max(1, ⌊ratio · min(m, n)⌋); float64."""
    factors = leading(source, rank_of(ratio, (source.shape[0], source.shape[1])))
    tall = is_tall(source.shape)
    left, right = (factors.long, factors.short) if tall else (factors.short, factors.long)
    return left @ ((left.T @ delta) @ right) @ right.T


def _masked(mask: SubnetworkMask, row: TensorPair, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    if row.source_name not in mask:
        return ours
    chosen = mask.flat(row.source_name)[row.source_start : row.source_start + row.count]
    word = f"<u{DTYPE_BYTES[row.trained_dtype]}"
    return np.where(chosen, theirs.view(word), ours.view(word)).view(np.uint8)


def _float64(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bytes as float64, exactly."""
    values = prepare(raw, dtype, "stored")
    out = np.empty(values.size)
    to_float64(values, out)
    return out


def _cast(raw: np.ndarray, stored: str, wanted: str) -> np.ndarray:
    """A side's bytes in another dtype, rounded to nearest even; its own bytes where the dtypes agree."""
    return raw if stored == wanted else _encode(prepare(raw, stored, "stored"), wanted)


def _encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values (flat float32 or float64) as stored bytes, rounded to nearest even."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "BF16":
            return round_to_bf16(values).view(np.uint8)
        return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).view(np.uint8)
