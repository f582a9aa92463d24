"""The mask file: what is written, what comes back, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import safe_open
from safetensors.numpy import save_file
from subnetwork_fixtures import DOWN, EMBEDDING, NORM, UP, Q, source_tensors, trained_tensors

from deltalens import patch
from deltalens.errors import CheckpointError
from deltalens.subnetwork import SubnetworkMask, source_hash

HASH = "0" * 64
NAMES = [EMBEDDING, Q, UP, DOWN, NORM]
bits = arrays(np.bool_, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
masks = st.lists(bits, min_size=1, max_size=4).map(lambda found: dict(zip(NAMES, found, strict=False)))


def made(dense: dict[str, np.ndarray], source: str = HASH) -> SubnetworkMask:
    return SubnetworkMask.from_dense(dense, rule="test", source_hash=source)


def check(mask: SubnetworkMask, dense: dict[str, np.ndarray]) -> None:
    assert mask.names() == list(dense)
    for name, wanted in dense.items():
        assert mask.shape(name) == wanted.shape
        np.testing.assert_array_equal(mask.dense(name), wanted)
        np.testing.assert_array_equal(mask.packed(name), np.packbits(wanted.reshape(-1)))
        assert mask.packed(name).dtype == np.uint8
        np.testing.assert_array_equal(mask.indices(name), np.flatnonzero(wanted))
        assert mask.indices(name).dtype == np.int64
        assert mask.count(name) == wanted.sum()
        assert mask.density(name) == (wanted.mean() if wanted.size else 0)
    size = sum(wanted.size for wanted in dense.values())
    assert mask.total_density() == sum(int(wanted.sum()) for wanted in dense.values()) / max(1, size)


@settings(max_examples=60, deadline=None)
@given(dense=masks)
def test_what_was_saved_comes_back(dense: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("masks") / "a.mask"
    mask = made(dense)
    check(mask, dense)
    mask.save(file)
    loaded = SubnetworkMask.load(file)
    check(loaded, dense)
    assert (loaded.rule, loaded.source_hash) == ("test", HASH)


@settings(max_examples=60, deadline=None)
@given(pair=st.lists(array_shapes(min_dims=0, max_dims=2, max_side=9), min_size=1, max_size=3), data=st.data())
def test_set_operations_are_those_of_the_arrays(pair: list[tuple[int, ...]], data: st.DataObject) -> None:
    a = {name: data.draw(arrays(np.bool_, shape)) for name, shape in zip(NAMES, pair, strict=False)}
    b = {name: data.draw(arrays(np.bool_, values.shape)) for name, values in a.items()}
    check(made(a) & made(b), {name: a[name] & b[name] for name in a})
    check(made(a) | made(b), {name: a[name] | b[name] for name in a})
    check(~made(a), {name: ~a[name] for name in a})
    check(~(made(a) & ~made(b)), {name: ~a[name] | b[name] for name in a})


def test_missing_tensors_are_empty() -> None:
    a, b = {UP: np.ones(5, bool)}, {DOWN: np.array([True, False, True])}
    check(made(a) | made(b), {**a, **b})
    check(made(a) & made(b), {UP: np.zeros(5, bool), DOWN: np.zeros(3, bool)})
    assert UP in made(a)
    assert DOWN not in made(a)


def test_masks_of_different_sources_do_not_mix() -> None:
    a = made({UP: np.ones(5, bool)})
    with pytest.raises(CheckpointError, match="different sources"):
        a & made({UP: np.ones(5, bool)}, "1" * 64)


def test_restriction_empties_the_rest() -> None:
    dense = {name: np.ones(9, bool) for name in NAMES}
    dense["model.visual.blocks.0.attn.qkv.weight"] = np.ones(9, bool)
    mask = made(dense)

    def left(kept: SubnetworkMask) -> list[str]:
        assert kept.names() == list(dense)
        return [name for name in kept.names() if kept.count(name)]

    assert left(mask.restrict(roles=["ffn", "norm"])) == [UP, DOWN, NORM]
    assert left(mask.restrict(layers=[0])) == [Q, UP]
    assert left(mask.restrict(roles=["ffn"], layers=[0, 7])) == [UP]
    assert left(mask.restrict(roles=["vision"])) == ["model.visual.blocks.0.attn.qkv.weight"]
    assert mask.restrict(roles=["ffn"]).by_role()["ffn"] == (2, 18, 18)
    assert mask.restrict(roles=["ffn"]).by_role()["norm"] == (1, 9, 0)


def test_the_file_is_as_the_format_says(tmp_path: Path) -> None:
    dense = {UP: np.arange(15).reshape(3, 5) % 4 == 0, NORM: np.zeros(11, bool)}
    made(dense).save(tmp_path / "a.mask")
    with safe_open(tmp_path / "a.mask", framework="numpy") as file:
        metadata = file.metadata()
        np.testing.assert_array_equal(file.get_tensor(UP), np.packbits(dense[UP].reshape(-1)))
        assert file.get_tensor(NORM).size == 0
    assert (metadata["schema"], metadata["rule"], metadata["source_hash"]) == ("1", "test", HASH)
    assert json.loads(metadata["shapes"]) == {UP: [3, 5], NORM: [11]}
    assert json.loads(metadata["densities"]) == {UP: 4 / 15, NORM: 0.0}
    assert float(metadata["density"]) == 4 / 26


def test_a_mask_knows_its_source(tmp_path: Path, write_checkpoint) -> None:
    tensors = source_tensors()
    source, other = write_checkpoint(tensors), write_checkpoint(trained_tensors(tensors))
    made({UP: np.ones((24, 16), bool)}, source_hash(source)).save(tmp_path / "a.mask")
    assert SubnetworkMask.load(tmp_path / "a.mask", source=source).count(UP) == 24 * 16
    with pytest.raises(CheckpointError, match=r"a\.mask: this mask was made for another source"):
        SubnetworkMask.load(tmp_path / "a.mask", source=other)


def test_the_hash_is_the_one_that_patches_use(tmp_path: Path, write_checkpoint) -> None:
    tensors = {**source_tensors(), "counter": np.array([3])}
    source, trained = write_checkpoint(tensors, shards=2), write_checkpoint({**trained_tensors(source_tensors())})
    packed = patch.pack(source, trained, tmp_path / "run.patch")
    assert source_hash(source) == packed.source_hash
    assert source_hash(write_checkpoint(tensors)) == source_hash(source), "shards do not matter"


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.mask"
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SubnetworkMask.load(file)
    file.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="no mask of deltalens"):
        SubnetworkMask.load(file)
    save_file({UP: np.zeros(2, np.uint8)}, file)
    with pytest.raises(CheckpointError, match="no mask of deltalens"):
        SubnetworkMask.load(file)
    metadata = {"schema": "1", "rule": "", "source_hash": HASH, "shapes": json.dumps({UP: [3]})}
    for changed, said in (
        ({"schema": "2"}, "schema 2"),
        ({"shapes": "{"}, "damaged"),
        ({"shapes": '{"a":[3]}'}, "dam"),
    ):
        save_file({UP: np.zeros(1, np.uint8)}, file, metadata=metadata | changed)
        with pytest.raises(CheckpointError, match=said):
            SubnetworkMask.load(file)
    save_file({UP: np.zeros(2, np.uint8)}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="bits that its shape needs"):
        SubnetworkMask.load(file)
    save_file({UP: np.array([0b11110000], np.uint8)}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="behind its end"):
        SubnetworkMask.load(file).packed(UP)
    made({UP: np.ones((64, 64), bool)}).save(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        SubnetworkMask.load(file)


def test_a_mask_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        made({UP: np.ones(3, bool)}).save(tmp_path / "file" / "a.mask")


def test_masks_and_interventions_import_no_torch(tmp_path: Path, write_checkpoint) -> None:
    tensors = source_tensors()
    source, trained = write_checkpoint(tensors), write_checkpoint(trained_tensors(tensors))
    code = f"""
import sys
from deltalens import SubnetworkMask, intervene
from deltalens.subnetwork import select_mask
select_mask({str(source)!r}, rule="rounding:0.1").save({str(tmp_path / "a.mask")!r})
intervene({str(source)!r}, {str(trained)!r}, {str(tmp_path / "out")!r}, keep="mask:{tmp_path / "a.mask"}")
print(sorted({{"torch", "transformers", "trl"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
