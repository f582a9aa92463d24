"""What the geometry callback adds to the analysis' own metrics: leading directions of an update, optimizer moments.

Everything else that is logged comes from `analysis.pair.measure`. Pure functions on arrays and on torch tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from deltalens.metrics import random_values
from deltalens.metrics.overlap import SUBSPACE
from deltalens.metrics.randomised import leading_eigenpairs
from deltalens.metrics.single_precision import (
    BLOCK_ELEMENTS,
    SingleBlocks,
    long_vectors,
    power_of_two_scale,
    single_delta_blocks,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "DIRECTIONS",
    "Leading",
    "chance_columns",
    "leading_columns",
    "leading_directions",
    "moment_diagnostics",
    "moment_sums",
]

DIRECTIONS = SUBSPACE
# Applications of ΔᵀΔ to a block of 24. The energy of the 16 leading directions is then within 3e-4 of LAPACK's in each
# of the 211 matrices of a 135M model's real update (docs/callback.md).
DEPTH = 4
RESOLVED = 1e-3  # σ_k/σ₁ below which float32 leaves the k-th direction to chance
CHUNK = 1 << 22  # coordinates of the optimizer's state that are looked at at once


@dataclass(frozen=True, slots=True)
class Leading:
    """The top of Δ's singular value decomposition.

    Attributes:
        values: (k,) float64, descending.
        right: (n, k) float32, orthonormal right singular vectors; None where Δ has fewer than k directions.
    """

    values: np.ndarray
    right: np.ndarray | None


class _DeltaGram:
    """ΔᵀΔ on the shorter side, applied block by block and never formed."""

    def __init__(self, blocks: SingleBlocks, width: int) -> None:
        self.blocks, self.shape = blocks, (width, width)

    def __matmul__(self, block: np.ndarray) -> np.ndarray:
        out = np.zeros((self.shape[0], block.shape[1]), np.float32)
        for _, delta in self.blocks():
            out += delta.T @ (delta @ block)
        return out


def leading_directions(before: np.ndarray, after: np.ndarray, energy: float, *, seed: int = 0) -> Leading:
    """The 16 (or min(m, n)) leading singular values and right singular vectors of Δ = after − before.

    Args:
        before, after: (m, n) matrices prepared by `metrics.values.prepare`.
        energy: ‖Δ‖_F², not 0.
        seed: of the starting block; the same arguments give the same result.
    """
    (m, n), k = before.shape, min(DIRECTIONS, *before.shape)
    scale = power_of_two_scale(energy, before.size)
    blocks: SingleBlocks = partial(single_delta_blocks, before, after, scale)
    if before.size <= BLOCK_ELEMENTS:  # one block: made once rather than at every application
        held = list(blocks())
        blocks = partial(iter, held)
    eigenvalues, short = leading_eigenpairs(_DeltaGram(blocks, min(m, n)), k, seed, depth=DEPTH)
    values = np.sqrt(np.maximum(eigenvalues, 0))
    right = None
    if values[-1] > RESOLVED * values[0]:
        right = short if m >= n else long_vectors(blocks, short, values, n)
        right = np.linalg.qr(right)[0].astype(np.float32, copy=False)
    return Leading(values / scale, right)


def leading_columns(leading: Leading, energy: float) -> dict[str, float]:
    """`stable_rank` and `top16_energy` (METRICS.md) from the leading values and ‖Δ‖_F²."""
    squares = leading.values**2
    return {
        "stable_rank": energy / float(squares[0]),
        f"top{DIRECTIONS}_energy": min(1.0, float(squares.sum()) / energy),
    }


def chance_columns(shape: tuple[int, ...]) -> dict[str, float]:
    """What a Gaussian update of this shape (m, n) would show."""
    m, n = shape
    return {
        "stable_rank_random": random_values.stable_rank_random(m, n),
        f"top{DIRECTIONS}_energy_random": random_values.top_energy_random(m, n, min(DIRECTIONS, m, n)),
        f"sim{DIRECTIONS}_first_random": random_values.subspace_similarity_random(n, min(DIRECTIONS, m, n)),
    }


def moment_sums(
    parameters: Iterable[torch.Tensor], state: Mapping[torch.Tensor, Mapping[str, Any]], local: Callable[..., Any]
) -> torch.Tensor | None:
    """Sums over coordinates: m·g, ‖m‖², ‖g‖², Σ√v, Σv and their number; (6,) float64, None without parameters.

    Args:
        parameters: with their gradients. One without a gradient, or without moments, adds nothing.
        state: an optimizer's state: `exp_avg` m and `exp_avg_sq` v, as Adam and its kin keep them.
        local: gives this process's own part of a (possibly distributed) tensor, None where another process counts it.
    """
    import torch

    total = None
    with torch.no_grad():
        for parameter in parameters:
            if total is None:
                total = torch.zeros(6, dtype=torch.float64, device=parameter.device)
            moments = state.get(parameter) or {}
            if parameter.grad is None or not {"exp_avg", "exp_avg_sq"} <= moments.keys():
                continue
            parts = [local(t) for t in (moments["exp_avg"], parameter.grad, moments["exp_avg_sq"])]
            if parts[0] is None:
                continue
            flat = [part.detach().reshape(-1) for part in parts]
            for start in range(0, flat[0].numel(), CHUNK):
                m, g, v = (part[start : start + CHUNK].float() for part in flat)
                # A variance is a difference of these two sums: in float32 one of nearly equal v would be lost.
                wide = v.double()
                total[:3] += torch.stack([m.dot(g), m.dot(m), g.dot(g)]).to(total)
                total[3:5] += torch.stack([wide.sqrt().sum(), wide.sum()])
                total[5] += m.numel()
    return total


def moment_diagnostics(sums: Iterable[float]) -> dict[str, float | None]:
    """From the six sums of `moment_sums`.

    `momentum_gradient_cosine`: cosine of the first moment and the gradient. `rms_variation`: standard deviation of √v
    over coordinates divided by its mean. None where there are no moments yet.
    """
    dot, momentum, gradient, roots, squares, count = sums
    out: dict[str, float | None] = {"momentum_gradient_cosine": None, "rms_variation": None}
    if momentum > 0 and gradient > 0:
        out["momentum_gradient_cosine"] = dot / (momentum * gradient) ** 0.5
    if roots > 0:
        mean = roots / count
        out["rms_variation"] = max(squares / count - mean**2, 0.0) ** 0.5 / mean
    return out
