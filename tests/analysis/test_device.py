"""The device's torch code against the NumPy path, through torch's own processor device (`cpu:0`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deltalens
from deltalens.analysis import Settings
from deltalens.cli import main
from deltalens.errors import DeltalensError

DEVICE = "cpu:0"  # torch's processor device: `cpu` alone is the NumPy path
Write = Callable[[dict[str, np.ndarray]], Path]


def rank_one(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return rng.standard_normal((m, 1)) * rng.standard_normal(n)


def tensors(dtype: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tall, wide, square, tiny, rank-deficient, zero update, tied weights, NaN, a vector."""
    rng = np.random.default_rng(7)
    source, trained = {}, {}
    shapes = {"tall": (300, 40), "wide": (40, 300), "square": (96, 96), "tiny": (1, 3), "column": (5, 1)}
    for name, (m, n) in shapes.items():
        source[name] = 0.02 * (rng.standard_normal((m, n)) + 5 * rank_one(rng, m, n))
        trained[name] = source[name] + 4e-5 * (rng.standard_normal((m, n)) + rank_one(rng, m, n))
    square = source["square"]
    source["still"] = trained["still"] = square
    # Powers of two: the reconstruction of rank 1 (and the weights) take few values, so masks end among ties.
    signs = rng.choice([-1.0, 1.0], (64, 1)) * rng.choice([0.5, 1.0, 2.0], 48)
    source["tied"], trained["tied"] = 0.25 * signs, 0.25 * signs * rng.choice([1.0, 1.25], signs.shape, p=[0.8, 0.2])
    source["low_rank_update"] = square
    trained["low_rank_update"] = square + 0.5 * np.outer(np.ones(96), rng.choice([-1.0, 1.0], 96))
    source["zero"], trained["zero"] = np.zeros((20, 30)), 1e-3 * rng.standard_normal((20, 30))
    source["nan"], trained["nan"] = square, np.where(np.arange(96) == 3, np.nan, square)
    source["vector"], trained["vector"] = square[0], square[0] * 1.01
    source["negative_zero"], trained["negative_zero"] = np.zeros((8, 8)), -np.zeros((8, 8))
    return tuple({f"model.{k}.weight": v.astype(dtype) for k, v in side.items()} for side in (source, trained))  # type: ignore[return-value]


# A projection onto directions that the source does not have (its rank is 1, or 0) is whatever the solver made of them.
NO_GAP = ("tied", "zero", "negative_zero")
# The tail index of an update of rank one is that of its rounding.
NOISE = ("model.low_rank_update.weight", "hill")
DEPENDS_ON_DIRECTION = ("projection", "rotation", "principal_coverage")


def assert_same_rows(processor: Any, device: Any) -> int:
    compared = 0
    for a, b in zip(processor.tensors.iter_rows(named=True), device.tensors.iter_rows(named=True), strict=True):
        assert a.keys() == b.keys()
        loose = any(f"model.{name}.weight" == a["name"] for name in NO_GAP)
        for name, value in a.items():
            if (loose and any(word in name for word in DEPENDS_ON_DIRECTION)) or (a["name"], name) == NOISE:
                assert (value is None) == (b[name] is None), (a["name"], name)
            elif isinstance(value, float):
                floor = 1e-7 if name.startswith("rotation") else 1e-13  # sines of one subspace: √ε of noise
                assert b[name] == pytest.approx(value, rel=1e-9, abs=floor), (a["name"], name)
            else:
                assert b[name] == value, (a["name"], name)
            compared += value is not None
    for a, b in zip(processor.spectra.iter_rows(named=True), device.spectra.iter_rows(named=True), strict=True):
        assert {**a, "value": 0} == {**b, "value": 0}
        if a["index"] == 0:
            first = a["value"]
        # Down to 3e-4 of the first they may come from a Gram matrix on either side, and below it from an SVD.
        assert b["value"] == pytest.approx(a["value"], rel=1e-8, abs=1e-13 * first), (a["name"], a["which"])
    return compared


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64], ids=["bf16", "f32", "f64"])
@pytest.mark.parametrize("compare", ["bf16", "stored", "fp32"])
def test_the_same_numbers(write_checkpoint: Write, dtype: Any, compare: str) -> None:
    source, trained = (write_checkpoint(side) for side in tensors(dtype))
    common: dict[str, Any] = {"compare_dtype": compare, "mask_rank": 4, "null_draws": 2}
    results = [
        deltalens.analyze(source, trained, settings=Settings(**common, device=device)) for device in ("cpu", DEVICE)
    ]
    assert assert_same_rows(*results) > 1000


def test_blocks_and_chunks_do_not_show(write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltalens.accelerator import coordinates, masks

    source, trained = (write_checkpoint(side) for side in tensors(np.float32))
    whole = deltalens.analyze(source, trained, settings=Settings(compare_dtype="fp32", device=DEVICE))
    monkeypatch.setattr(masks, "MASK_ELEMENTS", 333)
    monkeypatch.setattr(coordinates, "CHUNK", 101)
    cut = deltalens.analyze(source, trained, settings=Settings(compare_dtype="fp32", device=DEVICE))
    assert assert_same_rows(whole, cut) > 1000


def test_coordinates_alone_and_the_master(write_checkpoint: Write) -> None:
    before, after = tensors(np.float32)
    source, trained = (
        write_checkpoint({k: v.astype(ml_dtypes.bfloat16) for k, v in side.items()}) for side in (before, after)
    )
    master = write_checkpoint(after)
    for options, full in (({"spectrum": "none"}, None), ({}, master)):
        results = [
            deltalens.analyze(source, trained, master=full, settings=Settings(**options, device=device))  # type: ignore[arg-type]
            for device in ("cpu", DEVICE)
        ]
        assert_same_rows(*results)


def test_a_device_that_is_not_there(
    write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint({"model.x.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(DeltalensError, match="leave out --device"):
        deltalens.analyze(source, source, settings=Settings(device="nonsense"))
    monkeypatch.setattr("sys.argv", ["deltalens", "analyze", str(source), str(source), "--device", "meta"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()  # the progress bar may leave an empty line
    assert len(lines) == 1
    assert lines[0].startswith("deltalens: --device meta")


def test_fast_mode_is_for_the_processor() -> None:
    with pytest.raises(ValueError, match="choose exact"):
        Settings(device="cuda", spectrum="fast")
