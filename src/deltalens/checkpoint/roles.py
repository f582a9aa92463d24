"""What a tensor is, read off its name: role, layer and module.

Names follow the conventions of transformers (Llama, Qwen, Mistral, Gemma, Phi, GLM, GPT-2, GPT-NeoX, BERT, T5, the
vision-language models), of Meta's and torchtitan's Llama, and of the mixtures of experts built on them.
"""

from __future__ import annotations

import re
from itertools import pairwise

__all__ = ["ROLES", "role_of"]

ROLES = ("attention", "ffn", "embedding", "lm_head", "norm", "vision", "other")
"""The first part of every role; a vision role goes on as `vision.attention`, `vision.projector`, …"""

_PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}
_LEAVES = {"weight", "bias", "gamma", "beta"}
_STACKS = {"layers", "layer", "h", "block", "blocks"}

_TOWERS = {"visual", "vision", "vision_tower", "vision_model", "vision_encoder", "vision_backbone", "vit",
           "image_encoder", "vpm", "embed_vision"}  # fmt: skip
_PROJECTORS = {"merger", "connector", "multi_modal_projector", "mm_projector", "vision_projector", "aligner",
               "modality_projection", "deepstack_merger_list", "mlp1", "resampler", "embed_vision"}  # fmt: skip
_AUDIO = {"audio_tower", "audio_model", "audio_encoder", "embed_audio", "speech_encoder"}
_ATTENTION = {"attn", "self_attn", "attention", "self_attention", "cross_attn", "cross_attention", "encoder_attn",
              "linear_attn", "selfattention", "encdecattention"}  # fmt: skip
_FFN = {"mlp", "ffn", "feed_forward", "moe", "block_sparse_moe", "experts", "shared_expert", "shared_experts",
        "densereludense", "intermediate", "router"}  # fmt: skip
_ATTENTION_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "qkv", "wqkv", "query_key_value", "c_attn",
                      "in_proj_weight", "in_proj_bias", "wq", "wk", "wv", "wo"}  # fmt: skip
_FFN_MODULES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "w1",
                "w2", "w3", "wi", "wi_0", "wi_1", "dense_h_to_4h", "dense_4h_to_h", "linear_fc1",
                "linear_fc2"}  # fmt: skip
_EMBEDDINGS = {"embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings",
               "tok_embeddings", "embed_in", "embed_positions", "position_embedding", "pos_embed", "patch_embed",
               "patch_embedding", "class_embedding", "embed_tokens_per_layer", "shared", "embeddings"}  # fmt: skip
_HEADS = {"lm_head", "embed_out"}
_NORM = re.compile(r"norm|^ln(_|\d|$)|layer_?norm|^rms")


def role_of(name: str) -> tuple[str, int | None, str]:
    """Role, layer and module of a tensor or row name.

    Args:
        name: a tensor's name, or a row's: `…experts.gate_up_proj[3]`, `…qkv_proj.weight[q]`.

    Returns:
        role: one of `ROLES`. A vision tower's and its projector's are `vision.attention`, `vision.ffn`,
            `vision.norm`, `vision.embedding`, `vision.projector`, `vision.other`: the part before the dot is the
            role of a summary.
        layer: the block's number in the language model. None outside its blocks, and in a vision or audio tower,
            whose blocks are numbered on their own and must not be pooled with the language model's.
        module: the last module's name, `q_proj` for `model.layers.0.self_attn.q_proj.weight`; a fused tensor's part
            is named as if it stood alone (`[q]` → `q_proj`).
    """
    bare, _, bracket = name.partition("[")
    segments = [s for s in bare.split(".") if s]
    module = _module(segments)
    parts = {s.lower() for s in segments}
    if part := _PARTS.get(bracket.rstrip("]")):
        module = part
    if parts & _AUDIO:
        return "other", None, module
    if parts & (_TOWERS | _PROJECTORS):
        inner = "projector" if parts & _PROJECTORS else _plain_role(segments, parts, module)
        return f"vision.{inner}", None, module
    return _plain_role(segments, parts, module), _layer(segments), module


def _module(segments: list[str]) -> str:
    path = segments[:-1] if len(segments) > 1 and segments[-1] in _LEAVES else segments
    if len(path) > 1 and path[-1].isdigit():  # `mlp.0.weight` of a Sequential
        return ".".join(path[-2:])
    return path[-1] if path else ""


def _layer(segments: list[str]) -> int | None:
    for before, segment in pairwise(segments):
        if segment.isdigit() and before.lower() in _STACKS:
            return int(segment)
    return None


def _plain_role(segments: list[str], parts: set[str], module: str) -> str:
    low = module.lower()
    if _NORM.search(low):
        return "norm"
    if low in _HEADS or segments[:-1] == ["output"]:  # Meta's and torchtitan's name for the head
        return "lm_head"
    if low in _EMBEDDINGS or parts & {"patch_embed", "patch_embedding"}:
        return "embedding"
    if low in _ATTENTION_MODULES or parts & _ATTENTION:
        return "attention"
    if low in _FFN_MODULES or parts & _FFN:
        return "ffn"
    if low == "dense" and len(segments) > 2 and segments[-3] == "output":  # BERT: layer.N.output.dense
        return "ffn"
    return "embedding" if "embeddings" in parts else "other"
