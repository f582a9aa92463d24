"""Mask growth, churn and subspaces along a run, against sets and full decompositions."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalens.metrics.alignment import delta_pass, delta_pass_and_gram
from deltalens.metrics.blocks import delta_blocks, value_blocks
from deltalens.metrics.coordinates import measure_coordinates
from deltalens.metrics.masks import pack_updates
from deltalens.metrics.overlap import subspace_similarity
from deltalens.metrics.spectrum import factorise, singular_values
from deltalens.metrics.trajectory import (
    MaskHistory,
    locked_index,
    overlap,
    product_subspaces,
    subspaces,
)
from deltalens.metrics.values import round_threshold, round_to_bf16

sizes = st.integers(1, 200)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None)


def pair(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> tuple[np.ndarray, np.ndarray]:
    before = 0.05 * rng.standard_normal(shape)
    after = before + 1e-4 * rng.standard_normal(shape) * (rng.random(shape) < 0.5)
    if kind == "bf16":
        return tuple(round_to_bf16(side.reshape(-1)).reshape(shape) for side in (before, after))
    return before.astype(kind), after.astype(kind)


@few
@given(sizes, seeds, st.sampled_from(["bf16", "float32", "float64"]))
def test_packed_masks_hold_what_the_counts_say(size, seed, kind):
    before, after = pair(np.random.default_rng(seed), (size,), kind)
    tau = round_threshold(1e-5, "bf16" if kind == "bf16" else "stored", "F64" if kind == "float64" else "F32")
    mask = pack_updates(before, after, tau)[0]
    assert mask.size == -(-size // 8)
    counted = measure_coordinates(before, after, threshold=tau, ratios=(0.1,)).visible
    assert int(np.unpackbits(mask).sum()) == counted


@few
@given(st.integers(1, 40), st.integers(1, 6), seeds)
def test_history_and_overlap_against_sets(size, steps, seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((steps, size)) < 0.4
    sets = [set(np.flatnonzero(mask)) for mask in masks]
    history = MaskHistory()
    previous: set[int] = set()
    ever: set[int] = set()
    for mask, now in zip(masks, sets, strict=True):
        counts = history.step(np.packbits(mask))
        assert counts == {
            "appeared": len(now - previous),
            "vanished": len(previous - now),
            "returned": len((now - previous) & ever),
            "stepped": len(now | previous),
            "ever": len(ever | now),
        }
        assert overlap(np.packbits(mask), np.packbits(masks[-1])) == (len(now & sets[-1]), len(now | sets[-1]))
        previous, ever = now, ever | now


@few
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=8))
def test_locked_is_the_first_from_which_it_stays(similarities):
    curve = [*similarities, 1.0]
    above = [value is not None and value > 0.8 for value in curve]
    expected = next(i for i in range(len(curve)) if all(above[i:]))
    assert locked_index(curve, 0.8) == (None if expected == len(curve) - 1 else expected)


@pytest.mark.parametrize("shape", [(60, 24), (24, 60), (40, 40), (44, 40), (3, 50), (1, 9), (9, 1)])
@pytest.mark.parametrize("rank", [None, 2])
def test_factors_of_an_update_are_those_of_a_full_decomposition(shape, rank):
    rng = np.random.default_rng(7)
    after = rng.standard_normal(shape)
    if rank is not None:
        after = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    before = np.zeros(shape)
    k, width = min(16, *shape), min(shape)
    blocks = partial(delta_blocks, before, after)
    factors = factorise(blocks, max(shape), width, k)
    expected = np.linalg.svd(after)
    largest = expected[1][0]
    np.testing.assert_allclose(factors.values, expected[1], atol=1e-12 * largest)
    np.testing.assert_allclose(factors.values, singular_values(blocks, max(shape), width), atol=1e-12 * largest)
    found = subspaces(factors, shape)
    r = min(k, rank or k, width)
    assert found.left.shape == (shape[0], r)
    assert found.right.shape == (shape[1], r)
    for ours, theirs in ((found.left, expected[0][:, :r]), (found.right, expected[2][:r].T)):
        np.testing.assert_allclose(ours.T @ ours, np.eye(r), atol=1e-9)
        assert subspace_similarity(ours, theirs)[0] == pytest.approx(1.0, abs=1e-9)


def test_subspaces_of_a_product_and_of_nothing():
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((30, 4)), rng.standard_normal((4, 20))
    found = product_subspaces(left, right)
    u, _, vt = np.linalg.svd(left @ right)
    assert subspace_similarity(found.left, u[:, :4])[0] == pytest.approx(1.0)
    assert subspace_similarity(found.right, vt[:4].T)[0] == pytest.approx(1.0)
    assert product_subspaces(0 * left, right).left.shape == (30, 0)


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (30, 30)])
def test_a_pass_with_the_gram_matrix_is_the_pass(shape):
    rng = np.random.default_rng(3)
    before, after = pair(rng, shape, "float32")
    source = factorise(partial(value_blocks, before), max(shape), min(shape), 6)
    blocks = partial(delta_blocks, before, after)
    plain = delta_pass(blocks, source)
    passed, products = delta_pass_and_gram(blocks, source)
    for name in ("long_energy", "short_energy", "core"):
        np.testing.assert_allclose(getattr(passed, name), getattr(plain, name), rtol=1e-9, atol=1e-16)
    delta = np.concatenate([block for _, block in blocks()])
    np.testing.assert_allclose(products, delta.T @ delta, rtol=1e-12, atol=1e-18)
