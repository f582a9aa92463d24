"""Loading a language model and its tokenizer, and saving them as a whole folder or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError

__all__ = ["load_model", "load_tokenizer", "quiet_libraries", "resolve_model", "save_model", "whole_folder"]

_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the warnings, log lines and progress bars of the training libraries, and restore all of it after.

    What a user can act on is raised as an error by us; the rest would tear our one progress display apart.
    """
    # Read when these libraries are first imported. Nobody who runs a demo asked for usage reports to a third party.
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    import logging

    names = ("transformers", "trl", "accelerate", "datasets", "huggingface_hub", "torch", "gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
        from transformers.utils import logging as transformers_logging

        levels = {name: logging.getLogger(name).level for name in names}
        transformers_bars = transformers_logging.is_progress_bar_enabled()
        datasets_bars = datasets.are_progress_bars_disabled()
        hub_bars = are_progress_bars_disabled()
        try:
            for name in names:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            transformers_logging.disable_progress_bar()
            datasets.disable_progress_bars()
            disable_progress_bars()
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if transformers_bars:
                transformers_logging.enable_progress_bar()
            if not datasets_bars:
                datasets.enable_progress_bars()
            if not hub_bars:
                enable_progress_bars()


def resolve_model(spec: str | Path) -> Path:
    """The local folder of a model: `spec` itself, or the download of a Hub id with an optional `@revision`.

    Raises:
        ConfigError: there is no such folder and no such model, or the folder holds no model.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{spec}: holds no model (there is no config.json in it)")
        return path.resolve()
    name, _, revision = str(spec).partition("@")
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{spec}: is not a model folder; give a folder with config.json and safetensors, or a Hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{spec}: no such folder, and not to be had from the Hub ({reason})") from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, padding on the left, as generation needs it.

    Raises:
        ConfigError: there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{folder}: its tokenizer cannot be loaded ({_first_line(error)})") from None
    if tokenizer.chat_template is None:
        raise ConfigError(f"{folder}: its tokenizer has no chat template; use an instruction-tuned model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, dtype: str) -> Any:
    """The causal language model of a folder, with its weights cast to `dtype` ("float32", "bfloat16").

    Raises:
        ConfigError: it cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{folder}: its model cannot be loaded ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer to a folder that appears whole or not at all, replacing an older one."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends well and removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        yield temporary
        # mkdtemp makes the folder private and safetensors its files; outputs are ordinary folders and files.
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
