import pytest

from deltalens.checkpoint import ROLES, role_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("attention", 3, "q_proj")),
        ("model.layers.3.self_attn.q_proj.bias", ("attention", 3, "q_proj")),
        ("model.layers.0.self_attn.q_norm.weight", ("norm", 0, "q_norm")),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", ("attention", 0, "in_proj_qkvz")),
        ("model.layers.29.mlp.down_proj.weight", ("ffn", 29, "down_proj")),
        ("model.layers.1.mlp.experts.7.w1.weight", ("ffn", 1, "w1")),
        ("model.layers.1.mlp.experts.gate_up_proj[12]", ("ffn", 1, "gate_up_proj")),
        ("model.layers.1.mlp.gate.weight", ("ffn", 1, "gate")),
        ("model.layers.1.block_sparse_moe.gate.weight", ("ffn", 1, "gate")),
        ("model.layers.2.self_attn.qkv_proj.weight[k]", ("attention", 2, "k_proj")),
        ("model.layers.2.mlp.gate_up_proj.weight[up]", ("ffn", 2, "up_proj")),
        ("model.embed_tokens.weight", ("embedding", None, "embed_tokens")),
        ("model.embed_tokens.weight[100:128]", ("embedding", None, "embed_tokens")),
        ("lm_head.weight", ("lm_head", None, "lm_head")),
        ("output.weight", ("lm_head", None, "output")),
        ("tok_embeddings.weight", ("embedding", None, "tok_embeddings")),
        ("layers.0.feed_forward.w2.weight", ("ffn", 0, "w2")),
        ("layers.0.attention.wq.weight", ("attention", 0, "wq")),
        ("layers.0.attention_norm.weight", ("norm", 0, "attention_norm")),
        ("model.norm.weight", ("norm", None, "norm")),
        ("transformer.h.5.attn.c_attn.weight", ("attention", 5, "c_attn")),
        ("transformer.h.5.attn.c_proj.weight", ("attention", 5, "c_proj")),
        ("transformer.h.5.mlp.c_proj.weight", ("ffn", 5, "c_proj")),
        ("transformer.ln_f.weight", ("norm", None, "ln_f")),
        ("transformer.wte.weight", ("embedding", None, "wte")),
        ("gpt_neox.layers.1.attention.query_key_value.weight", ("attention", 1, "query_key_value")),
        ("gpt_neox.layers.1.mlp.dense_h_to_4h.weight", ("ffn", 1, "dense_h_to_4h")),
        ("embed_out.weight", ("lm_head", None, "embed_out")),
        ("bert.encoder.layer.4.attention.output.dense.weight", ("attention", 4, "dense")),
        ("bert.encoder.layer.4.output.dense.weight", ("ffn", 4, "dense")),
        ("bert.encoder.layer.4.intermediate.dense.weight", ("ffn", 4, "dense")),
        ("bert.encoder.layer.4.output.LayerNorm.bias", ("norm", 4, "LayerNorm")),
        ("bert.embeddings.word_embeddings.weight", ("embedding", None, "word_embeddings")),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", ("attention", 0, "q")),
        ("model.visual.blocks.7.attn.qkv.weight[v]", ("vision.attention", None, "v_proj")),
        ("visual.blocks.7.mlp.fc1.weight", ("vision.ffn", None, "fc1")),
        ("visual.blocks.7.norm1.weight", ("vision.norm", None, "norm1")),
        ("visual.patch_embed.proj.weight", ("vision.embedding", None, "proj")),
        ("visual.merger.mlp.0.weight", ("vision.projector", None, "mlp.0")),
        ("model.vision_tower.encoder.layers.3.self_attn.k_proj.weight", ("vision.attention", None, "k_proj")),
        ("model.multi_modal_projector.linear_1.weight", ("vision.projector", None, "linear_1")),
        ("model.language_model.layers.2.mlp.up_proj.weight", ("ffn", 2, "up_proj")),
        ("audio_tower.layers.0.self_attn.q_proj.weight", ("other", None, "q_proj")),
        ("score.weight", ("other", None, "score")),
    ],
)
def test_names_of_common_architectures(name: str, expected: tuple[str, int | None, str]) -> None:
    assert role_of(name) == expected
    assert expected[0].partition(".")[0] in ROLES


def test_any_text_has_a_role() -> None:
    for name in ("", ".", "weight", "a..b", "[0]", "layers.x.weight"):
        assert role_of(name)[0].partition(".")[0] in ROLES
