"""A PEFT LoRA adapter over its base: W + scaling · B · A, one tensor at a time.

scaling = lora_alpha / r; A is r × in, B is out × r (embeddings: A is r × vocabulary, B is width × r, and the update
is (B · A)ᵀ). https://huggingface.co/docs/peft/package_reference/lora. Hu et al. 2021, section 4.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.checkpoint.base import Checkpoint, TensorEntry, TensorSource, byte_range
from deltalens.errors import CheckpointError

__all__ = ["LoraSource", "read_adapter_config"]

# What changes W + scaling · B · A into something else, and why it is refused.
_REFUSED = {
    "use_dora": "DoRA rescales the columns of the merged weight",
    "use_rslora": "rsLoRA scales by alpha/√r",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "lora_bias": "lora_bias trains a bias on B",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "layer_replication": "layer_replication makes layers that the base does not have",
    "trainable_token_indices": "trainable_token_indices trains rows of the embedding",
    "target_parameters": "target_parameters adapts parameters that are not layers",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA has a third factor",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA projects activations",
    "megatron_config": "Megatron layers split the factors",
}
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEY = re.compile(r"^(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?$")
_WRAPPERS = ("model", "language_model", "transformer", "module")


class LoraSource:
    """The base's tensors with the adapter merged in; adapted ones are float32, the others as the base stores them.

    Args:
        folder: the adapter's folder (for messages).
        adapter: the adapter's own tensors.
        config: adapter_config.json, from `read_adapter_config`.
        base: the checkpoint it was trained on.

    Raises:
        CheckpointError: the adapter is of a kind that is refused, or does not fit the base.
    """

    format = "peft LoRA adapter"

    def __init__(self, folder: Path, adapter: TensorSource, config: Mapping[str, Any], base: Checkpoint) -> None:
        self.files = adapter.files
        self._adapter, self._base = adapter, base
        self._own: dict[str, str] = {}
        self._low: dict[str, tuple[str, str, float, bool]] = {}
        self._entries = dict(base.entries)
        by_bare = {_bare(name): name for name in base.entries}
        halves: dict[str, dict[str, str]] = {}
        for key, entry in adapter.entries.items():
            if match := _KEY.match(key):
                halves.setdefault(match[1], {})[match[2][-1] + ("e" if "embedding" in match[2] else "")] = key
                continue
            module = re.sub(r"^base_model\.model\.|\.modules_to_save|\.base_layer", "", key)
            target = by_bare.get(_bare(module))
            if target is None or base.entries[target].shape != entry.shape:
                raise CheckpointError(f"{folder}: {key!r} belongs to no tensor of {base.path}; is this its base?")
            self._own[target] = key
            self._entries[target] = TensorEntry(target, entry.dtype, entry.shape, entry.file)
        for module, keys in halves.items():
            target = by_bare.get(_bare(f"{module}.weight"))
            if target is None:
                raise CheckpointError(
                    f"{folder}: adapts {module!r}, which {base.path} does not hold; is this its base?"
                )
            self._add(folder, module, keys, target, config)
        if not self._low and not self._own:
            raise CheckpointError(f"{folder}: the adapter holds no LoRA factors")

    def _add(self, folder: Path, module: str, keys: Mapping[str, str], target: str, config: Mapping[str, Any]) -> None:
        embedding = "Ae" in keys
        try:
            a, b = (keys["Ae"], keys["Be"]) if embedding else (keys["A"], keys["B"])
        except KeyError:
            raise CheckpointError(f"{folder}: {module!r} has one of its two LoRA factors only") from None
        (rank, inner), (outer, other) = self._adapter.entries[a].shape, self._adapter.entries[b].shape
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        shape = (inner, outer) if transposed else (outer, inner)
        if self._base.entries[target].shape != shape or rank != other:
            raise CheckpointError(
                f"{folder}: the factors of {module!r} make a {list(shape)} update, but {self._base.path} holds "
                f"{list(self._base.entries[target].shape)}; is this its base?"
            )
        alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
        if int(_pattern(config.get("rank_pattern"), module, config.get("r", rank))) != rank:
            raise CheckpointError(f"{folder}: {module!r} has rank {rank}, not the rank that adapter_config.json says")
        self._low[target] = (a, b, alpha / rank, transposed)
        entry = self._base.entries[target]
        if target in self._own and np.array_equal(
            _float32(self._adapter, self._own[target]), _float32(self._base, target)
        ):
            del self._own[target]  # PEFT saves a copy of an adapted embedding; it is the base's, as it should be
        self._entries[target] = TensorEntry(target, "F32", entry.shape, self._adapter.entries[a].file)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(L, R) in float32, L m × r and R r × n, with W₊ = W + L · R; None where the tensor is not adapted so."""
        if name not in self._low or name in self._own:
            return None
        return self._factors(name)

    def _factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        a_key, b_key, scaling, transposed = self._low[name]
        a, b = (_float32(self._adapter, key) for key in (a_key, b_key))
        b = np.float32(scaling) * b
        return (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if transposed else (b, a)

    def read(
        self, name: str, buffer: np.ndarray | None = None, *, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        under, key = (self._adapter, self._own[name]) if name in self._own else (self._base, name)
        if name not in self._low:
            return under.read(key, buffer, start=start, count=count)
        left, right = self._factors(name)
        entry = self._entries[name]
        begin, length = byte_range(entry, start, count)
        width = entry.shape[1]
        first, last = start // width, -(-(start + length // 4) // width)  # whole rows, then the part asked for
        stored = under.read(key, start=first * width, count=(last - first) * width)
        merged = left[first:last] @ right
        merged += _as_float32(stored, under.entries[key].dtype).reshape(merged.shape)
        raw = merged.reshape(-1).view(np.uint8)[begin - first * width * 4 :][:length]
        if buffer is None:
            return raw
        buffer[:length] = raw
        return buffer[:length]

    def close(self) -> None:
        self._adapter.close()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked for what W + scaling · B · A can express.

    Raises:
        CheckpointError: it is no JSON, or asks for something else; the message says what and the way out.
    """
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
        kind = config.get("peft_type")
    except (ValueError, AttributeError):
        raise CheckpointError(f"{file}: is not valid JSON") from None
    way_out = "merge it (merge_and_unload, save_pretrained) and give the merged checkpoint"
    if kind != "LORA":
        raise CheckpointError(f"{file}: a {kind} adapter; deltalens reads LoRA only: {way_out}")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{file}: {key} is not supported yet ({why}); {way_out}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        raise CheckpointError(f"{file}: init_lora_weights={init!r} changes the base weights too; {way_out}")
    return dict(config)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The first pattern that matches the end of the module's name, as PEFT reads rank_pattern and alpha_pattern."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _bare(name: str) -> str:
    segments = name.split(".")
    while len(segments) > 2 and segments[0] in _WRAPPERS:
        segments = segments[1:]
    return ".".join(segments)


def _float32(source: TensorSource | Checkpoint, name: str) -> np.ndarray:
    entry = source.entries[name]
    return _as_float32(source.read(name), entry.dtype).reshape(entry.shape)


def _as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    kinds = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    if dtype not in kinds:
        raise CheckpointError(f"a LoRA adapter over weights stored as {dtype} is not supported; give a float base")
    return raw.view(kinds[dtype]).astype(np.float32, copy=False)
