"""`--spectrum fast`: the spectral columns of one matrix from float32 Gram matrices and randomised methods.

One Gram matrix of W and one of Δ (each a single pass in float32) stand for the matrices from then on. What cannot be
had within 1 % that way (all small singular values, and differences between two factorisations) is None. Matrices
that are small, or that float32 cannot resolve, are measured as in exact mode.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from deltalens.analysis.settings import ratio_suffix
from deltalens.analysis.spectral import SpectralColumns
from deltalens.metrics.alignment import DeltaPass
from deltalens.metrics.blocks import delta_blocks, value_blocks
from deltalens.metrics.randomised import (
    RankEstimate,
    effective_rank_estimate,
    leading_eigenpairs,
    principal_subspace,
    relative_residual,
)
from deltalens.metrics.single_precision import (
    gram_single,
    long_vectors,
    power_of_two_scale,
    single_delta_blocks,
    single_delta_pass,
    single_value_blocks,
)
from deltalens.metrics.spectrum import (
    TOP_ENERGIES,
    Factorisation,
    factorise,
    product_singular_values,
    singular_values,
    spectrum_metrics,
)

__all__ = ["FastColumns"]

TOP = max(TOP_ENERGIES)
DIRECT_UP_TO = 640  # shorter side up to which LAPACK in float64 costs no more than the iterations
RESOLVED = 1e-5  # λ_k/λ₁ of the source below which float32 does not separate the wanted directions
CONVERGED = 0.05  # root mean square of the residuals beyond which the source is factorised after all
TOLERANCE = 0.01  # relative error of the effective rank beyond which Δ is factorised after all


class FastColumns(SpectralColumns):
    """The spectral columns of one matrix in fast mode."""

    mode = "fast"
    leading: np.ndarray | None = None  # leading vectors of Δ's shorter side where they were needed

    def factorise_source(self) -> Factorisation:
        """The leading factors, float32; `values` holds only as many as there are vectors."""
        scale = power_of_two_scale(self.c.source_energy, self.c.size)
        if self.width > DIRECT_UP_TO:
            blocks = partial(single_value_blocks, self.before, scale)
            eigenvalues, short, residuals = principal_subspace(
                gram_single(blocks, self.width), self.k, self.settings.seed
            )
            converged = relative_residual(residuals, eigenvalues) < CONVERGED
            if converged and eigenvalues[-1] > RESOLVED * eigenvalues[0]:
                values = np.sqrt(eigenvalues)
                long = long_vectors(blocks, short, values, self.length)
                return Factorisation(long, values / scale, short, residuals / scale**4)
        exact = factorise(partial(value_blocks, self.before), self.length, self.width, self.k)
        return Factorisation(exact.long.astype(np.float32), exact.values[: self.k], exact.short.astype(np.float32))

    def _delta_columns(self) -> dict[str, Any]:
        scale = power_of_two_scale(self.c.delta_energy, self.c.size)
        # `passed` is of Δ · scale: so is the energy that its projections are shares of.
        self.scaled_energy = self.c.delta_energy * scale**2
        passed: DeltaPass | None = None
        top, rank = np.zeros(min(TOP, self.width)), None
        if self.c.delta_energy > 0:
            blocks = partial(single_delta_blocks, self.before, self.after, scale)
            gram = gram_single(blocks, self.width)
            passed = single_delta_pass(blocks, gram, self.source)
            top, rank = self._spectrum(gram, scale)
        self.spectra["delta"] = top
        row = self._spectrum_columns(top, rank)
        return {**row, **self._chance_columns(), **self._projection_columns(passed), **self._residual_columns()}

    def _projections(
        self, passed: DeltaPass | None, energy: float, k: int
    ) -> tuple[float | None, float | None, float | None]:
        return super()._projections(passed, self.scaled_energy, k)

    def _spectrum(self, gram: np.ndarray, scale: float) -> tuple[np.ndarray, RankEstimate]:
        """The leading singular values of Δ, which is not zero (float64, at most 64), and its effective rank."""
        if self.low_rank is None and self.width > DIRECT_UP_TO:
            eigenvalues, vectors = leading_eigenpairs(gram, TOP, self.settings.seed)
            self.leading = vectors
            rank = effective_rank_estimate(gram, eigenvalues, vectors, self.settings.seed)
            if rank.error < TOLERANCE * rank.value:
                return np.sqrt(np.maximum(eigenvalues, 0)) / scale, rank
        if self.low_rank is not None:
            values = product_singular_values(*self.low_rank)
        else:
            values = singular_values(partial(delta_blocks, self.before, self.after), self.length, self.width)
        exact = spectrum_metrics(values)["effective_rank"]
        assert exact is not None
        return values[:TOP], RankEstimate(exact, 0.0)

    def _spectrum_columns(self, top: np.ndarray, rank: RankEstimate | None) -> dict[str, Any]:
        """The columns of `spectrum_metrics`, with None for what needs every singular value."""
        row: dict[str, Any] = dict.fromkeys(spectrum_metrics(np.ones(3)))
        row["spectral_norm"] = float(top[0])
        row["effective_rank_error"] = None
        if rank is not None:
            energy = self.c.delta_energy
            row |= {
                "stable_rank": energy / float(top[0]) ** 2,
                "effective_rank": rank.value,
                "effective_rank_error": rank.error,
            }
            for k in TOP_ENERGIES:
                row[f"top{k}_energy"] = min(1.0, float((top[:k] ** 2).sum()) / energy)
        return row

    def _residual_columns(self) -> dict[str, Any]:
        """‖WᵀW V_k − V_k Λ_k‖ / ‖Λ_k‖ for each ratio: 0 for an invariant subspace."""
        row = {}
        residuals = np.zeros(self.k) if self.source.residuals is None else self.source.residuals
        for k, ratio in zip(self.ranks, self.settings.ratios, strict=True):
            norm = float((self.source.values[:k] ** 4).sum())
            row[f"principal_residual_{ratio_suffix(ratio)}"] = (
                (float(residuals[:k].sum()) / norm) ** 0.5 if norm > 0 else None
            )
        return row

    def _rotation_columns(self) -> dict[str, Any]:
        self.spectra["source"] = self.source.values
        names = [f"{name}_{ratio_suffix(ratio)}" for ratio in self.settings.ratios for name in _ROTATIONS]
        return dict.fromkeys(("spectral_shift", *names))


_ROTATIONS = ("rotation", "rotation_right")
