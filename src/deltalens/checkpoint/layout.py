"""How a stored tensor divides into matrices: stacks of experts, fused projections."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

__all__ = ["expert_stack", "fused_parts", "stacked_experts"]

# Read in transformers' modeling files: q, k, v stand one after another along the output dimension, likewise gate
# and up. GPT-NeoX, Bloom, Falcon and Persimmon interleave q, k, v head by head, GPT-2 stores (in, out): whole.
_QKV = {"phi3": "qkv_proj", "phi4_multimodal": "qkv_proj", "dbrx": "Wqkv"}
_GATE_UP = {"phi3", "phi4_multimodal", "glm", "glm4"}
_VISION_QKV = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe"}


def expert_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the first dimension counts experts: (E, a, b), or (E, n) of a bias."""
    segments = name.split(".")
    if not any("expert" in s or s in ("moe", "block_sparse_moe") for s in segments[:-1]):
        return False
    return len(shape) == 3 or (len(shape) == 2 and segments[-1].endswith("_bias"))


def fused_parts(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Row-name suffix and number of rows of each part of a fused weight or bias; `[("", rows)]` where it is whole.

    Args:
        name: the tensor's name.
        shape: (out, in) or (out,).
        config: the checkpoint's config.json; empty where there is none, and then nothing is split.
    """
    rows = shape[0]
    whole = [("", rows)]
    segments = name.split(".")
    module = segments[-2] if len(segments) > 1 else ""
    kind = config.get("model_type")
    if module == "qkv" and "visual" in segments:
        if kind in _VISION_QKV and rows % 3 == 0:
            return [("[q]", rows // 3), ("[k]", rows // 3), ("[v]", rows // 3)]
        return whole
    if "vision" in name or "visual" in name or "audio" in name:
        return whole
    text = config.get("text_config")
    settings = text if isinstance(text, Mapping) else config
    kind = settings.get("model_type", kind)
    if module == "gate_up_proj" and kind in _GATE_UP and rows == 2 * int(settings.get("intermediate_size") or 0):
        return [("[gate]", rows // 2), ("[up]", rows // 2)]
    if module == _QKV.get(str(kind)):
        heads = int(settings.get("num_attention_heads") or settings.get("n_heads") or 0)
        attention = settings.get("attn_config")
        inner = attention if isinstance(attention, Mapping) else {}
        groups = int(settings.get("num_key_value_heads") or inner.get("kv_n_heads") or heads)
        hidden = int(settings.get("hidden_size") or settings.get("d_model") or 0)
        width = int(settings.get("head_dim") or (hidden // heads if heads else 0))
        if width and rows == (heads + 2 * groups) * width:
            return [("[q]", heads * width), ("[k]", groups * width), ("[v]", groups * width)]
    return whole


def stacked_experts(name: str, shape: tuple[int, ...]) -> list[tuple[str, int, tuple[int, ...]]]:
    """The separate tensors that a stack of experts stands for: name, first element, shape; [] of any other tensor.

    `…experts.gate_up_proj` (E, 2a, b) holds for each expert gate_proj's rows, then up_proj's;
    `…experts.down_proj` (E, b, a) holds down_proj: transformers 5, `conversion_mapping.py`.
    """
    stem, _, leaf = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf, ())
    if not stem.endswith(".experts") or len(shape) != 3 or not parts or shape[1] % len(parts):
        return []
    each = (shape[1] // len(parts), shape[2])
    return [
        (f"{stem}.{expert}.{part}.weight", (expert * len(parts) + i) * prod(each), each)
        for expert in range(shape[0])
        for i, part in enumerate(parts)
    ]
