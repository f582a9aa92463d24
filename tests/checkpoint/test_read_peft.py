import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltalens.checkpoint import open_checkpoint, pair_checkpoints
from deltalens.errors import CheckpointError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402


def _llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def _adapter(model: Any, folder: Path, **settings: Any) -> Any:
    """Saves the base and an adapter with random factors; returns the merged float32 weights."""
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model.float(), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    embeddings = "embed_tokens" in settings["target_modules"]  # "auto" decides the same, with a warning
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=embeddings)
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2},
         "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"target_modules": ["embed_tokens", "k_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear"},
    ],
)  # fmt: skip
def test_merged_weights_and_factors(tmp_path: Path, settings: dict[str, Any]) -> None:
    merged = _adapter(_llama(), tmp_path, **settings)
    base = open_checkpoint(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "adapter", base=base)
    assert set(checkpoint.entries) == set(merged)
    adapted = 0
    for name, tensor in merged.items():
        entry = checkpoint.entries[name]
        raw = checkpoint.read(name)
        if entry.dtype == "BF16":
            np.testing.assert_array_equal(raw, base.read(name))
            assert checkpoint.factors(name) is None
            continue
        adapted += 1
        values = raw.view(np.float32).reshape(entry.shape)
        np.testing.assert_allclose(values, tensor.numpy(), rtol=1e-5, atol=1e-6)
        part = checkpoint.read(name, np.empty(400, np.uint8), start=5, count=40).view(np.float32)
        np.testing.assert_allclose(part, values.ravel()[5:45], rtol=1e-6, atol=1e-7)
        if factors := checkpoint.factors(name):
            left, right = factors
            before = (base.read(name).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
            assert left.shape[1] == right.shape[0] <= 4
            np.testing.assert_allclose(left @ right, values - before, atol=1e-6)
    assert adapted >= 3
    pairing = pair_checkpoints(base, checkpoint)
    assert len(pairing.pairs) == len(merged)
    assert pairing.skipped == []


def test_fan_in_fan_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    merged = _adapter(model, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    checkpoint = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))
    name = "transformer.h.0.attn.c_attn.weight"
    values = checkpoint.read(name).view(np.float32).reshape(16, 48)
    np.testing.assert_allclose(values, merged[name].numpy(), rtol=1e-5, atol=1e-6)
    left, right = checkpoint.factors(name) or pytest.fail("no factors")
    assert (left.shape, right.shape) == ((16, 4), (4, 48))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_rslora": True}, "use_rslora is not supported yet"),
        ({"use_dora": True}, "use_dora is not supported yet"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"peft_type": "IA3"}, "a IA3 adapter"),
        ({"r": 8}, "has rank 4, not the rank"),
    ],
)
def test_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    _adapter(_llama(), tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))


def test_an_adapter_alone_and_over_another_base(tmp_path: Path) -> None:
    _adapter(_llama(), tmp_path, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="is a PEFT adapter, which holds no weights of its own"):
        open_checkpoint(tmp_path / "adapter")
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=r"adapts 'model.layers.0.self_attn.q_proj'.*is this its base\?"):
        open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "gpt2"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model.safetensors nor .bin"):
        open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))
