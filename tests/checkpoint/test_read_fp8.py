import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltalens.checkpoint import open_checkpoint, pair_checkpoints

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((5, 7)).astype(ml_dtypes.float8_e4m3fn)


def _save(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


@pytest.mark.parametrize(
    ("name", "scale", "block"),
    [
        ("weight_scale_inv", RNG.random((3, 3)).astype(np.float32), [2, 3]),
        ("weight_scale", RNG.random((5, 1)).astype(ml_dtypes.bfloat16), None),
        ("weight_scale", RNG.random(5).astype(np.float32), None),
        ("weight_scale", np.float32([0.25]), None),
        ("weight_scale", np.array(0.5, np.float32), None),
    ],
)
def test_scaled_weights_are_multiplied_out(tmp_path: Path, name: str, scale: np.ndarray, block: Any) -> None:
    config = {"quantization_config": {"weight_block_size": block}} if block else {}
    folder = _save(tmp_path / "x", {"model.a.weight": WEIGHT, f"model.a.{name}": scale, "model.b": np.ones(3)}, config)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.entries) == {"model.a.weight", "model.b"}
    assert "1 float8 weights were dequantised" in checkpoint.notes[0]
    wide = scale.astype(np.float64)
    expected = np.empty((5, 7))
    for i in range(5):
        for j in range(7):
            where = (i // block[0], j // block[1]) if block else (i if wide.size == 5 else 0)
            expected[i, j] = float(WEIGHT[i, j]) * float(wide[where] if block else wide.ravel()[where])
    got = checkpoint.read("model.a.weight").view(np.float32).reshape(5, 7)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    part = checkpoint.read("model.a.weight", np.empty(64, np.uint8), start=9, count=4)
    np.testing.assert_array_equal(part.view(np.float32), got.ravel()[9:13])
    assert checkpoint.read("model.b").size == 24


def test_without_a_usable_scale_they_are_skipped(tmp_path: Path) -> None:
    plain = {"model.a.weight": np.ones((5, 7), np.float32), "model.b": np.ones(3)}
    source = open_checkpoint(_save(tmp_path / "source", plain))
    trained = open_checkpoint(
        _save(
            tmp_path / "trained",
            {"model.a.weight": WEIGHT, "model.a.weight_scale": np.ones((3, 3)), "model.b": np.ones(3)},
        )
    )
    skips = {skip.tensor: skip.reason for skip in pair_checkpoints(source, trained).skipped}
    assert skips["model.a.weight"] == "stored as F8_E4M3 in TRAINED, without a scale that deltalens can apply"
    assert "part of a quantised weight" in skips["model.a.weight_scale"]
