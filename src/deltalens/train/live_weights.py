"""A model in training as a checkpoint: the names that a file would have, and one whole tensor at a time.

Under FSDP2 a parameter is spread over processes; `gather` puts one together, on every process in the same order. LoRA
adapters are merged: W + scaling · B · A. What cannot be had this way is refused with the way out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltalens.checkpoint.base import Checkpoint, TensorEntry, byte_range
from deltalens.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["LiveTensor", "LiveWeights", "live_tensors", "local_part"]

_ADAPTER = re.compile(r"\.(lora_\w+|original_module)\b")
_SAVED = re.compile(r"\.modules_to_save\.(\w+)")


@dataclass(frozen=True, slots=True)
class _LowRank:
    """One adapter of a weight: the update is scaling · B · A, transposed where the layer stores its weight so."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A parameter of the model (of its whole shape, also where it is distributed) and the adapters on it."""

    weight: torch.Tensor
    adapters: tuple[_LowRank, ...] = ()

    @property
    def trainable(self) -> bool:
        parts = [self.weight, *(part for one in self.adapters for part in (one.a, one.b))]
        return any(part.requires_grad for part in parts)

    def gather(self, *, wanted: bool) -> torch.Tensor | None:
        """The whole merged tensor, detached; None where it is not `wanted` here.

        Under FSDP2 a collective call: every process makes it, one asks for the result. May share the model's memory.
        """
        weight = _whole(self.weight)
        factors = [(_whole(one.a), _whole(one.b), one) for one in self.adapters]
        if not wanted:
            return None
        if factors:
            weight = weight.float()
        for a, b, one in factors:
            update = (one.scaling * b.float()) @ a.float()
            weight = weight + (update.T if one.transposed else update)
        return weight


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_part(tensor: Any) -> torch.Tensor | None:
    """This process's shard of a DTensor; of what several processes hold alike, only the first one's counts."""
    if not hasattr(tensor, "to_local"):
        import torch.distributed as dist

        return tensor if not dist.is_initialized() or dist.get_rank() == 0 else None
    mesh, placements = tensor.device_mesh, tensor.placements
    copies = [i for i, placement in enumerate(placements) if placement.is_replicate()]
    return tensor.to_local() if all(mesh.get_local_rank(i) == 0 for i in copies) else None


def live_tensors(model: Any) -> dict[str, LiveTensor]:
    """Every floating-point parameter by the name that a saved checkpoint gives it, a tied one once, largest first.

    Raises:
        ConfigError: FSDP1, DeepSpeed ZeRO 3, or an adapter that is no plain LoRA.
    """
    adapters = _adapters(model)
    active = getattr(model, "active_adapter", None)
    found: dict[str, LiveTensor] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ConfigError("UpdateGeometryCallback: DeepSpeed ZeRO 3 is not supported; train with FSDP2 or ZeRO 2")
        if _ADAPTER.search(name) or not parameter.is_floating_point():
            continue
        if (saved := _SAVED.search(name)) and saved[1] != active:
            continue
        bare = _SAVED.sub("", name.removeprefix("base_model.model.")).replace(".base_layer", "")
        found[bare] = LiveTensor(parameter, tuple(adapters.get(id(parameter), ())))
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ConfigError(
            "UpdateGeometryCallback: FSDP1 is not supported; set fsdp_version: 2 in the Accelerate config"
        )
    return dict(sorted(found.items(), key=lambda item: (-item[1].weight.numel(), item[0])))


def _adapters(model: Any) -> dict[int, list[_LowRank]]:
    """Active LoRA adapters by the id of the weight that they change."""
    out: dict[int, list[_LowRank]] = {}
    if not hasattr(model, "peft_config"):
        return out
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        way_out = f"UpdateGeometryCallback: the adapter on {name} is no plain LoRA; leave the callback out"
        if not isinstance(module, LoraLayer):
            raise ConfigError(way_out)
        layer: Any = module
        weight = getattr(layer.get_base_layer(), "weight", None)
        for adapter in layer.active_adapters:
            if adapter in layer.merged_adapters or adapter not in layer.scaling:
                continue
            embedding = adapter in layer.lora_embedding_A
            if embedding:
                a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            else:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            transposed = embedding or bool(getattr(layer, "fan_in_fan_out", False))
            special = layer.lora_variant.get(adapter) or layer.lora_bias.get(adapter)
            shape = (a.shape[-1], b.shape[0]) if transposed else (b.shape[0], a.shape[-1])
            if special or weight is None or weight.shape != shape or not weight.is_floating_point():
                raise ConfigError(f"{way_out} (or train without DoRA, LoRA biases, and a quantised base)")
            out.setdefault(id(weight), []).append(_LowRank(a, b, float(layer.scaling[adapter]), transposed))
    return out


class LiveWeights:
    """The model as a `checkpoint.base.TensorSource` of bf16 words; a tensor can be read while it is held.

    Args:
        model: of transformers or PEFT, maybe wrapped (DDP, torch.compile) or sharded (FSDP2).
        main: whether this process measures; the others only take part in gathering.
    """

    format = "a model in training"
    files: tuple[Path, ...] = ()

    def __init__(self, model: Any, *, main: bool) -> None:
        self.main = main
        self.tensors = live_tensors(model)
        self._held: dict[str, np.ndarray] = {}
        self._entries = {
            name: TensorEntry(name, "BF16", tuple(live.weight.shape), Path("model"))
            for name, live in self.tensors.items()
        }
        self.config = _config(model)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def as_checkpoint(self) -> Checkpoint:
        return Checkpoint("the model in training", self, self.config)

    def hold(self, name: str) -> None:
        """Gather a tensor (a collective call) and keep its words, rounded to nearest even, until `release`."""
        import torch

        whole = self.tensors[name].gather(wanted=self.main)
        if whole is not None:
            words = whole.to(torch.bfloat16).contiguous().cpu()
            self._held[name] = words.view(torch.uint16).numpy().reshape(-1).view(np.uint8)

    def release(self, name: str) -> None:
        self._held.pop(name, None)

    def read(
        self, name: str, buffer: np.ndarray | None = None, *, start: int = 0, count: int | None = None
    ) -> np.ndarray:
        """A view of the held words; `buffer` is not needed, and a held bf16 tensor may be the model's own memory."""
        begin, length = byte_range(self._entries[name], start, count)
        return self._held[name][begin : begin + length]

    def close(self) -> None:
        self._held.clear()


def _config(model: Any) -> dict[str, Any]:
    """The model's configuration, with what the parameters themselves say about a tied head."""
    inner = model.module if hasattr(model, "module") and not hasattr(model, "config") else model
    config: Any = getattr(inner, "config", None)
    out = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    if hasattr(inner, "get_output_embeddings"):
        head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
        if head is not None and embedding is not None:
            out["tie_word_embeddings"] = head.weight is embedding.weight
    return out
