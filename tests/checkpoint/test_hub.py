from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltalens.checkpoint import open_checkpoint
from deltalens.checkpoint.hub import needed_files, split_hub_id
from deltalens.errors import CheckpointError


def test_ids() -> None:
    assert split_hub_id("Qwen/Qwen2.5-0.5B") == ("Qwen/Qwen2.5-0.5B", None)
    assert split_hub_id("a/b@refs/pr/3") == ("a/b", "refs/pr/3")
    for path in ("model", "./a/b", "/a/b", "a/b/c", "../a", "~/x", "a/b@", "a\\b"):
        assert split_hub_id(path) is None


def test_only_what_is_needed_is_taken() -> None:
    sharded = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    small = ["config.json", "tokenizer.json"]
    rest = [
        "pytorch_model.bin",
        "README.md",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "original/model.safetensors",
    ]
    assert needed_files(sharded + rest + small) == sharded + small
    assert needed_files(["model.safetensors", *rest, *small]) == ["model.safetensors", *small]
    assert needed_files(["pytorch_model.bin", "tf_model.h5", "config.json"]) == ["pytorch_model.bin", "config.json"]
    bins = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"]
    assert needed_files([*bins, "README.md"]) == bins
    adapter = ["adapter_config.json", "adapter_model.safetensors", "README.md"]
    assert needed_files(adapter) == ["adapter_model.safetensors", "adapter_config.json"]
    assert needed_files(["README.md", "config.json", "x.gguf"]) == []


def _info(*files: str) -> Any:
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
    asked: list[Any] = []

    def snapshot(repo: str, **settings: Any) -> str:
        asked.append((repo, settings))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: _info("model.safetensors", "x.bin"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    checkpoint = open_checkpoint("owner/name@v2")
    assert (checkpoint.path, list(checkpoint.entries)) == ("owner/name@v2", ["a"])
    assert asked == [("owner/name", {"revision": "v2", "allow_patterns": ["model.safetensors"]})]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: _info("README.md"))
    with pytest.raises(CheckpointError, match="owner/name: the repository holds no safetensors"):
        open_checkpoint("owner/name")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is really refused: which class is raised then is the HTTP library's affair."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="no such file or directory, and the Hub cannot be reached"):
        open_checkpoint("owner-of/nothing-cached")
    save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert list(open_checkpoint("owner-of/nothing-cached").entries) == ["a"]


def test_what_the_hub_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    for kind, message in (
        ("GatedRepoError", "access is gated"),
        ("RevisionNotFoundError", "not this revision"),
        ("RepositoryNotFoundError", "neither a local path nor a repository"),
    ):
        error = getattr(errors, kind).__new__(getattr(errors, kind))

        def answer(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
        with pytest.raises(CheckpointError, match=f"owner/name@v1.*{message}"):
            open_checkpoint("owner/name@v1")
