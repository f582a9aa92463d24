import json
import pickle
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from deltalens.checkpoint import open_checkpoint
from deltalens.errors import CheckpointError


def _shards(folder: Path, index: dict[str, Any] | None = None) -> Path:
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.ones(4, ml_dtypes.bfloat16)}, folder / "model-00002-of-00002.safetensors")
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


GOOD = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


@pytest.mark.parametrize("index", [GOOD, None])
def test_shards_with_an_index_and_without(tmp_path: Path, index: Any) -> None:
    with open_checkpoint(_shards(tmp_path, index)) as checkpoint:
        assert {n: (e.dtype, e.shape) for n, e in checkpoint.entries.items()} == {
            "a": ("F32", (2, 3)),
            "b": ("BF16", (4,)),
        }
        assert (checkpoint.parameters, checkpoint.nbytes, len(checkpoint.files)) == (10, 32, 2)
        np.testing.assert_array_equal(checkpoint.read("a").view(np.float32), np.arange(6))
        np.testing.assert_array_equal(checkpoint.read("b").view(ml_dtypes.bfloat16), np.ones(4))
    if index:
        assert set(open_checkpoint(tmp_path / "model.safetensors.index.json").entries) == {"a", "b"}


def test_what_transformers_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 1
    assert checkpoint.config["model_type"] == "llama"
    state = model.state_dict()
    assert set(checkpoint.entries) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.contiguous().view(torch.uint8).numpy().ravel())


@given(start=st.integers(0, 24), count=st.integers(0, 24))
def test_ranges(tmp_path_factory: pytest.TempPathFactory, start: int, count: int) -> None:
    file = tmp_path_factory.getbasetemp() / "range.safetensors"
    if not file.exists():
        save_file({"a": np.arange(24, dtype=np.int16).reshape(4, 6)}, file)
    count = min(count, 24 - start)
    checkpoint, buffer = open_checkpoint(file), np.full(60, 7, np.uint8)
    got = checkpoint.read("a", buffer, start=start, count=count)
    checkpoint.tensors.close()
    np.testing.assert_array_equal(got.view(np.int16), np.arange(start, start + count))
    assert got.base is buffer or got.base is buffer.base
    assert (buffer[2 * count :] == 7).all()


def test_many_threads_and_another_process(tmp_path: Path) -> None:
    values = {f"t{i}": np.full(1000, i, np.float32) for i in range(40)}
    for i, (name, value) in enumerate(values.items()):
        save_file({name: value}, tmp_path / f"s{i:02d}.safetensors")
    checkpoint, wrong = open_checkpoint(tmp_path), []

    def work() -> None:
        wrong.extend(n for n, v in values.items() if (checkpoint.read(n).view(np.float32) != v).any())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(checkpoint.tensors._reader._handles) == 40  # one descriptor a file, whoever came first
    copy = pickle.loads(pickle.dumps(checkpoint))
    np.testing.assert_array_equal(copy.read("t3").view(np.float32), values["t3"])
    copy.tensors.close()
    checkpoint.tensors.close()


@pytest.mark.parametrize("outside", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "", "..", ".", 3, None])
def test_an_index_cannot_reach_out_of_its_folder(tmp_path: Path, outside: Any) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").mkdir()
    save_file({"a": np.ones(2)}, folder / "sub" / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"not a file of its own folder|not a checkpoint index"):
        open_checkpoint(_shards(folder, {"a": outside}))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "model-00009-of-00002.safetensors"}, "which is not there"),
        ({**GOOD, "c": "model-00001-of-00002.safetensors"}, "'c', but it does not"),
        ({**GOOD, "a": "model-00002-of-00002.safetensors"}, "'a', but it does not"),
        ([], "not a checkpoint index"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, index: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(_shards(tmp_path, index))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a checkpoint index"):
        open_checkpoint(tmp_path)


def test_a_name_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "x.safetensors")
    save_file({"a": np.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is also in x\.safetensors"):
        open_checkpoint(tmp_path)


def _file(folder: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def _tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "header is no JSON"),
        (b"\xff\xfe", "header is no JSON"),
        ([1], "no JSON object"),
        ({"a": 3}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}}, "malformed"),
        ({"a": _tensor(0, 4, [1], "F3")}, "dtype F3"),
        ({"a": _tensor(0, 4, [2])}, "bytes its shape needs"),
        ({"a": _tensor(-4, 0, [1])}, "bytes its shape needs"),
        ({"a": _tensor(0, 4, [-1, -1])}, "bytes its shape needs"),
        ({"a": _tensor(0, 8, [2]), "b": _tensor(4, 8, [1])}, "overlap"),
        ({"a": _tensor(0, 12, [3])}, "ends before tensor 'a'"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(_file(tmp_path, header))
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"\0\0", (1 << 40).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{}"])
def test_no_safetensors_file(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="not a safetensors file, or cut short"):
        open_checkpoint(tmp_path)


def test_a_file_cut_after_opening_and_one_removed(tmp_path: Path) -> None:
    save_file({"a": np.ones(100, np.float32)}, tmp_path / "model.safetensors")
    checkpoint, other = open_checkpoint(tmp_path), open_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("rb+") as handle:
        handle.truncate(200)
    with pytest.raises(CheckpointError, match="ends inside tensor 'a'"):
        checkpoint.read("a")
    checkpoint.tensors.close()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        other.read("a")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(tmp_path / "absent" / "deep" / "er")
    with pytest.raises(CheckpointError, match=r"looked for an adapter_config.json, \*.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        open_checkpoint(tmp_path)
