from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from deltalens.checkpoint import open_checkpoint
from deltalens.checkpoint.formats.gguf import _ARCHITECTURES, _hf_name
from deltalens.errors import CheckpointError

HEADS, GROUPS, WIDTH, HIDDEN, INNER, VOCAB = 4, 2, 8, 32, 64, 40


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HEADS * WIDTH, HIDDEN), "blk.0.attn_k": (GROUPS * WIDTH, HIDDEN),
        "blk.0.attn_v": (GROUPS * WIDTH, HIDDEN), "blk.0.attn_output": (HIDDEN, HEADS * WIDTH),
        "blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _write(file: Path, architecture: str, weights: dict[str, np.ndarray], kind: Any) -> None:
    """As llama.cpp's converters do: matrices in `kind`, vectors in float32."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_context_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    for name, value in weights.items():
        if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_against_transformers(tmp_path: Path, architecture: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    _write(tmp_path / "m.gguf", architecture, _weights(), gguf.GGMLQuantizationType[kind])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    expected = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" and not n.endswith("bias")}
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.entries) == set(expected)
    for name, tensor in expected.items():
        entry = checkpoint.entries[name]
        kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        values = checkpoint.read(name).view(kinds[entry.dtype]).astype(np.float32).reshape(entry.shape)
        np.testing.assert_array_equal(values, tensor.numpy(), err_msg=name)
        width = 4 if entry.dtype == "F32" else 2
        part = checkpoint.read(name, np.empty(99, np.uint8), start=3, count=7)
        np.testing.assert_array_equal(part, checkpoint.read(name)[3 * width : 10 * width])
    dtype = checkpoint.entries["model.layers.0.mlp.up_proj.weight"].dtype
    assert dtype == (kind if kind in kinds else "F32")
    assert any("dequantised" in note for note in checkpoint.notes) == kind.startswith("Q")


def test_gemmas_norms_lose_the_one_that_conversion_added(tmp_path: Path) -> None:
    weights = _weights()
    _write(tmp_path / "m.gguf", "gemma2", weights, gguf.GGMLQuantizationType.F32)
    norm = open_checkpoint(tmp_path / "m.gguf").read("model.norm.weight").view(np.float32)
    np.testing.assert_array_equal(norm, weights["output_norm.weight"] - np.float32(1))


@pytest.mark.parametrize("architecture", sorted(_ARCHITECTURES))
def test_names_agree_with_the_packages_own_map(architecture: str) -> None:
    (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, 3)
    for stem in _ARCHITECTURES[architecture]:
        hf = _hf_name(f"blk.2.{stem}.weight", _ARCHITECTURES[architecture])
        known = names.get_name(hf, try_suffixes=(".weight",))
        assert known in (f"blk.2.{stem}.weight", None)
        if known is None:  # the table is shared; this architecture does not have the tensor
            assert stem in ("attn_q_norm", "attn_k_norm", "attn_q", "attn_k", "attn_v", "ffn_gate"), (
                architecture,
                stem,
            )


def test_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUFnot really")
    with pytest.raises(CheckpointError, match=r"x\.gguf: not a GGUF file"):
        open_checkpoint(tmp_path)
    _write(tmp_path / "x.gguf", "mamba", _weights(), gguf.GGMLQuantizationType.F32)
    with pytest.raises(CheckpointError, match="architecture 'mamba'"):
        open_checkpoint(tmp_path)
    (tmp_path / "y.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 GGUF files; give one"):
        open_checkpoint(tmp_path)
