import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from deltalens.checkpoint import Checkpoint, open_checkpoint, pair_checkpoints
from deltalens.errors import CheckpointError

Make = Callable[..., Checkpoint]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a checkpoint of the given tensors (arrays, or shapes filled with distinct values) and opens it."""
    counter = iter(range(100))

    def build(tensors: Mapping[str, Any], config: dict[str, Any] | None = None, vocab: Any = None) -> Checkpoint:
        folder = tmp_path / str(next(counter))
        folder.mkdir()
        arrays = {
            name: value if isinstance(value, np.ndarray) else np.arange(np.prod(value), dtype=np.float32).reshape(value)
            for name, value in tensors.items()
        }
        save_file(arrays, folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if vocab is not None:
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
        return open_checkpoint(folder)

    return build


def _skips(pairing: Any) -> dict[str, str]:
    return {skip.tensor: skip.reason for skip in pairing.skipped}


def test_exact_names_and_roles(make: Make) -> None:
    tensors = {"model.layers.4.self_attn.q_proj.weight": (4, 6), "model.norm.weight": (6,)}
    pairing = pair_checkpoints(make(tensors), make(tensors))
    by_name = {pair.name: pair for pair in pairing.pairs}
    pair = by_name["model.layers.4.self_attn.q_proj.weight"]
    assert (pair.role, pair.layer, pair.module, pair.shape) == ("attention", 4, "q_proj", (4, 6))
    assert pair.is_matrix
    assert not by_name["model.norm.weight"].is_matrix
    assert pairing.skipped == []
    assert pairing.warnings == []


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("visual.blocks.0.attn.proj.weight", "model.visual.blocks.0.attn.proj.weight"),
        ("h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight"),
        ("model.layers.0.mlp.up_proj.weight", "module._orig_mod.model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_wrapper_prefixes(make: Make, ours: str, theirs: str) -> None:
    (pair,) = pair_checkpoints(make({ours: (2, 3)}), make({theirs: (2, 3)})).pairs
    assert (pair.name, pair.source_name, pair.trained_name) == (ours, ours, theirs)


def test_an_exact_name_wins_over_a_wrapped_one_and_ambiguity_matches_nothing(make: Make) -> None:
    source = make({"model.a.weight": (2, 2), "b.weight": (2, 2)})
    trained = make({"model.a.weight": (2, 2), "a.weight": (2, 2), "model.b.weight": (2, 2), "module.b.weight": (2, 2)})
    pairing = pair_checkpoints(source, trained)
    assert [(p.source_name, p.trained_name) for p in pairing.pairs] == [("model.a.weight", "model.a.weight")]
    assert set(_skips(pairing)) == {"b.weight", "a.weight", "model.b.weight", "module.b.weight"}


def test_missing_integer_reshaped_and_quantised_are_listed(make: Make) -> None:
    shared = {"model.x.weight": (3, 3)}
    source = make(
        shared | {"model.gone.weight": (2,), "model.q.weight": (2, 2), "model.r.weight": (2, 3),
                  "model.i": np.arange(3), "model.empty": (0, 3)}
    )  # fmt: skip
    trained = make(
        shared | {"model.new.weight": (2,), "model.q.qweight": np.ones((1, 2), np.int32), "model.r.weight": (3, 2),
                  "model.i": np.arange(3), "model.empty": (0, 3)}
    )  # fmt: skip
    pairing = pair_checkpoints(source, trained)
    assert [pair.name for pair in pairing.pairs] == ["model.x.weight"]
    skips = _skips(pairing)
    assert skips["model.gone.weight"] == "only in SOURCE"
    assert skips["model.new.weight"] == "only in TRAINED"
    assert "quantised in TRAINED" in skips["model.q.weight"]
    assert "quantised" in skips["model.q.qweight"]
    assert skips["model.r.weight"] == "reshaped: [2, 3] in SOURCE, [3, 2] in TRAINED"
    assert "I64" in skips["model.i"]
    assert skips["model.empty"] == "empty"


def _values(checkpoint: Checkpoint, name: str, start: int, pair: Any) -> np.ndarray:
    return checkpoint.read(name, start=start, count=pair.count).view(np.float32).reshape(pair.shape)


def test_experts_are_matrices_and_convolutions_are_unrolled(make: Make) -> None:
    tensors = {
        "model.layers.0.mlp.experts.down_proj": (3, 4, 5),
        "model.layers.0.mlp.experts.down_proj_bias": (3, 5),
        "visual.patch_embed.proj.weight": (4, 3, 2, 2),
        "model.scale": (),
    }
    source = make(tensors)
    pairs = {pair.name: pair for pair in pair_checkpoints(source, make(tensors)).pairs}
    stack = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for i in range(3):
        pair = pairs[f"model.layers.0.mlp.experts.down_proj[{i}]"]
        assert (pair.role, pair.layer, pair.module) == ("ffn", 0, "down_proj")
        np.testing.assert_array_equal(_values(source, pair.source_name, pair.source_start, pair), stack[i])
        assert pairs[f"model.layers.0.mlp.experts.down_proj_bias[{i}]"].shape == (5,)
    assert pairs["visual.patch_embed.proj.weight"].shape == (4, 12)
    assert pairs["model.scale"].shape == (1,)


PHI3 = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8,
        "intermediate_size": 6}  # fmt: skip


def test_fused_projections_are_split_where_the_config_tells(make: Make) -> None:
    tensors = {"model.layers.0.self_attn.qkv_proj.weight": (16, 8), "model.layers.0.mlp.gate_up_proj.weight": (12, 8)}
    source = make(tensors, PHI3)
    pairs = {pair.name: pair for pair in pair_checkpoints(source, make(tensors, PHI3)).pairs}
    qkv = np.arange(128, dtype=np.float32).reshape(16, 8)
    stem = "model.layers.0.self_attn.qkv_proj.weight"
    for label, rows in (("q", slice(0, 8)), ("k", slice(8, 12)), ("v", slice(12, 16))):
        pair = pairs[f"{stem}[{label}]"]
        assert pair.module == f"{label}_proj"
        np.testing.assert_array_equal(_values(source, stem, pair.source_start, pair), qkv[rows])
    assert pairs["model.layers.0.mlp.gate_up_proj.weight[up]"].source_start == 48
    without = pair_checkpoints(make(tensors), make(tensors))
    assert {pair.name for pair in without.pairs} == set(tensors)


def test_layouts_interleaved_by_head_stay_whole(make: Make) -> None:
    tensors = {"gpt_neox.layers.0.attention.query_key_value.weight": (24, 8)}
    config = {"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_size": 8}
    assert len(pair_checkpoints(make(tensors, config), make(tensors, config)).pairs) == 1


def test_vision_qkv(make: Make) -> None:
    tensors = {"visual.blocks.0.attn.qkv.weight": (24, 8), "visual.blocks.0.attn.qkv.bias": (24,)}
    config = {"model_type": "qwen2_5_vl"}
    pairs = pair_checkpoints(make(tensors, config), make(tensors, config)).pairs
    assert [(pair.module, pair.shape) for pair in pairs if pair.is_matrix] == [
        ("q_proj", (8, 8)), ("k_proj", (8, 8)), ("v_proj", (8, 8)),
    ]  # fmt: skip


def test_vocabulary_padding(make: Make) -> None:
    source = make({"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,)})
    trained = make({"model.embed_tokens.weight": (12, 4), "model.norm.weight": (4,)})
    pairing = pair_checkpoints(source, trained)
    assert {pair.name: pair.shape for pair in pairing.pairs}["model.embed_tokens.weight"] == (10, 4)
    assert _skips(pairing) == {"model.embed_tokens.weight[10:12]": "vocabulary rows that only TRAINED has"}


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _tied(make: Make, source: tuple[bool, bool | None], trained: tuple[bool, bool | None], same: bool = True) -> Any:
    """Pair two models, each (head stored, what the config says)."""
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    sides = []
    for stored, told in (source, trained):
        tensors = {EMBED: table} | ({HEAD: table.copy() if same else table + 1} if stored else {})
        sides.append(make(tensors, {} if told is None else {"tie_word_embeddings": told}))
    return pair_checkpoints(*sides)


@pytest.mark.parametrize(
    ("source", "trained"),
    [((False, True), (False, True)), ((True, True), (False, True)), ((False, None), (True, True)),
     ((True, True), (True, True)), ((True, None), (True, None)), ((True, None), (False, None))],
)  # fmt: skip
def test_tied_heads_count_once(make: Make, source: Any, trained: Any) -> None:
    pairing = _tied(make, source, trained)
    assert [pair.name for pair in pairing.pairs] == [EMBED]
    assert all(skip == f"tied to {EMBED}, and counted there" for skip in _skips(pairing).values())
    assert set(_skips(pairing)) == ({HEAD} if source[0] or trained[0] else set())


def test_untied_heads_are_rows(make: Make) -> None:
    assert {pair.name for pair in _tied(make, (True, False), (True, False)).pairs} == {EMBED, HEAD}
    assert {pair.name for pair in _tied(make, (True, None), (True, None), same=False).pairs} == {EMBED, HEAD}


def test_a_head_untied_by_training_is_compared_with_the_embedding_it_came_from(make: Make) -> None:
    pairs = _tied(make, (False, True), (True, False)).pairs
    assert {(pair.role, pair.source_name, pair.trained_name) for pair in pairs} == {
        ("embedding", EMBED, EMBED),
        ("lm_head", EMBED, HEAD),
    }
    assert len({pair.name for pair in pairs}) == 2


def test_nothing_in_common(make: Make) -> None:
    with pytest.raises(CheckpointError, match=r"no floating-point tensor in common.*'model.a'.*'model.b'"):
        pair_checkpoints(make({"model.a": (2, 2)}), make({"model.b": (2, 2)}))
    with pytest.raises(CheckpointError, match="no floating-point tensor at all"):
        pair_checkpoints(make({"model.a": np.arange(3)}), make({"model.a": np.arange(3)}))


def test_models_of_different_sizes(make: Make) -> None:
    with pytest.raises(CheckpointError, match=r"every one of the 1 tensors.*another shape"):
        pair_checkpoints(make({"model.a.weight": (2, 2)}), make({"model.a.weight": (2, 4)}))
    source = make({"model.a": (2, 2), "model.b": (2, 2), "model.c": (2,)})
    trained = make({"model.a": (2, 4), "model.b": (2, 4), "model.c": (2,)})
    assert "2 of 3 common tensors have another shape" in pair_checkpoints(source, trained).warnings[0]


def test_include_and_exclude(make: Make) -> None:
    tensors = {f"model.layers.{i}.mlp.{m}.weight": (2, 2) for i in (0, 1) for m in ("up_proj", "down_proj")}
    source, trained = make(tensors), make(tensors)
    names = [p.name for p in pair_checkpoints(source, trained, include=["*.0.*"], exclude=["*up_proj*"]).pairs]
    assert names == ["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match="no tensor is left of 4"):
        pair_checkpoints(source, trained, include=["nothing*"])


def test_tokenizers(make: Make) -> None:
    tensors = {"model.a.weight": (2, 2)}
    source = make(tensors, vocab={"a": 0, "b": 1})
    assert pair_checkpoints(source, make(tensors, vocab={"b": 1, "a": 0, "<tool>": 2})).warnings == []
    (warning,) = pair_checkpoints(source, make(tensors, vocab={"a": 1, "b": 0})).warnings
    assert "2 ids stand for other tokens (id 0 is 'a' in SOURCE, 'b' in TRAINED)" in warning
    unigram = make(tensors, vocab=[["a", -1.0], ["c", -2.0]])
    assert "id 1 is 'b' in SOURCE, 'c' in TRAINED" in pair_checkpoints(source, unigram).warnings[0]


@pytest.mark.parametrize("stacked_side", ["source", "trained"])
def test_experts_stacked_on_one_side_only(make: Make, stacked_side: str) -> None:
    stem = "model.layers.0.mlp.experts"
    gate_up = np.arange(2 * 6 * 4, dtype=np.float32).reshape(2, 6, 4)
    down = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    stacked = make({f"{stem}.gate_up_proj": gate_up, f"{stem}.down_proj": down})
    apart = make(
        {f"{stem}.{e}.gate_proj.weight": gate_up[e, :3].copy() for e in range(2)}
        | {f"{stem}.{e}.up_proj.weight": gate_up[e, 3:].copy() for e in range(2)}
        | {f"{stem}.{e}.down_proj.weight": down[e].copy() for e in range(2)}
    )
    source, trained = (stacked, apart) if stacked_side == "source" else (apart, stacked)
    pairing = pair_checkpoints(source, trained)
    assert {pair.name for pair in pairing.pairs} == set(apart.entries)
    assert pairing.skipped == []
    for pair in pairing.pairs:
        np.testing.assert_array_equal(
            _values(source, pair.source_name, pair.source_start, pair),
            _values(trained, pair.trained_name, pair.trained_start, pair),
        )
