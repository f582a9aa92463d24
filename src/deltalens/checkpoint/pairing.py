"""Which tensor of one checkpoint belongs to which of another, and as which matrices they are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

from deltalens.checkpoint.base import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, TensorEntry
from deltalens.checkpoint.layout import expert_stack, fused_parts, stacked_experts
from deltalens.checkpoint.roles import role_of
from deltalens.checkpoint.tokenizer import tokenizer_conflict
from deltalens.errors import CheckpointError

__all__ = ["Pairing", "Skipped", "TensorPair", "bare_name", "pair_checkpoints"]

_WRAPPERS = ("model", "language_model", "transformer", "module")
_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_QUANTISED = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "SCB", "absmax", "quant_map", "weight_scale",
              "weight_scale_inv", "weight_shape", "input_scale", "weight_zero_point", "quant_state.bitsandbytes__nf4",
              "quant_state.bitsandbytes__fp4", "nested_absmax", "nested_quant_map")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPair:
    """One row of the analysis: the same matrix (or vector) in both checkpoints.

    `shape` is (m, n) or (n,). The values are the `count` contiguous elements from `source_start` of SOURCE's tensor
    `source_name`, and those from `trained_start` of TRAINED's `trained_name`, row-major; get them with
    `checkpoint.read(pair.source_name, buffer, start=pair.source_start, count=pair.count)`.
    """

    name: str
    role: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    source_name: str
    trained_name: str
    source_dtype: str
    trained_dtype: str
    source_start: int = 0
    trained_start: int = 0

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes to read on both sides."""
        return self.count * (DTYPE_BYTES[self.source_dtype] + DTYPE_BYTES[self.trained_dtype])

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor (or some rows of it) that is not compared, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True, slots=True)
class Pairing:
    """What is compared, in the order of SOURCE's files; what is not, with the reason; what the user must hear."""

    pairs: list[TensorPair]
    skipped: list[Skipped]
    warnings: list[str]


def pair_checkpoints(
    source: Checkpoint, trained: Checkpoint, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Pairing:
    """Match every floating-point tensor of two checkpoints.

    Exact names first, then names equal once wrappers are taken off (`model.language_model.` ↔ `model.` ↔
    `language_model.`, `model.visual.` ↔ `visual.`, `module.`, `_orig_mod.` …). A tied LM head counts once, as the
    embedding. A row is named as SOURCE names the tensor.

    Args:
        source: the opened checkpoint that training started from.
        trained: the opened checkpoint that it ended with.
        include: shell patterns on row names; where there are any, only rows that match one of them are kept.
        exclude: shell patterns on row names that are left out. What these two leave out is not listed as skipped:
            the user asked for it.

    Raises:
        CheckpointError: there is nothing to compare: no common floating-point tensor, every shape differs, or
            `include` and `exclude` leave nothing.
    """
    skipped: list[Skipped] = []
    matched, alone_source, alone_trained = _match_names(source.entries, trained.entries)
    matched = _tied_heads(source, trained, matched, alone_source, alone_trained, skipped)
    floats = reshaped = 0
    pairs: list[TensorPair] = []
    for ours, theirs in matched:
        a, b = source.entries[ours], trained.entries[theirs]
        if reason := _not_floating(a, "SOURCE") or _not_floating(b, "TRAINED"):
            skipped.append(Skipped(ours, reason))
            continue
        floats += 1
        rows, left_over = _rows(a, b, source, trained)
        reshaped += not rows
        pairs += rows
        skipped += left_over
    restacked = _restacked(source, trained, alone_source, alone_trained)
    floats += len(restacked)
    pairs += restacked
    _list_missing(alone_source, "SOURCE", "TRAINED", trained.entries, skipped)
    _list_missing(alone_trained, "TRAINED", "SOURCE", source.entries, skipped)
    if not floats:
        raise CheckpointError(_nothing_common(source, trained))
    if reshaped == floats:
        raise CheckpointError(
            f"{trained.path}: every one of the {floats} tensors it shares with {source.path} has another shape; "
            "these are models of different sizes. Give the checkpoint that TRAINED was trained from"
        )
    kept = [pair for pair in pairs if _wanted(pair.name, include, exclude)]
    if not kept:
        raise CheckpointError(
            f"no tensor is left of {len(pairs)} after --include {list(include)} and --exclude {list(exclude)}; "
            f"names look like {pairs[0].name!r}"
        )
    return Pairing(kept, skipped, _warnings(source, trained, floats, reshaped))


def bare_name(name: str) -> str:
    """The name without the modules that frameworks wrap around a model."""
    segments = [s for s in name.split(".") if s not in _TRANSPARENT]
    while len(segments) > 2 and segments[0] in _WRAPPERS:
        segments = segments[1:]
    return ".".join(segments)


def _match_names(
    ours: Mapping[str, TensorEntry], theirs: Mapping[str, TensorEntry]
) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Pairs of names in SOURCE's order, then the names found on one side only."""
    free = [name for name in theirs if name not in ours]
    by_bare: dict[str, list[str]] = {}
    for name in free:
        by_bare.setdefault(bare_name(name), []).append(name)
    claims: dict[str, int] = {}
    for name in ours:
        if name not in theirs:
            claims[bare_name(name)] = claims.get(bare_name(name), 0) + 1
    matched, alone = [], []
    for name in ours:
        if name in theirs:
            matched.append((name, name))
            continue
        bare = bare_name(name)
        # Two candidates for one name (an adapter's copy, a reference model) cannot be told apart: neither is taken.
        if claims[bare] == 1 and len(by_bare.get(bare, ())) == 1:
            matched.append((name, by_bare[bare][0]))
        else:
            alone.append(name)
    taken = {theirs_name for _, theirs_name in matched}
    return matched, alone, [name for name in free if name not in taken]


def _tied_heads(
    source: Checkpoint,
    trained: Checkpoint,
    matched: list[tuple[str, str]],
    alone_source: list[str],
    alone_trained: list[str],
    skipped: list[Skipped],
) -> list[tuple[str, str]]:
    """`matched` with a tied LM head taken out, or compared with the embedding where one side alone is tied."""
    heads = [_head_and_embedding(side) for side in (source, trained)]
    if not all(embedding for _, embedding in heads):
        return matched
    (head_s, embedding_s), (head_t, embedding_t) = heads
    tied_s, tied_t = _is_tied(source, head_s, embedding_s), _is_tied(trained, head_t, embedding_t)
    if not tied_s and not tied_t:
        return matched
    matched = [(a, b) for a, b in matched if a != head_s and b != head_t]
    for alone, head in ((alone_source, head_s), (alone_trained, head_t)):
        if head in alone:
            alone.remove(head)
    if tied_s and tied_t:
        if name := head_s or head_t:
            skipped.append(Skipped(name, f"tied to {embedding_s}, and counted there"))
    elif head_s and not tied_s:
        matched.append((head_s, embedding_t))
    elif head_t and not tied_t:
        matched.append((embedding_s, head_t))
    return matched


def _head_and_embedding(checkpoint: Checkpoint) -> tuple[str, str]:
    """Names of the LM head's and the token embedding's matrix, "" where there is none or more than one."""
    found: dict[str, list[str]] = {"lm_head": [], "embedding": []}
    for name, entry in checkpoint.entries.items():
        role, layer, module = role_of(name)
        if len(entry.shape) != 2 or layer is not None:
            continue
        tokens = module in ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings")
        if role == "lm_head" or (role == "embedding" and tokens):
            found[role].append(name)
    head, embedding = (names[0] if len(names) == 1 else "" for names in found.values())
    return head, embedding


def _is_tied(checkpoint: Checkpoint, head: str, embedding: str) -> bool:
    """Whether the head is the embedding: what the config says; without a word there, what is stored."""
    config = checkpoint.config
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(told := place.get("tie_word_embeddings"), bool):
            return told or not head
    if not head:
        return True
    a, b = checkpoint.entries[head], checkpoint.entries[embedding]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = 1 << 22  # elements: two that are not tied differ in the first part, and neither is ever held whole
    return all(
        (checkpoint.read(head, start=at, count=count) == checkpoint.read(embedding, start=at, count=count)).all()
        for at in range(0, a.size, step)
        if (count := min(step, a.size - at))
    )


def _not_floating(entry: TensorEntry, side: str) -> str | None:
    if entry.size == 0:
        return "empty"
    if entry.dtype in FLOAT_DTYPES:
        return None
    if entry.dtype.startswith("F8"):
        return f"stored as {entry.dtype} in {side}, without a scale that deltalens can apply"
    return f"stored as {entry.dtype} in {side}: integer or quantised"


def _rows(
    a: TensorEntry, b: TensorEntry, source: Checkpoint, trained: Checkpoint
) -> tuple[list[TensorPair], list[Skipped]]:
    """The rows that one pair of tensors gives, and what of it is not compared. No rows: the shapes disagree."""
    shape, left_over = a.shape, []
    role, _, _ = role_of(a.name)
    # A head that SOURCE ties to its embedding, compared with TRAINED's own head, is a row of that name.
    title = b.name if role == "embedding" and role_of(b.name)[0] == "lm_head" else a.name
    if a.shape != b.shape:
        vocabulary = role in ("embedding", "lm_head") and len(a.shape) in (1, 2) and a.shape[1:] == b.shape[1:]
        if not vocabulary:
            return [], [Skipped(a.name, f"reshaped: {list(a.shape)} in SOURCE, {list(b.shape)} in TRAINED")]
        common, longest = sorted((a.shape[0], b.shape[0]))
        where = "SOURCE" if a.shape[0] > common else "TRAINED"
        left_over = [Skipped(f"{title}[{common}:{longest}]", f"vocabulary rows that only {where} has")]
        shape = (common, *a.shape[1:])
    if expert_stack(a.name, shape):
        inner, width = shape[1:], prod(shape[1:])
        parts = [(f"[{i}]", i * width, inner) for i in range(shape[0])]
    else:
        matrix = shape if len(shape) in (1, 2) else ((shape[0], prod(shape[1:])) if shape else (1,))
        split = fused_parts(a.name, matrix, source.config or trained.config)
        parts, start = [], 0
        for label, rows in split:
            part = (rows, *matrix[1:])
            parts.append((label, start, part))
            start += prod(part)
    pairs = []
    for label, start, part in parts:
        name = title + label
        role, layer, module = role_of(name)
        pairs.append(
            TensorPair(
                name=name,
                role=role,
                layer=layer,
                module=module,
                shape=part,
                source_name=a.name,
                trained_name=b.name,
                source_dtype=a.dtype,
                trained_dtype=b.dtype,
                source_start=start,
                trained_start=start,
            )
        )
    return pairs, left_over


def _restacked(
    source: Checkpoint, trained: Checkpoint, alone_source: list[str], alone_trained: list[str]
) -> list[TensorPair]:
    """Rows of experts that one side stacks in one tensor and the other stores one by one; they leave the lists.

    transformers 5 stacks them in memory, so that shards of a running model have stacks, and files have not.
    A row is named as the side that stores them apart names the tensor.
    """
    pairs = []
    for stacks, stacked, apart, separate in (
        (source, alone_source, trained, alone_trained),
        (trained, alone_trained, source, alone_source),
    ):
        by_bare = {bare_name(name): name for name in separate}
        for name in list(stacked):
            entry = stacks.entries[name]
            parts = [
                (by_bare.get(bare_name(one)), start, shape) for one, start, shape in stacked_experts(name, entry.shape)
            ]
            fits = [
                (one, start, shape)
                for one, start, shape in parts
                if one and apart.entries[one].shape == shape and apart.entries[one].dtype in FLOAT_DTYPES
            ]
            if entry.dtype not in FLOAT_DTYPES or not parts or len(fits) != len(parts):
                continue
            stacked.remove(name)
            for one, start, shape in fits:
                separate.remove(one)
                role, layer, module = role_of(one)
                row = TensorPair(
                    name=one,
                    role=role,
                    layer=layer,
                    module=module,
                    shape=shape,
                    source_name=one,
                    trained_name=name,
                    source_dtype=apart.entries[one].dtype,
                    trained_dtype=entry.dtype,
                    trained_start=start,
                )
                pairs.append(row if apart is source else _swapped(row))
    return pairs


def _swapped(row: TensorPair) -> TensorPair:
    return replace(
        row,
        source_name=row.trained_name,
        trained_name=row.source_name,
        source_dtype=row.trained_dtype,
        trained_dtype=row.source_dtype,
        source_start=row.trained_start,
        trained_start=row.source_start,
    )


def _list_missing(
    alone: list[str], here: str, there: str, other: Mapping[str, TensorEntry], skipped: list[Skipped]
) -> None:
    for name in alone:
        stem, _, leaf = name.rpartition(".")
        if name.endswith(_QUANTISED):
            reason = f"only in {here}: part of a quantised weight, which deltalens does not dequantise"
        elif leaf == "weight" and any(f"{stem}.{end}" in other for end in ("qweight", "weight_packed")):
            reason = f"quantised in {there}, which deltalens does not dequantise"
        else:
            reason = f"only in {here}"
        skipped.append(Skipped(name, reason))


def _nothing_common(source: Checkpoint, trained: Checkpoint) -> str:
    def example(side: Checkpoint) -> str:
        names = [name for name, entry in side.entries.items() if entry.dtype in FLOAT_DTYPES]
        return f"{names[0]!r}" if names else "no floating-point tensor at all"

    return (
        f"{source.path} and {trained.path} have no floating-point tensor in common "
        f"(the first holds {example(source)}, the second {example(trained)}); are they the same architecture?"
    )


def _wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not any(fnmatchcase(name, pattern) for pattern in include):
        return False
    return not any(fnmatchcase(name, pattern) for pattern in exclude)


def _warnings(source: Checkpoint, trained: Checkpoint, floats: int, reshaped: int) -> list[str]:
    warnings = [f"SOURCE: {note}" for note in source.notes] + [f"TRAINED: {note}" for note in trained.notes]
    if 2 * reshaped > floats:
        warnings.append(
            f"{reshaped} of {floats} common tensors have another shape in TRAINED; SOURCE is probably not what "
            "TRAINED was trained from"
        )
    if conflict := tokenizer_conflict(source.folder, trained.folder):
        warnings.append(conflict)
    return warnings
