"""Masked training in any Hugging Face Trainer (TRL's among them) by one callback.

The Trainer clips what it finds in `.grad`, where the hooks leave nothing, and logs the norm of that; under DDP it
reduces the same nothing. The callback puts the compact optimizer's own clipping, norm and reduction there (issue 13).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from deltalens.checkpoint import FLOAT_DTYPES, open_checkpoint
from deltalens.checkpoint.pairing import bare_name
from deltalens.errors import CheckpointError, ConfigError
from deltalens.metrics.values import delta_float64, prepare, round_threshold
from deltalens.subnetwork.compact import CompactOptimizer
from deltalens.subnetwork.coordinates import Restriction
from deltalens.subnetwork.distributed import hand_over_reduction, keep_out_of_ddp, ranks
from deltalens.subnetwork.mask import SubnetworkMask, source_hash
from deltalens.subnetwork.optimizers import CompactAdamW, CompactAdamWNoMomentum

__all__ = ["SubnetworkCallback", "discover_visible"]

DISCOVERED = "subnetwork.safetensors"


class SubnetworkCallback(TrainerCallback):
    """Trains only a mask: `Trainer(..., callbacks=[SubnetworkCallback(mask)])`.

    Clips at the arguments' `max_grad_norm`, logs `grad_norm` from the compact gradients, and lets the optimizer average
    over the ranks. The optimizer's state is saved and resumed with the Trainer's checkpoints.
    """

    def __init__(
        self,
        mask: Restriction | None = None,
        optimizer: type[CompactOptimizer] = CompactAdamW,
        *,
        after: int | None = None,
        then: Restriction | Callable[[nn.Module], SubnetworkMask] | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            mask: what is trained. None where the Trainer is given a compact optimizer, in `optimizers` or
                `optimizer_cls_and_kwargs`.
            optimizer: class of the optimizer. Learning rate, weight decay (and which parameters have none) and Adam's
                betas and epsilon are the training arguments'.
            after: optimizer step after which training goes on with `then`: discover first, then stay on what was found.
            then: a mask, or what makes one of the model as it is at that step, such as `discover_visible(source)`. One
                that is made is saved in the Trainer's output folder as `subnetwork.safetensors`, for resuming.
            settings: further settings of the optimizer; they win over the arguments.

        Raises:
            ConfigError: only one of `after` and `then` is given.
        """
        if (after is None) != (then is None):
            raise ConfigError("give both `after` (a step) and `then` (what to train from there on), or neither")
        self.mask, self.optimizer_class, self.settings = mask, optimizer, settings
        self.after, self.then = after, then
        self.trainer: Trainer | None = None

    @property
    def optimizer(self) -> CompactOptimizer:
        """The compact optimizer under whatever accelerate wraps around it. From the start of training on."""
        assert self.trainer is not None
        optimizer: Any = self.trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, CompactOptimizer):
            raise ConfigError(
                f"the Trainer has a {type(optimizer).__name__}, which trains everything; give it a compact optimizer, "
                "or none, and SubnetworkCallback a mask"
            )
        return optimizer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer = trainer = _calling_trainer()
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.fp16:
            raise ConfigError(
                "SubnetworkCallback works with one process or DDP, in float32 or bfloat16; under FSDP2 write the loop "
                "yourself and make the optimizer after fully_shard (docs/subnetwork.md)"
            )

        made_by_trainer = trainer.create_optimizer

        def create_optimizer(model: nn.Module | None = None) -> torch.optim.Optimizer:
            if trainer.optimizer is None:
                trainer.optimizer = made_by_trainer(model) if self.mask is None else self._make(trainer, self.mask)
            optimizer = self.optimizer
            if ranks(None) > 1:
                keep_out_of_ddp(optimizer.model, [tensor.parameter for tensor in optimizer.tensors])
            trainer.accelerator.clip_grad_norm_ = self._clip
            assert trainer.optimizer is not None
            return trainer.optimizer

        trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]

    def _make(self, trainer: Trainer, mask: Restriction) -> CompactOptimizer:
        args, settings, model = trainer.args, dict(self.settings), trainer.model
        assert model is not None
        decaying = set(trainer.get_decay_parameter_names(model))
        settings.setdefault("no_decay", [name for name, _ in model.named_parameters() if name not in decaying])
        settings.setdefault("lr", args.learning_rate)
        settings.setdefault("weight_decay", args.weight_decay)
        if issubclass(self.optimizer_class, CompactAdamW):
            settings.setdefault("eps", args.adam_epsilon)
            if issubclass(self.optimizer_class, CompactAdamWNoMomentum):
                settings.setdefault("beta2", args.adam_beta2)
            else:
                settings.setdefault("betas", (args.adam_beta1, args.adam_beta2))
        return self.optimizer_class(model, mask, **settings)

    def _clip(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """In accelerate's place; the Trainer calls it with `inf` where it only wants the norm."""
        assert norm_type == 2, "the Trainer clips by the Euclidean norm"
        return self.optimizer.clip_grad_norm(max_norm)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        hand_over_reduction(self.trainer.model_wrapped)
        if self.after is not None and state.global_step >= self.after:  # resumed behind the change
            found = SubnetworkMask.load(Path(args.output_dir) / DISCOVERED) if callable(self.then) else self.then
            assert found is not None
            self.optimizer.change_mask(found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.after:
            return
        assert self.then is not None
        if not callable(self.then):
            self.optimizer.change_mask(self.then)
            return
        found = self.then(kwargs["model"])
        if args.should_save:
            found.save(Path(args.output_dir) / DISCOVERED)
        self.optimizer.change_mask(found)


def discover_visible(source: str | Path, threshold: float = 1e-5) -> Callable[[nn.Module], SubnetworkMask]:
    """Makes a mask of what a model has visibly moved from `source`, for `SubnetworkCallback(then=...)`.

    Visible is |Δ| > τ in bf16, as in `analyze`. Reads `source` tensor by tensor when called.

    Raises:
        CheckpointError: on the call: `source` cannot be read, or does not have the model's tensors.
    """

    def discover(model: nn.Module) -> SubnetworkMask:
        now = {bare_name(name): parameter for name, parameter in model.named_parameters()}
        packed: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
        with open_checkpoint(source) as checkpoint:
            for name, entry in checkpoint.entries.items():
                parameter = now.pop(bare_name(name), None)
                if parameter is None or entry.dtype not in FLOAT_DTYPES:
                    continue
                if entry.shape != tuple(parameter.shape):
                    raise CheckpointError(f"{source}: tensor {name!r} has shape {entry.shape}, the model's another")
                before = prepare(checkpoint.read(name), entry.dtype, "bf16")
                words = parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
                delta = np.empty(entry.size)
                delta_float64(before, words.view(np.uint16).reshape(-1), delta)
                tau = round_threshold(threshold, "bf16", entry.dtype)
                packed[name] = (entry.shape, np.packbits(np.abs(delta) > tau))
            if now:
                raise CheckpointError(f"{source}: has no tensor {next(iter(now))!r} of the model; give its source")
            content = source_hash(checkpoint)
        return SubnetworkMask.from_packed(packed, rule="visible, found in training", source_hash=content)

    return discover


def _calling_trainer() -> Trainer:
    """The Trainer whose constructor is calling: it hands its callbacks everything but itself."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    raise ConfigError("hand SubnetworkCallback to a Trainer's constructor (callbacks=[...]), not to add_callback")
