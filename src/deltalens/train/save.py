"""Writing a trained model: bfloat16 for use and analysis, float32 where a master is kept, an adapter where one was
trained. Under FSDP or DeepSpeed the weights are gathered first, and the main process writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltalens.train.models import whole_folder

__all__ = ["save_weights"]


def save_weights(trainer: Any, processor: Any, folder: Path, dtype: str, *, adapter: Path | None = None) -> None:
    """Save the trainer's model as it is now, without touching it.

    Args:
        trainer: a transformers or TRL trainer.
        processor: the tokenizer or processor, saved beside it.
        folder: appears whole or not at all.
        dtype: "bfloat16" or "float32"; floating-point weights are cast to it, one at a time.
        adapter: where a trained PEFT adapter goes too; `folder` then gets the merged weights.
    """
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return
    if hasattr(model, "peft_config"):
        if adapter is not None:
            with whole_folder(adapter) as temporary:
                model.save_pretrained(temporary, state_dict=state)
        model, state = _merged(model, state)
    cast = _cast(state, getattr(torch, dtype))
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=cast)
        processor.save_pretrained(temporary)
        _name_dtype(temporary / "config.json", dtype)


def _cast(state: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Weights in `dtype`; tied ones stay one tensor, or they would be stored twice."""
    done: dict[tuple[int, tuple[int, ...]], Any] = {}
    out = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in done:
            done[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        out[name] = done[key]
    return out


def _merged(model: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The base model and its weights with the adapter added, in float32."""
    import copy

    whole = copy.deepcopy(model).cpu()
    whole.load_state_dict(state)
    merged = whole.merge_and_unload()
    return merged, merged.state_dict()


def _name_dtype(file: Path, dtype: str) -> None:
    """The config says which dtype the weights were saved in, not which they were trained in."""
    config = json.loads(file.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = dtype
    file.write_text(json.dumps(config, indent=2) + "\n")
