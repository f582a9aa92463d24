"""Optimizers that train only a mask: torch's own arithmetic on compact tensors, Lion being ours (torch lacks it).

All take `(model, mask, *, no_decay, max_grad_norm, process_group, **settings)`, where the settings and their defaults
are torch's unless said otherwise. `weight_decay` acts on trained coordinates only: decoupled in AdamW, Lion and Muon,
added to the gradient in SGD and RMSprop, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deltalens.errors import ConfigError
from deltalens.subnetwork.compact import CompactOptimizer
from deltalens.subnetwork.coordinates import CompactTensor, Restriction
from deltalens.subnetwork.distributed import local_tensor

if TYPE_CHECKING:
    from deltalens.subnetwork.adamw import AdamW

__all__ = [
    "CompactAdamW",
    "CompactAdamWNoMomentum",
    "CompactLion",
    "CompactRMSprop",
    "CompactSGD",
    "CompactSGDMomentum",
    "Lion",
    "WholeMatrixMuon",
]


class CompactAdamW(CompactOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW` on a mask; fused unless `fused` or `foreach` is given.

    Fused on the CPU, a loop of our own updates float32 weights where they lie, and bfloat16 ones by way of their
    masters, as torch would but for rounding.
    """

    def __init__(self, model: nn.Module, mask: Restriction, **settings: Any) -> None:
        super().__init__(model, mask, **_fused(settings))
        self._loop: AdamW | None = None  # of the tensors of the last step

    def _update(self, moving: list[CompactTensor]) -> None:
        groups = {id(p): group for group in self.param_groups if _is_plain(group) for p in group["params"]}
        by_loop, updates, rest = [], [], []
        for tensor in moving:
            group = groups.get(id(tensor.values))
            weights: Tensor = tensor.parameter
            if isinstance(weights, DTensor):
                weights = local_tensor(weights)
            if group is None or tensor.kernels is None or weights.dtype not in (torch.float32, torch.bfloat16):
                rest.append(tensor)
                continue
            if tensor.has_master:
                tensor.load()
            state = self.state[tensor.values]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(tensor.grad) for _ in range(2))
            assert tensor.index is not None
            by_loop.append(tensor)
            master = tensor.values if tensor.has_master else None
            updates.append((weights, master, tensor.index, tensor.grad, state, group))
        if updates:
            if self._loop is None or not self._loop.serves(updates):
                from deltalens.subnetwork.adamw import AdamW, Update

                self._loop = AdamW([Update(*update) for update in updates])
            self._loop.step()
            for tensor in by_loop:
                if tensor.has_master:
                    tensor.stored()
        if rest:
            super()._update(rest)


class CompactAdamWNoMomentum(CompactAdamW):
    """AdamW with β₁ = 0: the second moment alone scales the gradient (the paper's "AdamW without momentum")."""

    def __init__(self, model: nn.Module, mask: Restriction, *, beta2: float = 0.999, **settings: Any) -> None:
        super().__init__(model, mask, betas=(0.0, beta2), **settings)


class CompactSGD(CompactOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` on a mask, without momentum unless given; fused unless `fused` or `foreach` is given."""

    def __init__(self, model: nn.Module, mask: Restriction, **settings: Any) -> None:
        super().__init__(model, mask, **_fused(settings))


class CompactSGDMomentum(CompactSGD):
    """`CompactSGD` with `momentum` 0.9."""

    def __init__(self, model: nn.Module, mask: Restriction, *, momentum: float = 0.9, **settings: Any) -> None:
        super().__init__(model, mask, momentum=momentum, **settings)


class CompactRMSprop(CompactOptimizer, torch.optim.RMSprop):
    """`torch.optim.RMSprop` on a mask."""


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum.

    p ← p − lr · (sign(β₁m + (1 − β₁)g) + λp), then m ← β₂m + (1 − β₂)g.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"Lion: lr {lr} and weight_decay {weight_decay} must be ≥ 0, betas {betas} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            momenta = [self.state[p]["exp_avg"] for p in params]
            updates = torch._foreach_lerp(momenta, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            if group["weight_decay"]:
                torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, grads, 1 - beta2)
        return loss


class CompactLion(CompactOptimizer, Lion):
    """`Lion` on a mask."""


class WholeMatrixMuon(CompactOptimizer, torch.optim.Muon):
    """`torch.optim.Muon`, for comparison with whole matrices: it orthogonalises a matrix's momentum, so half a matrix
    has no Muon. The mask must take every matrix whole or not at all; anything else must be off it.
    """

    def _attach(self, mask: Restriction) -> list[tuple[bool, list[nn.Parameter]]]:
        for name in mask.names():
            if mask.count(name) not in (0, mask.dense(name).size) or (mask.count(name) and len(mask.shape(name)) != 2):
                raise ConfigError(f"{name}: Muon trains whole matrices only; take all of a matrix, or nothing")
        groups = super()._attach(mask)
        if sharded := [tensor.name for tensor in self.tensors if tensor.size != tensor.parameter.numel()]:
            raise ConfigError(f"{sharded[0]}: Muon needs whole matrices, but this one is sharded; use DDP")
        return groups


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether a group asks for torch's fused AdamW and for none of its variants."""
    return group["fused"] and not (group["amsgrad"] or group["maximize"] or group["differentiable"])


def _fused(settings: dict[str, Any]) -> dict[str, Any]:
    return settings if "fused" in settings or "foreach" in settings else {**settings, "fused": True}
