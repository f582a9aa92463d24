"""A small model, masks of given densities, and the dense twin of masked training: torch's optimizer on masked gradients
with the other coordinates put back after each step.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from deltalens import SubnetworkMask
from deltalens.subnetwork.compact import CompactOptimizer

STEPS = 50


class Small(nn.Module):
    """A vector, a scale of one entry, wide and tall matrices, and a tied weight used twice."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 17)
        self.norm = nn.LayerNorm(17)
        self.down = nn.Linear(17, 6, bias=False)
        self.frozen = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.normal_(self.embed.weight, std=0.3)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.frozen(self.embed(tokens))
        hidden = self.down(torch.tanh(self.norm(self.up(hidden)))) * self.scale
        return hidden @ self.embed.weight.T


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(seed)
    return Small(dtype)


def random_mask(model: nn.Module, density: float, seed: int = 0, without: str = "frozen") -> SubnetworkMask:
    """Random bits; nothing in tensors whose name starts with `without`, everything in `down`."""
    rng = np.random.default_rng(seed)
    dense = {}
    for name, parameter in model.named_parameters():
        bits = rng.random(tuple(parameter.shape)) < density
        bits |= name == "down.weight"
        dense[name] = bits & (not without or not name.startswith(without))
    return SubnetworkMask.from_dense(dense, rule="random", source_hash="0" * 64)


def batch(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(11, (size,), generator=generator), torch.randint(11, (size,), generator=generator)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    tokens, targets = data
    return nn.functional.cross_entropy(model(tokens).float(), targets)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def dense_training(
    model: nn.Module,
    mask: SubnetworkMask,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    steps: int = STEPS,
    accumulate: int = 2,
    max_norm: float = 0.3,
) -> list[float]:
    """The paper's way; returns the global norms before clipping."""
    bits = {name: torch.from_numpy(mask.dense(name)) for name in mask.names()}
    start = weights(model)
    optimizer = make(list(model.parameters()))
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            (loss_of(model, batch(step * accumulate + part)) / accumulate).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(bits[name])
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.where(bits[name], parameter, start[name]))
    return norms


def compact_training(
    model: nn.Module,
    optimizer: CompactOptimizer,
    *,
    steps: range | int = STEPS,
    accumulate: int = 2,
) -> list[float]:
    """The same with a compact optimizer that clips by itself."""
    norms = []
    for step in range(steps) if isinstance(steps, int) else steps:
        for part in range(accumulate):
            (loss_of(model, batch(step * accumulate + part)) / accumulate).backward()
            assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return [float(norm) for norm in norms if norm is not None]


def off_mask_is_untouched(model: nn.Module, before: Mapping[str, Tensor], mask: SubnetworkMask) -> bool:
    """Whether every coordinate off the mask has the bits that it had."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}
    for name, parameter in model.named_parameters():
        off = torch.from_numpy(~mask.dense(name))
        words = integers[parameter.dtype]
        if not torch.equal(parameter.detach().view(words)[off], before[name].view(words)[off]):
            return False
    return True


def on_mask_has_moved(model: nn.Module, before: Mapping[str, Tensor], mask: SubnetworkMask) -> float:
    """Share of masked coordinates that differ from before."""
    moved = [
        (parameter.detach() != before[name])[torch.from_numpy(mask.dense(name))]
        for name, parameter in model.named_parameters()
    ]
    return float(torch.cat(moved).float().mean())
