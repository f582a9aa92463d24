"""Finding, loading and saving models; what importing them costs."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from deltalens.errors import ConfigError
from deltalens.train.models import (
    bfloat16_is_emulated,
    load_for_generation,
    load_model,
    load_tokenizer,
    quiet_libraries,
    resolve_model,
    whole_folder,
)


def test_modules_import_no_torch() -> None:
    names = ("demo", "embedded", "evaluate", "models", "opsd", "progress", "small_vlm", "statistics", "tasks")
    code = "import sys\n" + "".join(f"import deltalens.train.{name}\n" for name in names)
    code += "print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_models_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    (tmp_path / "file").write_text("x")
    for spec, text in (
        (tmp_path / "absent", "is not a model folder"),
        (tmp_path / "file", "is not a model folder"),
        (tmp_path, r"no config\.json"),
        ("org/absent", "not to be had from the Hub .no route to host"),
    ):
        with pytest.raises(ConfigError, match=text) as caught:
            resolve_model(spec)
        assert str(spec) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_broken_models_are_one_clear_line(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with quiet_libraries():
        with pytest.raises(ConfigError, match="its tokenizer cannot be loaded") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
        with pytest.raises(ConfigError, match="its model cannot be loaded"):
            load_model(tmp_path, "float32")
        (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:5000])
        with pytest.raises(ConfigError, match="its model cannot be loaded"):
            load_model(tmp_path, "float32")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_text((tiny_model / name).read_text())
        with pytest.raises(ConfigError, match="no chat template"):
            load_tokenizer(tmp_path)


def test_whole_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def fail_half_way() -> None:
        with whole_folder(target) as folder:
            (folder / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with whole_folder(target) as folder:
            (folder / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_quiet_libraries_restores_what_it_silenced() -> None:
    from transformers.utils import logging as transformers_logging

    level, bars = logging.getLogger("transformers").level, transformers_logging.is_progress_bar_enabled()
    with quiet_libraries():
        assert not transformers_logging.is_progress_bar_enabled()
        warnings.warn("silenced", stacklevel=1)
    assert (logging.getLogger("transformers").level, transformers_logging.is_progress_bar_enabled()) == (level, bars)
    with pytest.raises(UserWarning):
        warnings.warn("not silenced", stacklevel=1)


@pytest.mark.parametrize(
    ("capabilities", "cuda", "emulated"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False, True),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, False, False),
        ({"amx_bf16": True}, False, False),
        ({"neon": True, "bf16": True}, False, False),
        ({"avx2": True}, True, False),
        ({}, False, False),
    ],
)
def test_bfloat16_without_instructions(monkeypatch, capabilities, cuda, emulated):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert bfloat16_is_emulated() is emulated


@pytest.mark.parametrize("emulated", [True, False])
def test_generation_uses_the_rounded_weights_in_the_faster_dtype(tiny_model, monkeypatch, emulated):
    monkeypatch.setattr("deltalens.train.models.bfloat16_is_emulated", lambda: emulated)
    found, exact = load_for_generation(tiny_model), load_model(tiny_model, "float32")
    assert {p.dtype for p in found.parameters()} == {torch.float32 if emulated else torch.bfloat16}
    for ours, theirs in zip(found.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs.bfloat16())
        assert torch.equal(ours.float(), theirs.bfloat16().float())
