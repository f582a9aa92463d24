"""Masked training at the cost of the mask: compact gradients, masters and optimizer state (issue 13).

A hook on each parameter gathers the masked entries of its gradient into a float32 buffer and frees the dense gradient,
at once or with some others', so that no more than about a layer's lives. The optimizer, torch's own, updates one small
float32 tensor each, which holds the masked weights and is written back after each step; everything off the mask keeps
its bits. On a CPU compiled loops do the gathering and writing back (`kernels`), and AdamW as a whole (`adamw`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deltalens.errors import ConfigError
from deltalens.subnetwork.coordinates import CompactTensor, Restriction, find_parameters, mover
from deltalens.subnetwork.distributed import (
    Groups,
    average_over_ranks,
    hand_over_reduction,
    local_tensor,
    ranks,
    shard_groups,
    sum_over_shards,
)

__all__ = ["CompactOptimizer"]

TOGETHER = 16 << 20  # bytes of dense gradients, about a small model's layer, that wait to be gathered by all threads


@dataclass(slots=True)
class Buffer:
    """Compact gradients of the tensors of one device and dtype, in one piece; `groups` is None for whole tensors."""

    flat: Tensor
    tensors: list[CompactTensor]
    groups: Groups | None


class CompactOptimizer(torch.optim.Optimizer):
    """Mixin before one of torch's optimizers: it then trains only what a mask (or a projection) allows.

    Use as any torch optimizer: backward as often as you like, then `step`. The model's `.grad` are always None, so
    clip with `max_grad_norm` or `clip_grad_norm` rather than with torch's function. A step uses up the gradients.
    Under DDP hand in the wrapped model; under FSDP2 make the optimizer after `fully_shard`.

    Attributes:
        tensors: the trained part of each parameter.
        grad_norm: global norm before clipping, at the last `clip_grad_norm`; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Restriction,
        *,
        no_decay: Collection[str] = (),
        max_grad_norm: float | None = None,
        process_group: Any = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            model: its parameters that `mask` does not train no longer ask for gradients.
            mask: what is trained.
            no_decay: names (the model's) of parameters without weight decay.
            max_grad_norm: clip to this global norm in every step.
            process_group: the ranks among which whole (not sharded) parameters are replicated; None is the default.
            settings: of the optimizer in torch: `lr`, `weight_decay`, …

        Raises:
            ConfigError: model and mask do not fit.
        """
        self.process_group = hand_over_reduction(model) or process_group
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.tensors: list[CompactTensor] = []
        self._no_decay = frozenset(no_decay)
        self._buffers: list[Buffer] = []
        self._waiting: dict[CompactTensor, Tensor] = {}  # dense gradients that are still to be gathered
        self._waiting_bytes = 0
        self._reduced = False
        self._hooks: list[Any] = []
        groups = self._attach(mask)
        super().__init__(
            [{"params": params, **({} if decay else {"weight_decay": 0.0})} for decay, params in groups],
            **settings,
        )

    def _attach(self, mask: Restriction) -> list[tuple[bool, list[nn.Parameter]]]:
        """Hook every trained parameter, freeze the others; the compact parameters with and without decay."""
        found = find_parameters(self.model, mask)
        made = [(CompactTensor(one, mask), one) for one in found if one.own is not None]
        self.detach()
        self.tensors = []
        groups: list[tuple[bool, list[nn.Parameter]]] = [(True, [])]
        if self._no_decay:
            groups.append((False, []))
        for one in found:
            one.parameter.requires_grad_(one.own is not None)
            one.parameter.grad = None
        for decays, params in groups:
            for tensor, one in made:
                if (one.name not in self._no_decay) == decays:
                    self.tensors.append(tensor)
                    params.append(tensor.values)
                    hook = partial(self._collect, tensor)
                    self._hooks.append(one.parameter.register_post_accumulate_grad_hook(hook))
        self._buffers, self._reduced = [], False
        self._forget_waiting()
        return groups

    def detach(self) -> None:
        """Take the hooks off; gradients stay in the parameters again. `requires_grad` stays as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # --- gradients ---------------------------------------------------------------------------------------------------

    def _collect(self, tensor: CompactTensor, parameter: Tensor) -> None:
        if self._reduced:
            raise ConfigError("a gradient came after the ranks' were averaged; clip after the last backward of a step")
        whole, parameter.grad = parameter.grad, None
        assert whole is not None
        gradient = local_tensor(whole)
        if not self._buffers or tensor.grad.device != gradient.device:
            self._allocate()
        if not tensor.may_wait(gradient) or not gradient.is_contiguous():
            tensor.collect(gradient)
            return
        if tensor in self._waiting:
            self._gather_waiting()
        self._waiting[tensor] = gradient
        self._waiting_bytes += gradient.nbytes
        # To start threads for each gradient takes as long as gathering it; one thread finds it in its cache at once.
        if torch.get_num_threads() == 1 or self._waiting_bytes >= TOGETHER:
            self._gather_waiting()

    def _gather_waiting(self) -> None:
        if self._waiting:
            kernels = next(iter(self._waiting)).kernels
            kernels.gather([tensor.collecting(gradient) for tensor, gradient in self._waiting.items()])
            self._forget_waiting()

    def _forget_waiting(self) -> None:
        self._waiting, self._waiting_bytes = {}, 0

    def _allocate(self) -> None:
        """One buffer a device and dtype, at the first gradient: by then the model is where it stays."""
        kinds: dict[tuple[Any, ...], list[CompactTensor]] = {}
        for tensor in self.tensors:
            device = tensor.weights.device
            tensor.place(device)
            kinds.setdefault((device, tensor.dtype, shard_groups(tensor.parameter)), []).append(tensor)
        self._buffers = []
        for (device, dtype, groups), tensors in kinds.items():
            flat = torch.zeros(sum(tensor.count for tensor in tensors), dtype=dtype, device=device)
            for tensor, view in zip(tensors, flat.split([tensor.count for tensor in tensors]), strict=True):
                tensor.hold(view)
            self._buffers.append(Buffer(flat, tensors, groups))

    def _reduce(self) -> None:
        """Make the buffers whole: zeros where no gradient came, and the average over the ranks."""
        self._gather_waiting()
        if self._reduced:
            return
        if not self._buffers:
            self._allocate()
        for buffer in self._buffers:
            for tensor in buffer.tensors:
                if not tensor.filled:
                    tensor.grad.zero_()
            if buffer.groups is None and ranks(self.process_group) > 1:
                filled = average_over_ranks(buffer.flat, [t.filled for t in buffer.tensors], self.process_group)
                for tensor, now in zip(buffer.tensors, filled, strict=True):
                    tensor.filled = now
                self._reduced = True

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the compact gradients so that their global norm (over all ranks) is at most `max_norm`.

        As `torch.nn.utils.clip_grad_norm_`. Call it after a step's last backward, on all ranks; `inf` only measures.

        Returns:
            The norm before clipping, float32, 0-dim.
        """
        self._reduce()
        squares = []
        for buffer in self._buffers:
            square = torch.linalg.vector_norm(buffer.flat).square()
            squares.append(square if buffer.groups is None else sum_over_shards(square, buffer.groups))
        norm = torch.stack([square.to(squares[0]) for square in squares]).sum().sqrt()
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for buffer in self._buffers:
            buffer.flat.mul_(scale.to(buffer.flat))
        self.grad_norm = norm
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip where asked to, update the trained coordinates, write them back, and forget the gradients.

        A parameter that got no gradient on any rank stays as it is, as in torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.max_grad_norm is None:
            self._reduce()
        else:
            self.clip_grad_norm(self.max_grad_norm)
        moving = [tensor for tensor in self.tensors if tensor.filled and tensor.count]
        self._update(moving)
        self.zero_grad()
        return loss

    def _update(self, moving: list[CompactTensor]) -> None:
        """Update these tensors' weights by their gradients, which are whole."""
        for tensor in moving:
            tensor.load()
            tensor.values.grad = tensor.grad
        # torch wraps `step` to run step hooks and to profile; this class's own is wrapped already.
        inspect.unwrap(super().step.__func__)(self)  # type: ignore[attr-defined]
        for tensor in moving:
            tensor.values.grad = None
            tensor.store()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the accumulated gradients."""
        self._reduced = False
        self._forget_waiting()
        for tensor in self.tensors:
            tensor.filled = False
            tensor.parameter.grad = None

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's, and for each tensor its name, its positions as packed bits, and its float32 master if it has one.

        Tensors and plain values only, so `torch.load(weights_only=True)` reads it. Under FSDP2 it is this rank's.
        """
        saved = super().state_dict()
        saved["compact"] = [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "positions": tensor.packed(),
                "master": tensor.values.detach() if tensor.has_master and tensor.values.numel() else None,
            }
            for tensor in self.tensors
        ]
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. Where the mask was another, coordinates in both keep their state (and master).

        New coordinates start at zero, with the weights as they are. A tensor's step count is kept: a new coordinate in
        a tensor that has been trained gets no bias correction of its own.

        Raises:
            ConfigError: it is another optimizer's, or of a model (or shard) of other shapes.
        """
        if "compact" not in state_dict or len(state_dict["param_groups"]) != len(self.param_groups):
            raise ConfigError("the optimizer state was saved by another optimizer; resume with the one that saved it")
        before = {one["name"]: (number, one) for number, one in enumerate(state_dict["compact"])}
        state, number = {}, 0
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group, ours in zip(groups, self.param_groups, strict=True):
            group["params"] = list(range(number, number + len(ours["params"])))
            number += len(ours["params"])
        for number, tensor in enumerate(self.tensors):
            tensor.place(tensor.weights.device)
            tensor.values.data = tensor.nothing(tensor.values.device)
            if tensor.name not in before:
                continue
            place, old = before[tensor.name]
            if tuple(old["shape"]) != tensor.shape:
                raise ConfigError(f"{tensor.name}: the saved state is of shape {old['shape']}, not {tensor.shape}")
            move = mover(old, tensor)
            if place in state_dict["state"]:
                state[number] = {
                    key: (move(value) if value.ndim else value.clone()) if isinstance(value, Tensor) else value
                    for key, value in state_dict["state"][place].items()
                }
            if old["master"] is not None and tensor.has_master:
                tensor.load()
                tensor.values.data = move(old["master"], tensor.values.data)
        super().load_state_dict({"state": state, "param_groups": groups})

    def change_mask(self, mask: Restriction) -> None:
        """Go on with another mask: see `load_state_dict` for what becomes of the state. Call it after a step.

        Coordinates that leave the mask keep the weights that they have.

        Raises:
            ConfigError: model and mask do not fit, or gradients have been accumulated that no step has used.
        """
        if self._waiting or any(tensor.filled for tensor in self.tensors):
            raise ConfigError("change the mask after a step, not between a backward and its step")
        saved = self.state_dict()
        groups = self._attach(mask)
        for group, (_, params) in zip(self.param_groups, groups, strict=True):
            group["params"] = params
        self.state.clear()
        self.load_state_dict(saved)

    # --- what it holds -----------------------------------------------------------------------------------------------

    def held_bytes(self) -> dict[str, int]:
        """Bytes held on this rank: `gradients`, `state`, `masters` (copies where weights are float32 too), and
        `indices` (with a projection's bases).
        """
        kept = [value for state in self.state.values() for value in state.values() if isinstance(value, Tensor)]
        indices = [t for tensor in self.tensors for t in (tensor.index, tensor.basis) if t is not None]
        return {
            "gradients": sum(held.nbytes for held in (*(b.flat for b in self._buffers), *self._waiting.values())),
            "state": sum(value.nbytes for value in kept),
            "masters": sum(tensor.copied_bytes for tensor in self.tensors),
            "indices": sum(index.nbytes for index in indices),
        }

    def diagnostics(self) -> dict[str, float | None]:
        """Before a step: `momentum_gradient_cosine`, cosine of the first moment and the gradient that comes; and
        `rms_variation`, standard deviation of √(second moment) over its mean. Over trained coordinates of this rank;
        None where there is no such moment yet.
        """
        self._reduce()
        dot = momentum = gradient = roots = squares = 0.0
        count = 0
        for tensor in self.tensors:
            state = self.state.get(tensor.values, {})
            first = state.get("exp_avg", state.get("momentum_buffer"))
            second = state.get("exp_avg_sq", state.get("square_avg"))
            if tensor.filled and first is not None:
                dot += float((first * tensor.grad).sum())
                momentum += float(first.square().sum())
                gradient += float(tensor.grad.square().sum())
            if second is not None:
                roots, squares = roots + float(second.sqrt().sum()), squares + float(second.sum())
                count += second.numel()
        mean = roots / count if count else 0.0
        return {
            "momentum_gradient_cosine": dot / sqrt(momentum * gradient) if momentum and gradient else None,
            "rms_variation": sqrt(max(0.0, squares / count - mean**2)) / mean if mean else None,
        }
