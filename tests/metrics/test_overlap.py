"""Joint counts against brute force, the null against simulation, leading subspaces against LAPACK."""

from itertools import combinations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from deltalens.metrics import overlap, overlap_null
from deltalens.metrics.rounding_null import fit
from deltalens.metrics.values import round_threshold, round_to_bf16, word_values

BF16 = ml_dtypes.bfloat16
TAU = round_threshold(1e-5, "bf16", "BF16")


def words(values: np.ndarray) -> np.ndarray:
    return round_to_bf16(np.asarray(values, np.float32))


def brute(source: np.ndarray, runs: list[np.ndarray], taus: list[float]):
    """Counts of every run and pair from whole arrays of Δ (float64)."""
    if source.dtype == np.uint16:
        deltas = [(r.view(BF16) - source.view(BF16)).astype(np.float64) for r in runs]
    else:
        deltas = [(r - source).astype(np.float64) for r in runs]
    single = [(int((abs(d) > t).sum()), int((d != 0).sum())) for d, t in zip(deltas, taus, strict=True)]
    joint = []
    for i, j in combinations(range(len(runs)), 2):
        a, b = deltas[i], deltas[j]
        both, changed = (abs(a) > taus[i]) & (abs(b) > taus[j]), (a != 0) & (b != 0)
        same = np.sign(a) == np.sign(b)
        x, y = abs(a[both]), abs(b[both])
        joint.append(
            (
                (int(both.sum()), int((both & same).sum()), int(changed.sum()), int((changed & same).sum())),
                ((a * b).sum(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()),
            )
        )
    return single, joint, [(d * d).sum() for d in deltas]


def check(source, runs, taus):
    histogram, singles, joints, bad = overlap.measure_overlap(source, runs, taus)
    wanted, wanted_joint, energies = brute(source, runs, taus)
    assert bad == 0
    assert histogram.sum() == source.size
    assert [(c.visible, c.nonzero) for c in singles] == wanted
    np.testing.assert_allclose([c.energy for c in singles], energies, rtol=1e-10)
    for one, (counts, sums) in zip(joints, wanted_joint, strict=True):
        assert (one.visible, one.visible_same, one.nonzero, one.nonzero_same) == counts
        size = np.sqrt(energies[0] * energies[-1]) + 1e-300
        np.testing.assert_allclose((one.dot, *one.moments), sums, rtol=1e-9, atol=1e-12 * size)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 700), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_counts_of_words_are_exact(size, count, seed):
    rng = np.random.default_rng(seed)
    source = words(rng.standard_normal(size) * 10.0 ** rng.integers(-6, 2))
    source[rng.random(size) < 0.05] = rng.choice([0x0000, 0x8000])
    runs = []
    for _ in range(count):
        step = rng.integers(-2, 3, size)
        run = np.where(source & 0x7FFF > 8, source + step.astype(np.uint16), source ^ 0x8000).astype(np.uint16)
        runs.append(np.where(rng.random(size) < 0.5, run, source))
    check(source, runs, [float(t) for t in rng.choice([0.0, TAU, 1e-3], count)])


def test_counts_do_not_depend_on_the_band(monkeypatch):
    rng = np.random.default_rng(1)
    source = words(0.02 * rng.standard_normal(5000))
    runs = [words(word_values(source) + np.float32(s) * rng.standard_normal(5000)) for s in (1e-5, 5e-5, 2e-4)]
    monkeypatch.setattr(overlap, "BAND", 192)
    check(source, runs, [TAU] * 3)


@pytest.mark.parametrize("dtypes", [("f4", "f4", "f4"), ("f8", "f8", "f8"), ("f4", "f4", "f8")])
def test_counts_of_floats_are_exact(dtypes):
    rng = np.random.default_rng(2)
    source = rng.standard_normal(4000).astype(dtypes[0])
    runs = [(source + 1e-4 * rng.standard_normal(4000) * (rng.random(4000) < 0.4)).astype(d) for d in dtypes[1:]]
    check(source, runs, [1e-5, float(np.float32(1e-5))])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_updates_are_counted(value):
    source = words(np.ones(40000))
    runs = [source.copy(), source.copy()]
    runs[1][17] = words(np.array([value]))[0]
    assert overlap.measure_overlap(source, runs, [TAU, TAU])[3] == 1
    source[17] = runs[1][17]
    assert overlap.measure_overlap(source, runs, [TAU, TAU])[3] >= 1


@pytest.fixture(scope="module")
def independent():
    """A bf16 source and two updates that share nothing but its spacing, about 25 and 50 % visible."""
    rng = np.random.default_rng(3)
    weights = word_values(words(0.1 * rng.standard_normal(400_000)))
    runs = [words(weights + np.float32(s) * rng.standard_normal(weights.size)) for s in (8e-5, 2.5e-4)]
    return words(weights), runs


def expectations(source, runs, taus):
    histogram, counts, joint, _ = overlap.measure_overlap(source, runs, taus)
    a, b = (fit(histogram, c.visible, tau, "bf16") for c, tau in zip(counts, taus, strict=True))
    chance = counts[0].visible * counts[1].visible / source.size
    return joint[0], overlap_null.expected_intersections(histogram, [a, b])[0], chance, (histogram, a, b)


@pytest.mark.parametrize("tau", [TAU, round_threshold(1e-4, "bf16", "BF16")])
def test_independent_updates_overlap_as_the_null_says_and_more_than_chance(independent, tau):
    joint, expected, chance, _ = expectations(*independent, [tau, tau])
    assert joint.visible / expected == pytest.approx(1, abs=0.01)
    assert joint.visible / chance > 1.15
    assert joint.visible_same / joint.visible == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("tau", [TAU, round_threshold(1e-4, "bf16", "BF16")])
def test_magnitudes_correlate_as_the_null_says(independent, tau):
    joint, _, _, (histogram, a, b) = expectations(*independent, [tau, tau])
    count, *moments = overlap_null.expected_moments(histogram, [a, b], [tau, tau])[0]
    np.testing.assert_allclose(moments, joint.moments, rtol=0.02)
    seen = overlap.magnitude_correlation(joint.visible, joint.moments)
    assert seen > 0.05  # more than two independent updates would have without rounding
    assert overlap.magnitude_correlation(count, moments) == pytest.approx(seen, abs=0.02)


def grid_steps(word: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Every |Δ| that bf16(w + s·N) − w takes on a grid of w's spacing all along, and its probability."""
    spacing = 2.0 ** (max(word >> 7, 1) - 134)
    steps = np.arange(int(12 * scale / spacing) + 3)
    reached = norm.sf((steps - 0.5) * spacing / scale) * 2
    reached[0] = 1.0
    return steps * spacing, reached - np.append(reached[1:], 0.0)


@pytest.mark.parametrize(("smallest", "accuracy"), [(-1.5, 1e-10), (-4, 5e-3)])
def test_expectations_are_sums_over_words_and_steps(smallest, accuracy):
    """Small weights take steps that are treated as smooth, large ones are summed step by step.

    Three runs, one without a null: the pairs in order, None where it takes part, else sums taken one by one."""
    rng = np.random.default_rng(9)
    source = words(10.0 ** rng.uniform(smallest, 0, 1500))
    histogram = overlap.measure_overlap(source, [source, source], [TAU, TAU])[0]
    taus = [TAU, TAU, 2.0**-13]  # the last is a step that many weights take: not visible
    nulls = [fit(histogram, 900, taus[0], "bf16"), None, fit(histogram, 1000, taus[2], "bf16")]
    found = overlap_null.expected_moments(histogram, nulls, taus)
    shared = overlap_null.expected_intersections(histogram, nulls)
    assert found[0] is found[2] is shared[0] is shared[2] is None
    wanted = np.zeros(6)
    for word, times in zip(*np.unique(source, return_counts=True), strict=True):
        p, q = (null.table()[word] for null in (nulls[0], nulls[2]))
        (a1, a2), (b1, b2) = (
            [
                sum((delta**power * chance)[delta > tau])
                for power in (1, 2)
                for delta, chance in [grid_steps(int(word), null.scale)]
            ]
            for null, tau in ((nulls[0], taus[0]), (nulls[2], taus[2]))
        )
        wanted += times * np.array([p * q, a1 * q, p * b1, a2 * q, p * b2, a1 * b1])
    assert shared[1] == pytest.approx(wanted[0], rel=1e-12)
    np.testing.assert_allclose(found[1], wanted, rtol=accuracy)


def test_a_planted_mask_shows_beside_both(independent):
    source, (one, other) = independent
    planted = np.random.default_rng(4).random(source.size) < 0.1
    runs = [np.where(planted, one, source), np.where(planted, other, source)]
    joint, expected, chance, _ = expectations(source, runs, [TAU, TAU])
    assert joint.visible / expected > 1.3
    assert joint.visible / chance > 1.5


def test_magnitude_correlation_is_pearsons():
    rng = np.random.default_rng(5)
    x, y = abs(rng.standard_normal((2, 300)))
    y += x
    moments = (x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum())
    assert overlap.magnitude_correlation(300, moments) == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-10)
    assert np.isnan(overlap.magnitude_correlation(0, (0.0,) * 5))
    assert np.isnan(overlap.magnitude_correlation(2, (2.0, 2.0, 2.0, 2.0, 2.0)))  # all alike


def spectrum_pair(shape, values, seed=0, scale=1.0):
    """Float32 sides whose difference has these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((side, len(values))))[0] for side in shape)
    delta = ((u * (scale * np.asarray(values))) @ v.T).astype(np.float32)
    return np.zeros(shape, np.float32), delta


@pytest.mark.parametrize("shape", [(100, 100), (300, 64), (64, 300), (20, 30), (30, 20), (500, 90), (16, 16)])
def test_leading_subspaces_are_lapacks(shape):
    rng = np.random.default_rng(6)
    before = words(0.1 * rng.standard_normal(shape)).reshape(shape)
    after = words(word_values(before) + np.float32(3e-3) * rng.standard_normal(shape)).reshape(shape)
    found = overlap.leading_subspaces(before, after)
    u, _, vt = np.linalg.svd((after.view(BF16) - before.view(BF16)).astype(np.float64), full_matrices=False)
    for ours, theirs in ((found.left, u[:, :16]), (found.right, vt[:16].T)):
        np.testing.assert_allclose(ours.T @ ours, np.eye(16), atol=2e-5)
        assert overlap.subspace_similarity(ours, theirs) == (pytest.approx(1, abs=1e-6), 16)


@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_a_small_gap_far_below_the_largest_value_is_resolved(scale):
    """σ₁₆ and σ₁₇ differ by a tenth, 1e-3 below σ₁: a float32 Gram matrix alone would mix them."""
    values = np.concatenate([[1.0], np.full(15, 1e-3), np.full(20, 9e-4)])
    before, delta = spectrum_pair((120, 80), values, scale=scale)
    u, _, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    found = overlap.leading_subspaces(before, delta)
    assert overlap.subspace_similarity(found.right, vt[:16].T)[0] == pytest.approx(1, abs=1e-5)
    assert overlap.subspace_similarity(found.left, u[:, :16])[0] == pytest.approx(1, abs=1e-4)


def test_an_update_of_low_rank_has_only_its_directions():
    before = np.zeros((90, 70))
    rng = np.random.default_rng(7)
    after = rng.standard_normal((90, 5)) @ rng.standard_normal((5, 70))
    found = overlap.leading_subspaces(before, after)
    assert found.left.shape == (90, 5)
    assert found.right.shape == (70, 5)
    assert overlap.leading_subspaces(before, before).left.shape == (90, 0)


def test_energy_of_a_histogram():
    values = np.random.default_rng(10).standard_normal(1000).astype(np.float32)
    for side, error in ((words(values), 1e-12), (values, 0.01)):
        histogram = overlap.measure_overlap(side, [side, side], [0.0, 0.0])[0]
        want = (side.view(BF16) if side.dtype == np.uint16 else side).astype(np.float64)
        assert overlap.histogram_energy(histogram) == pytest.approx((want**2).sum(), rel=error)


def test_similarity_of_subspaces():
    basis = np.linalg.qr(np.random.default_rng(8).standard_normal((40, 40)))[0].astype(np.float32)
    assert overlap.subspace_similarity(basis[:, :16], basis[:, :16]) == (pytest.approx(1), 16)
    assert overlap.subspace_similarity(basis[:, :16], basis[:, 16:32])[0] == pytest.approx(0, abs=1e-12)
    assert overlap.subspace_similarity(basis[:, :4], basis[:, 2:18]) == (pytest.approx(0.5), 4)
    assert overlap.subspace_similarity(basis[:, :0], basis[:, :16]) == (None, 0)
    draws = [
        overlap.subspace_similarity(*(np.linalg.qr(rng.standard_normal((60, 16)))[0] for _ in range(2)))[0]
        for rng in map(np.random.default_rng, range(30))
    ]
    assert np.mean(draws) == pytest.approx(16 / 60, abs=0.01)


def test_similarities_of_all_pairs_are_those_of_each():
    rng = np.random.default_rng(12)
    bases = [np.linalg.qr(rng.standard_normal((30, r)))[0].astype(np.float32) for r in (16, 3, 16, 0)]
    bases.insert(1, None)
    wanted = []
    for a, b in combinations(bases, 2):
        k = 0 if a is None or b is None else min(a.shape[1], b.shape[1])
        product = a[:, :k].T.astype(float) @ b[:, :k].astype(float) if k else None
        wanted.append((pytest.approx((product**2).sum() / k, rel=1e-12), k) if k else (None, 0))
    assert overlap.subspace_similarities(bases) == wanted
    assert overlap.subspace_similarities([None, bases[0]]) == [(None, 0)]


def test_arpack_giving_up_leaves_it_to_lapack(monkeypatch):
    def stuck(*_, **__):
        raise overlap.ArpackNoConvergence("no", np.empty(0), np.empty((0, 0)))

    rng = np.random.default_rng(9)
    before, after = np.zeros((120, 80), np.float32), rng.standard_normal((120, 80), np.float32)
    wanted = overlap.leading_subspaces(before, after)
    monkeypatch.setattr(overlap, "eigsh", stuck)
    found = overlap.leading_subspaces(before, after)
    assert overlap.subspace_similarity(found.right, wanted.right)[0] == pytest.approx(1, abs=1e-6)
