"""Loading a language or image-text model and its tokenizer or processor; saving them whole or not at all."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltalens.errors import ConfigError
from deltalens.files import whole_folder

__all__ = [
    "bfloat16_is_emulated",
    "load_for_generation",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "quiet_libraries",
    "resolve_model",
    "save_model",
    "sees_images",
    "whole_folder",
]

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


def sees_images(folder: Path) -> bool:
    """Whether a model folder holds an image-text model, by its config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        config = json.loads((folder / "config.json").read_text())
        named = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.get("model_type"))
        # Some types (gemma3) are read as either; the architecture says which one was saved.
        return named is not None and named in (config.get("architectures") or [named])
    except (OSError, ValueError, AttributeError):
        return False  # what is wrong with the folder is said where it is loaded


def load_processor(folder: Path) -> Any:
    """What turns chats into a model's inputs: an image-text model's processor, else `load_tokenizer`'s tokenizer.

    A processor's tokenizer pads on the left, and the processor has a chat template.

    Raises:
        ConfigError: there is none, it has no chat template, or it needs torchvision, which is not installed.
    """
    if not sees_images(folder):
        return load_tokenizer(folder)
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ImportError) and "torchvision" in str(error).lower():
            raise ConfigError(
                f"{folder}: its image processor needs torchvision, which is not installed; install the torchvision "
                "that fits your torch, or use a model that does without (Idefics3, SmolVLM, LLaVA)"
            ) from None
        raise ConfigError(f"{folder}: its processor cannot be loaded ({_first_line(error)})") from None
    if getattr(processor, "image_processor", None) is None:
        raise ConfigError(f"{folder}: has no image processor (preprocessor_config.json or processor_config.json)")
    tokenizer = processor.tokenizer
    if processor.chat_template is None:
        processor.chat_template = tokenizer.chat_template
    if processor.chat_template is None:
        raise ConfigError(f"{folder}: its processor has no chat template; use an instruction-tuned model")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def load_model(folder: Path, dtype: str) -> Any:
    """The causal language model or image-text model of a folder, its weights cast to `dtype` ("float32", "bfloat16").

    Raises:
        ConfigError: it cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForImageTextToText if sees_images(folder) else AutoModelForCausalLM
    try:
        return kind.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{folder}: its model cannot be loaded ({_first_line(error)})") from None


def load_for_generation(folder: Path, dtype: str = "bfloat16") -> Any:
    """`load_model` on the device, its weights in bfloat16, as inference uses them; where bfloat16 is emulated the same
    rounded weights are multiplied in float32, which is several times faster there. `dtype`: "float32" for weights that
    have not been rounded.

    Raises:
        ConfigError: it cannot be loaded.
    """
    import torch

    model = load_model(folder, dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    return model.float() if bfloat16_is_emulated() else model


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Write a model and its tokenizer or processor to a folder that appears whole or not at all, replacing an older
    one."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def bfloat16_is_emulated() -> bool:
    """Whether bfloat16 is slower here than float32: there is no GPU, and the processor lacks the instructions.

    Asked of `torch.cpu.get_capabilities` (seen in torch 2.13); False where torch has no such function or knows nothing.
    """
    import torch

    ask: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    known = ask()
    if torch.cuda.is_available() or not known:
        return False
    return not any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
