"""Interventions: algebra, naive twins, files that load, and what is refused."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from subnetwork_fixtures import (
    BF16,
    DOWN,
    EMBEDDING,
    NORM,
    SHAPES,
    UP,
    Q,
    delta,
    source_tensors,
    stored,
    trained_tensors,
    words,
)  # fmt: skip

from deltalens import intervene
from deltalens.errors import CheckpointError, ConfigError
from deltalens.subnetwork import select_mask
from deltalens.subnetwork.draw import rank_of
from deltalens.subnetwork.intervene import principal_part, truncated


@pytest.fixture(scope="module")
def tensors() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    source = source_tensors()
    return source, trained_tensors(source)


@pytest.fixture(scope="module")
def sides(tensors, write_checkpoint) -> tuple[Path, Path]:
    return write_checkpoint(tensors[0], shards=2), write_checkpoint(tensors[1])


@pytest.mark.parametrize("keep", ["top:1.0", "scale:1", "rank:16", "role:ffn,attention,embedding,norm", "mask:all"])
def test_keeping_all_is_trained_bit_for_bit(keep: str, sides, tmp_path: Path) -> None:
    if keep == "mask:all":
        keep = f"mask:{tmp_path / 'all.mask'}"
        select_mask(sides[0], rule="random:1.0").save(tmp_path / "all.mask")
    done = intervene(*sides, tmp_path / "out", keep=keep)
    assert stored(tmp_path / "out") == stored(sides[1])
    assert (done.changed, done.energy) == (done.trained_changed, done.trained_energy)
    assert done.kept == 1
    assert done.tensors == len(SHAPES)


@pytest.mark.parametrize("keep", ["top:0.0", "scale:0", "layers:0-1", "mask:none"])
def test_keeping_none_is_the_source(keep: str, sides, tmp_path: Path) -> None:
    if keep == "mask:none":
        keep = f"mask:{tmp_path / 'none.mask'}"
        select_mask(sides[0], rule="random:0.0").save(tmp_path / "none.mask")
    done = intervene(*sides, tmp_path / "out", keep=keep)
    if keep.startswith("layers"):
        assert {n for n, data in stored(tmp_path / "out").items() if data == stored(sides[0])[n]} == {EMBEDDING, NORM}
        return
    assert stored(tmp_path / "out") == stored(sides[0])
    assert (done.changed, done.kept) == (0, 0)


def test_a_mask_and_its_complement_add_up(sides, tmp_path: Path) -> None:
    mask = select_mask(sides[0], rule="random:0.3")
    mask.save(tmp_path / "a.mask")
    (~mask).save(tmp_path / "b.mask")
    a = intervene(*sides, tmp_path / "a", keep=f"mask:{tmp_path / 'a.mask'}")
    b = intervene(*sides, tmp_path / "b", keep=f"mask:{tmp_path / 'b.mask'}")
    for name in SHAPES:
        before, after = words(sides[0], name), words(sides[1], name)
        np.testing.assert_array_equal(words(tmp_path / "a", name), np.where(mask.flat(name), after, before))
        np.testing.assert_array_equal(words(tmp_path / "b", name), np.where(mask.flat(name), before, after))
    assert a.changed + b.changed == a.trained_changed
    assert a.energy + b.energy == pytest.approx(a.trained_energy)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_top_is_the_mask_of_the_largest(scope, sides, tensors, tmp_path: Path) -> None:
    done = intervene(*sides, tmp_path / "out", keep="top:0.1", scope=scope)
    mask = select_mask(*sides, rule="top:0.1", scope=scope)
    energy = 0.0
    for name in SHAPES:
        before, after = words(sides[0], name), words(sides[1], name)
        np.testing.assert_array_equal(words(tmp_path / "out", name), np.where(mask.flat(name), after, before))
        energy += (delta(*tensors, name)[mask.dense(name)] ** 2).sum()
    assert done.energy == pytest.approx(energy)
    assert 0.1 < done.kept < 1


@pytest.mark.parametrize(("keep", "kept"), [("role:ffn", {UP, DOWN}), ("role:norm,attention", {NORM, Q}),
                                            ("layers:0", {Q, UP}), ("layers:0-5", {Q, UP, DOWN})])  # fmt: skip
def test_roles_and_layers_are_kept_whole(keep: str, kept: set[str], sides, tmp_path: Path) -> None:
    intervene(*sides, tmp_path / "out", keep=keep)
    written = stored(tmp_path / "out")
    for name in SHAPES:
        assert written[name] == stored(sides[1] if name in kept else sides[0])[name]


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), ratio=st.floats(0, 1), seed=st.integers(0, 99), low=st.booleans())
def test_parts_of_an_update_in_float64(m: int, n: int, ratio: float, seed: int, low: bool) -> None:
    rng = np.random.default_rng(seed)
    w, d = rng.standard_normal((m, n)), rng.standard_normal((m, n))
    if low:
        d = np.outer(rng.standard_normal(m), rng.standard_normal(n))
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    k = rank_of(ratio, (m, n))
    part = principal_part(w, d, ratio)
    np.testing.assert_allclose(part, u[:, :k] @ u[:, :k].T @ d @ vt[:k].T @ vt[:k], atol=1e-8)
    off = d - part
    assert (part**2).sum() + (off**2).sum() == pytest.approx((d**2).sum()), "the two parts are orthogonal"
    np.testing.assert_allclose(part + off, d, atol=1e-12)
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    for k in {1, min(m, n)}:
        np.testing.assert_allclose(truncated(d, k), (u[:, :k] * s[:k]) @ vt[:k], atol=1e-8 * (1 + s[0]))


def kept_twin(tensors, name: str, keep: str) -> np.ndarray:
    """A naive twin in float64: the part of Δ that a rule keeps."""
    source, step = tensors[0][name].astype(np.float64), delta(*tensors, name)
    kind, _, number = keep.partition(":")
    if kind == "scale":
        return float(number) * step
    if step.ndim == 1:
        return 0 * step if kind == "principal" else step
    if kind == "rank":
        u, s, vt = np.linalg.svd(step, full_matrices=False)
        return (u[:, : int(number)] * s[: int(number)]) @ vt[: int(number)]
    u, _, vt = np.linalg.svd(source, full_matrices=False)
    k = rank_of(float(number or 0.1), source.shape)
    part = u[:, :k] @ u[:, :k].T @ step @ vt[:k].T @ vt[:k]
    return part if kind == "principal" else step - part


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)])
@pytest.mark.parametrize(
    "keep", ["rank:1", "rank:5", "principal", "off-principal", "principal:0.5", "scale:0.5", "scale:-2"]
)
def test_computed_parts_against_a_naive_twin(keep: str, dtype, tmp_path: Path, write_checkpoint) -> None:
    source = source_tensors(dtype=dtype)
    tensors = source, trained_tensors(source)
    out = tmp_path / "out"
    done = intervene(*map(write_checkpoint, tensors), out, keep=keep)
    written = load_file(out / "model.safetensors")
    energy = meant = 0.0
    for name in SHAPES:
        assert written[name].dtype == dtype
        part = kept_twin(tensors, name, keep)
        wanted = (source[name].astype(np.float64) + part).astype(dtype)
        meant += (part**2).sum()
        if dtype.itemsize == 2:  # no rounding boundary lies within the last digits of float64
            np.testing.assert_array_equal(written[name], wanted)
        else:
            np.testing.assert_allclose(written[name], wanted, rtol=2e-7, atol=1e-12)
        energy += ((written[name].astype(np.float64) - source[name].astype(np.float64)) ** 2).sum()
    assert done.energy == pytest.approx(energy)
    assert done.meant_energy == pytest.approx(meant)


def test_what_rounding_takes_is_reported(sides, tmp_path: Path) -> None:
    done = intervene(*sides, tmp_path / "out", keep="scale:0.01")
    assert done.meant_energy == pytest.approx(1e-4 * done.trained_energy)
    assert done.energy < 0.5 * done.meant_energy


def test_dtypes_are_those_of_trained(tmp_path: Path, write_checkpoint) -> None:
    source = source_tensors(dtype=np.dtype(np.float32))
    trained = {name: values.astype(BF16) for name, values in trained_tensors(source, scale=1e-3).items()}
    out = tmp_path / "out"
    intervene(write_checkpoint(source), write_checkpoint(trained), out, keep="role:ffn")
    written = load_file(out / "model.safetensors")
    for name, values in written.items():
        np.testing.assert_array_equal(values, trained[name] if name in (UP, DOWN) else source[name].astype(BF16))


def test_files_are_sharded_as_the_source_and_carry_the_config_of_trained(
    sides, tensors, tmp_path: Path, write_checkpoint
) -> None:
    trained = write_checkpoint({**tensors[1], "extra.weight": np.ones(3, BF16)})
    for file, text in {
        "config.json": "{}",
        "tokenizer.json": "{}",
        "model.safetensors.index.json.bak": "",
        ".x": "",
    }.items():
        (trained / file).write_text(text)
    (trained / "optimizer.pt").write_bytes(b"much")
    done = intervene(sides[0], trained, tmp_path / "whole", keep="top:0.5")
    assert done.untouched == ["extra.weight"]
    assert {file.name for file in (tmp_path / "whole").iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json.bak"
    }  # fmt: skip
    intervene(*sides, tmp_path / "shards", keep="top:0.5")
    assert {file.name for file in (tmp_path / "shards").iterdir()} == {file.name for file in sides[0].iterdir()}
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((sides[0] / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors[0].values())


def test_a_stored_tied_head_follows_the_embedding(tensors, tmp_path: Path, write_checkpoint) -> None:
    head = "lm_head.weight"
    source, trained = (write_checkpoint({**side, head: side[EMBEDDING]}) for side in tensors)
    done = intervene(source, trained, tmp_path / "out", keep="top:0.3")
    written = stored(tmp_path / "out")
    assert written[head] == written[EMBEDDING] != stored(trained)[head]
    assert done.parameters == sum(int(np.prod(shape)) for shape in SHAPES.values())


def test_experts_are_cut_one_by_one(tmp_path: Path, write_checkpoint) -> None:
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.experts.down_proj"
    source = {name: rng.standard_normal((3, 8, 6)).astype(np.float32)}
    trained = {name: source[name] + rng.standard_normal((3, 8, 6)).astype(np.float32)}
    intervene(write_checkpoint(source), write_checkpoint(trained), tmp_path / "out", keep="rank:1")
    step = load_file(tmp_path / "out" / "model.safetensors")[name].astype(np.float64) - source[name]
    for expert in range(3):
        assert np.linalg.matrix_rank(step[expert], tol=1e-4) == 1
        u, s, vt = np.linalg.svd(trained[name][expert].astype(np.float64) - source[name][expert])
        np.testing.assert_allclose(step[expert], s[0] * np.outer(u[:, 0], vt[0]), atol=1e-5)


def test_the_result_loads_with_transformers(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    model.save_pretrained(tmp_path / "trained")
    intervene(tiny_model, tmp_path / "trained", tmp_path / "out", keep="role:ffn")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in loaded.state_dict().items():
        wanted = model.state_dict()[name] if ".mlp." in name else before[name]
        assert torch.equal(value, wanted), name


def test_mistakes_are_said_and_leave_nothing_behind(sides, tensors, tmp_path: Path, write_checkpoint) -> None:
    out = tmp_path / "sub" / "out"
    out.parent.mkdir()
    for keep, said in {
        "ranc:3": "did you mean rank", "rank:few": "whole number", "scale:big": "takes a number",
        "top:2": "from 0 to 1",
        "principal:2": "from 0 to 1", "role:mlp": "no role", "role:vision": "nothing would be kept",
        "layers:77": "nothing would be kept", "mask:": "needs a file",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            intervene(*sides, out, keep=keep)
    with pytest.raises(ConfigError, match="of top only"):
        intervene(*sides, out, keep="rank:1", scope="global")
    mask = tmp_path / "other.mask"
    select_mask(sides[1], rule="random:0.5").save(mask)
    with pytest.raises(CheckpointError, match=r"other\.mask: this mask was made for another source"):
        intervene(*sides, out, keep=f"mask:{mask}")
    broken = {**tensors[1], DOWN: np.full_like(tensors[1][DOWN], np.nan)}
    with pytest.raises(CheckpointError, match=f"{DOWN}' holds NaN"):
        intervene(sides[0], write_checkpoint(broken), out, keep="rank:1")
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        intervene(*sides, out, keep="rank:1")
    assert [file.name for file in out.iterdir()] == ["mine"]
    with pytest.raises(CheckpointError, match="cannot be written"):
        intervene(*sides, out / "mine" / "deep", keep="rank:1")


def test_bits_are_copied_as_they_are(tmp_path: Path, write_checkpoint) -> None:
    """−0, NaN payloads and infinities go through; the energies of what is not finite are nobody's concern."""
    source = np.array([[0x0000, 0x7FC1], [0x3F80, 0xFF80]], np.uint16).view(ml_dtypes.bfloat16)
    trained = np.array([[0x8000, 0x7FC2], [0x3F81, 0x7F80]], np.uint16).view(ml_dtypes.bfloat16)
    a, b = write_checkpoint({UP: source}), write_checkpoint({UP: trained})
    intervene(a, b, tmp_path / "none", keep="scale:0")
    intervene(a, b, tmp_path / "all", keep="role:ffn")
    assert stored(tmp_path / "none") == stored(a)
    assert stored(tmp_path / "all") == stored(b)


def test_an_adapter_is_merged(tensors, tmp_path: Path, write_checkpoint) -> None:
    """TRAINED may be a LoRA adapter: what is written is a whole model with the base's config, and no adapter."""
    source = write_checkpoint({name: values.astype(np.float32) for name, values in tensors[0].items()})
    (source / "config.json").write_text('{"model_type": "llama"}')
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 16)).astype(np.float32), rng.standard_normal((24, 2)).astype(np.float32)
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    intervene(source, adapter, tmp_path / "out", keep="rank:1")
    written = load_file(tmp_path / "out" / "model.safetensors")
    u, s, vt = np.linalg.svd(2 * b.astype(np.float64) @ a)
    step = written[UP].astype(np.float64) - tensors[0][UP].astype(np.float64)
    np.testing.assert_allclose(step, s[0] * np.outer(u[:, 0], vt[0]), atol=1e-5)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
