"""Every rule against a naive twin; exact counts; what is refused."""

import shutil
from fractions import Fraction
from math import ceil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subnetwork_fixtures import BF16, DOWN, EMBEDDING, NORM, SHAPES, UP, Q, delta, source_tensors, trained_tensors

from deltalens import analyze
from deltalens.analysis import Settings
from deltalens.checkpoint import open_checkpoint
from deltalens.errors import CheckpointError, ConfigError
from deltalens.subnetwork import SubnetworkMask, select_mask
from deltalens.subnetwork.draw import rank_of

SHARES = ["top", "random", "rounding", "low-magnitude", "high-magnitude", "principal", "off-principal"]


@pytest.fixture(scope="module")
def tensors() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    source = source_tensors()
    return source, trained_tensors(source)


@pytest.fixture(scope="module")
def sides(tensors, write_checkpoint) -> tuple[Path, Path]:
    return write_checkpoint(tensors[0], shards=2), write_checkpoint(tensors[1])


def share(fraction: float, size: int) -> int:
    return ceil(Fraction(repr(fraction)) * size)


def same(a: SubnetworkMask, b: SubnetworkMask) -> bool:
    return a.names() == b.names() and all((a.packed(n) == b.packed(n)).all() for n in a.names())


@pytest.mark.parametrize("kind", SHARES)
@settings(max_examples=8, deadline=None)
@given(fraction=st.sampled_from([0.0, 0.001, 0.1, 0.3, 0.99, 1.0]) | st.floats(0, 1), seed=st.integers(0, 9))
def test_counts_are_exact_and_draws_repeat(kind: str, fraction: float, seed: int, sides) -> None:
    mask = select_mask(*sides, rule=f"{kind}:{fraction!r}", seed=seed)
    with open_checkpoint(sides[0]) as source:
        assert mask.names() == list(source.entries)
    for name, shape in SHAPES.items():
        assert mask.count(name) == share(fraction, int(np.prod(shape))), name
    assert same(mask, select_mask(*sides, rule=f"{kind}:{fraction!r}", seed=seed))


@pytest.mark.parametrize("kind", ["random", "rounding"])
def test_another_seed_is_another_draw(kind: str, sides) -> None:
    a, b = (select_mask(sides[0], rule=f"{kind}:0.5", seed=seed) for seed in (0, 1))
    assert not same(a, b)
    assert (a.dense(Q) != b.dense(Q)).mean() > 0.2
    assert (a.flat(Q)[:100] != a.flat(UP)[:100]).mean() > 0.2, "tensors do not share their draws"


@pytest.mark.parametrize("compare", ["bf16", "stored", "fp32"])
def test_visible_is_what_analyze_counts(compare, sides, tensors) -> None:
    mask = select_mask(*sides, rule="visible", compare_dtype=compare)
    rows = analyze(*sides, settings=Settings(compare_dtype=compare, spectrum="none")).tensors
    assert {name: mask.count(name) for name in SHAPES} == dict(rows.select("name", "visible_count").iter_rows())
    if compare == "bf16":
        tau = ml_dtypes.bfloat16(1e-5)
        for name in SHAPES:
            np.testing.assert_array_equal(mask.dense(name), np.abs(tensors[1][name] - tensors[0][name]) > tau)
    assert 0.1 < mask.total_density() < 0.9


def test_float32_checkpoints_are_compared_in_bf16_unless_told(write_checkpoint) -> None:
    source = source_tensors(dtype=np.dtype(np.float32))
    trained = trained_tensors(source)
    sides = write_checkpoint(source), write_checkpoint(trained)
    default, stored = select_mask(*sides, rule="visible"), select_mask(*sides, rule="visible", compare_dtype="stored")
    for name in SHAPES:
        rounded = np.abs(trained[name].astype(BF16) - source[name].astype(BF16)) > ml_dtypes.bfloat16(1e-5)
        np.testing.assert_array_equal(default.dense(name), rounded)
        np.testing.assert_array_equal(stored.dense(name), np.abs(trained[name] - source[name]) > np.float32(1e-5))


def best(mask: np.ndarray, scores: np.ndarray, count: int) -> None:
    """The mask holds `count` entries, none of them smaller than one left out."""
    assert mask.sum() == count
    np.testing.assert_array_equal(np.sort(scores[mask]), np.sort(scores.reshape(-1))[scores.size - count :])


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_top_low_and_high_magnitude_are_those_of_a_sort(fraction: float, sides, tensors) -> None:
    top, low, high = (
        select_mask(*sides, rule=f"{kind}:{fraction}") for kind in ("top", "low-magnitude", "high-magnitude")
    )
    for name, shape in SHAPES.items():
        count, size = share(fraction, int(np.prod(shape))), np.abs(tensors[0][name].astype(np.float64))
        best(top.dense(name), np.abs(delta(*tensors, name)), count)
        best(low.dense(name), -size, count)
        best(high.dense(name), size, count)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32), np.dtype(np.float64)])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.6, 0.95, 1.0])
def test_top_of_all_tensors_is_that_of_one_sort(fraction: float, dtype, write_checkpoint) -> None:
    source = source_tensors(dtype=dtype)
    source[UP] *= dtype.type(8)  # its steps are coarser, so that it has more of the largest
    trained = trained_tensors(source)
    sides = write_checkpoint(source), write_checkpoint(trained)
    mask = select_mask(*sides, rule=f"top:{fraction}", scope="global")
    chosen = np.concatenate([mask.flat(name) for name in SHAPES])
    scores = np.concatenate([np.abs(delta(source, trained, name)).reshape(-1) for name in SHAPES])
    best(chosen, scores if dtype == np.float64 else scores.astype(np.float32), share(fraction, scores.size))


def test_ties_at_a_global_edge_are_shared_out_in_proportion(write_checkpoint) -> None:
    source = {UP: np.zeros((100, 10), BF16), DOWN: np.zeros((300, 10), BF16)}
    trained = {name: np.ones(values.shape, BF16) for name, values in source.items()}
    mask = select_mask(write_checkpoint(source), write_checkpoint(trained), rule="top:0.1", scope="global")
    assert (mask.count(UP), mask.count(DOWN)) == (100, 300)
    assert len(set(np.diff(mask.indices(DOWN)))) > 5, "drawn, not the first ones"


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_principal_and_off_principal_are_those_of_the_reconstruction(fraction: float, sides, tensors) -> None:
    principal, off = (select_mask(sides[0], rule=f"{kind}:{fraction}") for kind in ("principal", "off-principal"))
    for name, shape in SHAPES.items():
        matrix, count = tensors[0][name].astype(np.float64), share(fraction, int(np.prod(shape)))
        if len(shape) == 2:
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
            k = rank_of(fraction, shape)
            matrix = (u[:, :k] * s[:k]) @ vt[:k]
        order = np.argsort(np.abs(matrix).reshape(-1))
        if len(shape) == 2:
            np.testing.assert_array_equal(principal.indices(name), np.sort(order[-count:]))
            np.testing.assert_array_equal(off.indices(name), np.sort(order[:count]))
        else:
            best(principal.dense(name), np.abs(matrix), count)
            best(off.dense(name), -np.abs(matrix), count)
    half = select_mask(sides[0], rule="principal:0.5") & select_mask(sides[0], rule="off-principal:0.5")
    assert half.count(UP) == 0


@pytest.mark.parametrize("kind", ["random", "rounding", "low-magnitude", "principal", "top"])
def test_like_matches_every_density(kind: str, sides, tmp_path: Path) -> None:
    visible = select_mask(*sides, rule="visible")
    visible.save(tmp_path / "visible.mask")
    control = select_mask(*sides, rule=kind, like=tmp_path / "visible.mask")
    assert {n: control.count(n) for n in SHAPES} == {n: visible.count(n) for n in SHAPES}
    assert same(control, visible) == (kind == "top"), "the visible updates are the largest"


def test_random_is_uniform_and_rounding_prefers_small_weights(sides, tensors) -> None:
    size = np.abs(tensors[0][EMBEDDING].astype(np.float64))
    small = size < np.median(size)
    shares = {
        kind: np.mean(
            [select_mask(sides[0], rule=f"{kind}:0.2", seed=s).dense(EMBEDDING)[small].sum() / 128 for s in range(30)]
        )
        for kind in ("random", "rounding")
    }
    assert abs(shares["random"] - 0.5) < 0.05
    assert shares["rounding"] > 0.75


def test_experts_and_fused_parts_are_matrices_of_their_own(write_checkpoint) -> None:
    rng = np.random.default_rng(0)
    stack = "model.layers.0.mlp.experts.up_proj"
    source = write_checkpoint({stack: (rng.standard_normal((3, 10, 4)) * 0.05).astype(BF16)})
    for rule in ("principal:0.25", "low-magnitude:0.25"):
        mask = select_mask(source, rule=rule)
        assert mask.shape(stack) == (3, 10, 4)
        assert mask.dense(stack).sum(axis=(1, 2)).tolist() == [10, 10, 10]
    again = select_mask(source, rule="random", like=mask)
    assert again.dense(stack).sum(axis=(1, 2)).tolist() == [10, 10, 10]


def test_a_tied_head_is_there_once_and_integers_not_at_all(write_checkpoint) -> None:
    source = source_tensors()
    tied = {**source, "lm_head.weight": source[EMBEDDING], "counter": np.array([3])}
    assert set(select_mask(write_checkpoint(tied), rule="random:0.5").names()) == set(SHAPES)
    untied = {**source, "lm_head.weight": -source[EMBEDDING]}
    assert set(select_mask(write_checkpoint(untied), rule="random:0.5").names()) == {*SHAPES, "lm_head.weight"}


@pytest.mark.parametrize("rule", ["visible", "top:0.2", "random:0.2", "rounding:0.2", "principal:0.2"])
def test_roles_and_layers_restrict_what_the_rule_selects(rule: str, sides) -> None:
    whole = select_mask(*sides, rule=rule)
    part = select_mask(*sides, rule=rule, roles="ffn,norm", layers=None)
    assert same(part, whole.restrict(roles=["ffn", "norm"]))
    assert part.rule.endswith("roles=ffn,norm")
    assert same(select_mask(*sides, rule=rule, layers="0"), whole.restrict(layers=[0]))
    everywhere = select_mask(*sides, rule="top:0.2", scope="global", layers="0,1")
    assert sum(everywhere.count(n) for n in everywhere.names()) == share(
        0.2, sum(np.prod(SHAPES[n]) for n in (Q, UP, DOWN))
    )


def test_first_is_what_an_early_checkpoint_had_moved(sides, tmp_path: Path, tensors, write_checkpoint) -> None:
    run = tmp_path / "run"
    early = write_checkpoint(trained_tensors(tensors[0], scale=5e-5))
    shutil.copytree(early, run / "checkpoint-6")
    shutil.copytree(sides[1], run / "checkpoint-60")
    mask = select_mask(sides[0], run, rule="first:6")
    assert same(mask, select_mask(sides[0], early, rule="visible"))
    assert mask.total_density() < select_mask(sides[0], run, rule="first:60").total_density()
    shutil.copytree(early, run / "steps" / "step-12")
    assert same(mask, select_mask(sides[0], run, rule="first:12"))
    with pytest.raises(ConfigError, match="no checkpoint-7; it holds checkpoints of steps 6, 12, 60"):
        select_mask(sides[0], run, rule="first:7")


def test_unions_intersections_and_complements_of_files(sides, tmp_path: Path) -> None:
    a, b = select_mask(*sides, rule="visible"), select_mask(sides[0], rule="random:0.3")
    files = [tmp_path / "a.mask", tmp_path / "b.mask"]
    for mask, file in zip((a, b), files, strict=True):
        mask.save(file)
    both = ",".join(map(str, files))
    assert same(select_mask(sides[0], rule=f"union:{both}"), a | b)
    assert same(select_mask(sides[0], rule=f"intersection:{both}"), a & b)
    assert same(select_mask(sides[0], rule=f"complement:{files[0]}"), ~a)
    assert same(select_mask(sides[0], rule=f"complement:{files[0]}", roles="ffn"), (~a).restrict(["ffn"]))
    for rule in (f"union:{both}", f"complement:{files[0]}"):
        with pytest.raises(CheckpointError, match=r"a\.mask: was made for another source"):
            select_mask(sides[1], rule=rule)
    with pytest.raises(CheckpointError, match="another source"):
        select_mask(sides[1], rule="random", like=files[0])


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("did you mean random", {"rule": "ranom:0.1"}),
        ("top:FRACTION", {"rule": "nonsense"}),
        ("fraction from 0 to 1", {"rule": "random:1.5"}),
        ("fraction from 0 to 1", {"rule": "random:much"}),
        ("needs a fraction", {"rule": "random"}),
        ("not both", {"rule": "random:0.1", "like": "a.mask"}),
        ("give SOURCE and TRAINED", {"rule": "visible"}),
        ("give SOURCE and TRAINED", {"rule": "top:0.1"}),
        ("of top and fisher only", {"rule": "random:0.1", "scope": "global"}),
        ("no scope", {"rule": "random:0.1", "scope": "world"}),
        ("no role 'mlp'", {"rule": "random:0.1", "roles": "mlp"}),
        ("no tensor is left", {"rule": "random:0.1", "roles": "vision"}),
        ("no range of layers", {"rule": "random:0.1", "layers": "5-1"}),
        ("no say in that", {"rule": "visible", "like": "a.mask"}),
        ("write complement:FILE", {"rule": "complement:a.mask,a.mask"}),
        ("write union:FILE,FILE", {"rule": "union:"}),
        ("whole number", {"rule": "first:ten", "trained": "."}),
    ],
)
def test_mistakes_are_said(said: str, options, sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    select_mask(sides[0], rule="random:0.5").save("a.mask")
    with pytest.raises(ConfigError, match=said):
        select_mask(sides[0], **options)


@pytest.mark.parametrize("rule", ["top:0.1", "low-magnitude:0.1", "principal:0.1", "rounding:0.1"])
def test_what_holds_nan_cannot_be_ranked(rule: str, tensors, write_checkpoint) -> None:
    broken = {name: values.copy() for name, values in tensors[0].items()}
    broken[UP][3, 3] = np.nan
    with pytest.raises(CheckpointError, match=f"{UP}' holds NaN or Inf"):
        select_mask(write_checkpoint(broken), write_checkpoint(tensors[1]), rule=rule)
    assert select_mask(write_checkpoint(broken), write_checkpoint(tensors[1]), rule="visible").count(NORM) > 0


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
def test_a_rounding_mask_has_the_exponents_of_a_simulated_update(dtype, write_checkpoint) -> None:
    """Brute force: Gaussian steps on every weight, rounded to bf16, of the scale that gives the same density."""
    rng = np.random.default_rng(5)
    weights = (rng.standard_normal((400, 250)) * 0.05).astype(dtype)
    rounded = weights.astype(BF16).astype(np.float64)

    def moved(scale: float) -> np.ndarray:
        stepped = (weights + scale * rng.standard_normal(weights.shape)).astype(np.float32).astype(BF16)
        return np.abs(stepped.astype(np.float64) - rounded) > float(ml_dtypes.bfloat16(1e-5))

    low, high = 1e-6, 1e-2
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if moved(middle).mean() < 0.3 else (low, middle)
    exponents = np.maximum(np.frexp(rounded)[1], -15) + 15
    simulated = [np.bincount(exponents[moved(middle)], minlength=16) for _ in range(20)]
    source = write_checkpoint({UP: weights})
    drawn = [
        np.bincount(exponents[select_mask(source, rule="rounding:0.3", seed=seed).dense(UP)], minlength=16)
        for seed in range(20)
    ]
    ours, theirs = np.mean(drawn, axis=0), np.mean(simulated, axis=0)
    error = 5 * np.sqrt((np.var(drawn, axis=0) + np.var(simulated, axis=0) + 1) / 20)
    assert (np.abs(ours - theirs) < error + 0.002 * theirs).all(), (ours, theirs)
    uniform = 0.3 * np.bincount(exponents.reshape(-1), minlength=16)
    assert np.count_nonzero(np.abs(uniform - theirs) > error + 0.002 * theirs) > 5, "a uniform draw would not pass"
