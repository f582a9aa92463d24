"""Blocks put together again are the matrix."""

import ml_dtypes
import numpy as np
import pytest

from deltalens.metrics import blocks


@pytest.mark.parametrize("elements", [1, 7, 60, 1 << 20])
@pytest.mark.parametrize("shape", [(13, 5), (5, 13), (6, 6), (1, 9), (9, 1)])
def test_blocks_cover_the_longer_side_once_and_in_order(shape, elements, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    length, width = max(shape), min(shape)
    rows = np.concatenate([np.arange(length)[part] for part in blocks.block_slices(shape)])
    np.testing.assert_array_equal(rows, np.arange(length))
    assert all(
        part.stop - part.start == 1 or (part.stop - part.start) * width <= elements
        for part in blocks.block_slices(shape)
    )


@pytest.mark.parametrize("elements", [7, 1 << 20])
@pytest.mark.parametrize("shape", [(13, 5), (5, 13), (1, 9)])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_values_and_delta_of_any_dtype(shape, dtype, elements, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    rng = np.random.default_rng(0)
    before = rng.standard_normal(shape).astype(dtype)
    after = (before.astype(np.float64) + 0.1 * rng.standard_normal(shape)).astype(dtype)
    prepared = [side.view(np.uint16) if dtype == ml_dtypes.bfloat16 else side for side in (before, after)]
    tall = shape[0] >= shape[1]

    whole = np.concatenate([block.copy() for _, block in blocks.value_blocks(prepared[0])])
    np.testing.assert_array_equal(whole if tall else whole.T, before.astype(np.float64))
    difference = np.concatenate([block.copy() for _, block in blocks.delta_blocks(*prepared)])
    np.testing.assert_array_equal(difference if tall else difference.T, (after - before).astype(np.float64))
