"""GGUF: llama.cpp's format, dequantised, under the names that transformers gives the tensors.

The `gguf` package reads the header and dequantises; the bytes are read by pread. Converting to GGUF renames every
tensor, reorders the rows of q and k of the Llama family (llama.cpp's rotary layout) and adds 1 to Gemma's norms:
these are undone, as transformers' GGUF loading does, so that coordinates agree with a Hugging Face checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.checkpoint.base import TensorEntry, byte_range
from deltalens.checkpoint.formats.pread import FileReader
from deltalens.errors import CheckpointError

__all__ = ["GGUFSource"]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GEMMA = {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
          "post_ffw_norm": "post_feedforward_layernorm"}  # fmt: skip
_ARCHITECTURES: dict[str, dict[str, str]] = {
    "llama": _BLOCK, "qwen2": _BLOCK, "qwen3": _BLOCK,
    "phi3": _BLOCK | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "gemma2": _BLOCK | _GEMMA, "gemma3": _BLOCK | _GEMMA,
}  # fmt: skip
_PERMUTED = {"llama"}
_NORM_PLUS_ONE = {"gemma2", "gemma3"}
_STORED = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}


class GGUFSource:
    """Tensors of one GGUF file, or of the parts of a split one.

    Quantised tensors are float32; float ones keep their dtype (Gemma's norms too: the 1 is taken off in float32).

    Args:
        files: the file, or all parts.

    Raises:
        CheckpointError: a file is damaged, or the architecture is one whose
            conversion deltalens does not undo.
    """

    format = "gguf"

    def __init__(self, files: list[Path]) -> None:
        from gguf import GGUFReader

        self.files = tuple(files)
        self._reader = FileReader()
        self._entries: dict[str, TensorEntry] = {}
        self._stored: dict[str, tuple[int, Any, tuple[int, ...], int]] = {}  # offset, type, stored shape, heads
        self._minus_one: set[str] = set()
        fields: dict[str, Any] = {}
        kinds: dict[str, int] = {}
        for file in files:
            try:
                opened = GGUFReader(file)
            except (ValueError, OSError, KeyError, IndexError) as error:
                raise CheckpointError(f"{file}: not a GGUF file, or cut short ({error})") from None
            fields = fields or {
                name: field.contents() for name, field in opened.fields.items() if "tokenizer" not in name
            }
            architecture = str(fields.get("general.architecture"))
            if architecture not in _ARCHITECTURES:
                raise CheckpointError(
                    f"{file}: GGUF of architecture {architecture!r}, whose conversion deltalens does not undo "
                    f"(it knows {', '.join(sorted(_ARCHITECTURES))}); give the checkpoint it was made from"
                )
            for tensor in opened.tensors:
                if tensor.name.startswith("rope_"):
                    continue
                name = _hf_name(tensor.name, _ARCHITECTURES[architecture])
                shape = tuple(int(n) for n in reversed(tensor.shape))
                dtype = _STORED.get(tensor.tensor_type.name, "F32")
                heads = 0
                if architecture in _PERMUTED and re.search(r"\.self_attn\.[qk]_proj\.", name):
                    heads = int(fields[f"{architecture}.attention.head_count"])
                    if ".k_proj." in name:
                        heads = int(fields.get(f"{architecture}.attention.head_count_kv", heads))
                if architecture in _NORM_PLUS_ONE and name.endswith("norm.weight"):
                    self._minus_one.add(name)
                self._entries[name] = TensorEntry(name, dtype, shape, file)
                self._stored[name] = (int(tensor.data_offset), tensor.tensor_type, tuple(tensor.data.shape), heads)
                kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        quantised = {kind: n for kind, n in kinds.items() if kind not in _STORED}
        told = ", ".join(f"{n} {kind}" for kind, n in sorted(quantised.items()))
        self.notes: tuple[str, ...] = (
            (f"GGUF tensors were dequantised to float32 ({told}): quantisation error is part of every difference",)
            if quantised
            else ()
        )

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def read(
        self, name: str, buffer: np.ndarray | None = None, *, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        entry = self._entries[name]
        offset, kind, stored_shape, heads = self._stored[name]
        begin, length = byte_range(entry, start, count)
        plain = kind.name in _STORED
        if plain and not heads and name not in self._minus_one:
            out = np.empty(length, np.uint8) if buffer is None else buffer[:length]
            self._reader.pread(entry.file, offset + begin, out, name)
            return out
        if plain:
            raw = np.empty(entry.nbytes, np.uint8)
            self._reader.pread(entry.file, offset, raw, name)
            width = entry.nbytes // entry.size
            values = raw.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[width]).reshape(entry.shape)
            if name in self._minus_one:
                values = values.view(np.float32) - np.float32(1)
        else:
            from gguf import dequantize

            raw = np.empty(int(np.prod(stored_shape)), np.uint8)
            self._reader.pread(entry.file, offset, raw, name)
            values = dequantize(raw.reshape(stored_shape), kind).reshape(entry.shape)
        if heads:
            values = _unpermute(values, heads)
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)[begin : begin + length]
        if buffer is None:
            return flat
        buffer[:length] = flat
        return buffer[:length]

    def close(self) -> None:
        self._reader.close()


def _hf_name(name: str, block: Mapping[str, str]) -> str:
    """transformers' name of a GGUF tensor; the GGUF name where none is known."""
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and match[2] in block:
        return f"model.layers.{match[1]}.{block[match[2]]}.{leaf}"
    return name


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's order (pairs of one frequency adjacent) to transformers' (halves)."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
