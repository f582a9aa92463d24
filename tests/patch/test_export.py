"""Flat positions and values: put into the source they give TRAINED's bits."""

import numpy as np
import pytest
from patch_fixtures import moved, weights, write_folder

from deltalens.checkpoint import open_checkpoint
from deltalens.errors import PatchError
from deltalens.patch import export, export_sparse, read_sparse


@pytest.fixture
def pair(tmp_path):
    after = moved(weights())
    after["new"] = np.arange(5, dtype=np.float32)
    after["counter"] = np.array(4, np.int64)
    del after["mask"]
    return write_folder(tmp_path / "source", weights()), write_folder(tmp_path / "trained", after, shards=2)


@pytest.mark.parametrize("layout", ["vllm", "safetensors"])
def test_positions_and_values_give_trained(pair, tmp_path, layout):
    changed = export_sparse(*pair, tmp_path / "sparse.safetensors", layout)
    seen = {item["name"]: item for item in read_sparse(tmp_path / "sparse.safetensors")}
    counted = 0
    with open_checkpoint(pair[0]) as before, open_checkpoint(pair[1]) as after:
        for name, entry in after.entries.items():
            wanted = after.read(name)
            if name not in seen:
                assert before.read(name).tobytes() == wanted.tobytes()
                continue
            item = seen[name]
            assert (item["dtype"], tuple(item["shape"])) == (entry.dtype, entry.shape)
            if item["indices"] is None:
                assert name == "new"
                assert item["values"].tobytes() == wanted.tobytes()
                continue
            assert item["indices"].dtype == (np.int32 if layout == "vllm" else np.int64)
            assert np.all(np.diff(item["indices"]) > 0)
            words = before.read(name).view(f"<u{entry.nbytes // entry.size}")
            values = item["values"].view(words.dtype)
            assert np.all(words[item["indices"]] != values)  # nothing is sent that did not change
            words[item["indices"]] = values
            assert words.tobytes() == wanted.tobytes()
            counted += values.size
    assert counted == changed > 0


def test_the_file_is_plain_safetensors(pair, tmp_path):
    from safetensors import safe_open

    export_sparse(*pair, tmp_path / "sparse.safetensors", "vllm")
    with safe_open(tmp_path / "sparse.safetensors", "pt") as file:
        keys = set(file.keys())
        indices = file.get_tensor("embed.weight.indices")
        values = file.get_tensor("embed.weight.values")
    assert {"embed.weight.indices", "embed.weight.values", "new"} <= keys
    assert str(indices.dtype) == "torch.int32"
    assert str(values.dtype) == "torch.bfloat16"
    assert indices.shape == values.shape


def test_a_tensor_too_large_for_int32_is_refused(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "INT32_LIMIT", 100)
    with pytest.raises(PatchError, match="int32"):
        export_sparse(*pair, tmp_path / "sparse.safetensors", "vllm")
    assert not (tmp_path / "sparse.safetensors").exists()
    export_sparse(*pair, tmp_path / "sparse.safetensors", "safetensors")


def test_a_name_that_would_collide_is_refused(tmp_path):
    after = {"a": np.ones(4, np.float32), "a.indices": np.ones(4, np.float32)}
    before = {"a": np.zeros(4, np.float32)}
    source, trained = write_folder(tmp_path / "source", before), write_folder(tmp_path / "trained", after)
    with pytest.raises(PatchError, match=r"a\.indices"):
        export_sparse(source, trained, tmp_path / "sparse.safetensors", "vllm")


def test_an_unwritable_place_is_one_error(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PatchError, match="cannot be written"):
        export_sparse(*pair, tmp_path / "file" / "sparse.safetensors", "vllm")


def test_another_file_is_refused_by_name(pair):
    with pytest.raises(PatchError, match="export"):
        list(read_sparse(pair[0] / "model.safetensors"))
