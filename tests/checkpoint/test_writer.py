"""The streaming writer against safetensors' own."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deltalens.checkpoint import open_checkpoint
from deltalens.checkpoint.writer import carried_files, copy_files, new_header, sharded_as, write_tensors


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b": rng.standard_normal((7, 3)).astype(ml_dtypes.bfloat16),
        "a": rng.standard_normal(5).astype(np.float32),
        "scalar": np.array(3, np.int64),
        "none": np.zeros((0, 4), np.float16),
        "bits": rng.random(9) < 0.5,
    }


def test_a_file_is_that_of_the_library(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with open_checkpoint(tmp_path) as checkpoint:
        entries = list(checkpoint.entries.values())
        streamed = ((name, checkpoint.read(name)) for name in reversed(list(checkpoint.entries)))
        assert write_tensors(tmp_path / "out", entries, streamed) == [tmp_path / "out" / "model.safetensors"]
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
        assert len(new_header(entries)) % 8 == 0


def test_shards_and_their_index(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        entries = [
            replace(entry, file=Path(f"model-{i % 2 + 1:05d}-of-00002.safetensors"))
            for i, entry in enumerate(checkpoint.entries.values())
        ]
        out = tmp_path / "out"
        out.mkdir()
        files = write_tensors(out, entries, ((name, checkpoint.read(name)) for name in checkpoint.entries))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors().values())
    read = {file.name: load_file(file) for file in files}
    for name, values in tensors().items():
        np.testing.assert_array_equal(read[index["weight_map"][name]][name], values)
    with open_checkpoint(out) as written:  # the index fits its shards
        assert set(written.entries) == set(tensors())
        assert {entry.file.name for entry in sharded_as(entries, written) or []} == {file.name for file in files}
        assert sharded_as([replace(entries[0], name="other")], written) is None


def test_a_tensor_that_never_came_is_not_passed_over(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(AssertionError, match="never given"):
        write_tensors(tmp_path / "out", list(checkpoint.entries.values()), iter(()))


def test_carried_files_hold_no_weights(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", ".hidden", "optimizer.pt",
                 "model.safetensors.index.json", "pytorch_model.bin.index.json"):  # fmt: skip
        (tmp_path / name).write_text('{"weight_map": {"a": "model.safetensors"}}')
    (tmp_path / "global_step1").mkdir()
    with open_checkpoint(tmp_path) as checkpoint:
        held = ["chat_template.jinja", "config.json", "model.safetensors.index.json", "tokenizer.json"]
        assert [file.name for file in carried_files(checkpoint)] == held
        (tmp_path / "out").mkdir()
        copy_files(checkpoint, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*held} - {"model.safetensors.index.json"}
    with open_checkpoint(tmp_path / "model.safetensors") as bare:
        assert carried_files(bare) == []
