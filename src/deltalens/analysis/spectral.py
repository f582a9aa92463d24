"""The spectral columns of one matrix: spectrum of Δ, projections, rotations, principal coverages.

What needs the source's factorisation lives here, so that it is made once a matrix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from deltalens.analysis.cache import SourceCache
from deltalens.analysis.null_draws import permutation_columns, simulated_null
from deltalens.analysis.settings import KINDS, Settings, mask_shares, mask_suffix, ratio_suffix
from deltalens.metrics import random_values
from deltalens.metrics.alignment import (
    DeltaPass,
    delta_pass,
    delta_pass_and_gram,
    principal_sines,
    projections,
    spectral_shift,
)
from deltalens.metrics.blocks import Blocks, at_hand, delta_blocks, is_tall, value_blocks
from deltalens.metrics.coordinates import Coordinates, low_magnitude_coverage, measure_coordinates
from deltalens.metrics.lapack import SymmetricEigen
from deltalens.metrics.masks import MaskSpec, MaskSums, pack_updates
from deltalens.metrics.members import WORD_COUNT, PrincipalMembers, find_members
from deltalens.metrics.rounding_null import RoundingNull, excess
from deltalens.metrics.spectrum import (
    TOP_ENERGIES,
    Factorisation,
    factorise,
    product_singular_values,
    singular_values,
    spectrum_metrics,
)
from deltalens.metrics.values import word_values

__all__ = ["SpectralColumns"]


class SpectralColumns:
    """The spectral columns of one matrix; holds the source's factorisation while they are made."""

    mode = "exact"
    sines = staticmethod(principal_sines)
    stream: tuple[int, ...] = ()  # sets the draws of one checkpoint apart from another's

    def __init__(
        self,
        before: np.ndarray,
        after: np.ndarray,
        coordinates: Coordinates,
        tau: float,
        nulls: tuple[RoundingNull | None, RoundingNull | None],
        settings: Settings,
        low_rank: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.low_rank = low_rank
        self.before, self.after = before, after
        self.c, self.tau, self.nulls, self.settings = coordinates, tau, nulls, settings
        self.length, self.width = max(before.shape), min(before.shape)
        self.ranks = [max(1, int(ratio * self.width + 1e-9)) for ratio in settings.ratios]
        self.masks = [
            (MaskSpec(rank, ratio), ratio_suffix(ratio))
            for rank, ratio in zip(self.ranks, settings.ratios, strict=True)
        ]
        if settings.mask_rank:
            rank = min(settings.mask_rank, self.width)
            self.masks.append((MaskSpec(rank, settings.mask_share), mask_suffix(settings)))
            self.masks.sort(key=lambda item: item[0].rank)
        self.k = max(mask.rank for mask, _ in self.masks)
        self.spectra: dict[str, np.ndarray] = {}
        self.source: Factorisation  # set by `take_source` or `share_source`
        self.cache: SourceCache | None = None  # for this matrix
        self._members: PrincipalMembers | None = None  # of the source, made when first asked for

    def factorise_source(self) -> Factorisation:
        return self._factorise(self.before)

    def take_source(self, cache: SourceCache | None = None) -> None:
        """Factorise the source, or have it from a cache, which is then asked for its masks as well."""
        self.cache = cache
        self.source = self.factorise_source() if cache is None else cache.factorisation(self.factorise_source)

    def share_source(self, other: SpectralColumns) -> None:
        """Take over what another checkpoint's columns made of the same source."""
        self.source, self._members, self.cache = other.source, other._members, other.cache

    def _factorise(self, values: np.ndarray) -> Factorisation:
        blocks = at_hand(partial(value_blocks, values), values.shape)
        return factorise(blocks, self.length, self.width, self.k)

    def _delta_pass(self, after: np.ndarray) -> DeltaPass:
        return delta_pass(partial(delta_blocks, self.before, after), self.source)

    def _update(self, after: np.ndarray) -> tuple[np.ndarray, DeltaPass]:
        """Every singular value of after − before, and its image in the source's bases, from one pass over it."""
        blocks = at_hand(partial(delta_blocks, self.before, after), self.before.shape)
        passed, products = delta_pass_and_gram(blocks, self.source)
        eigen = SymmetricEigen(products)
        del products  # so that it goes when `eigen` lets go of it
        return self._delta_values(after, blocks, eigen), passed

    def _delta_values(self, after: np.ndarray, blocks: Blocks, eigen: SymmetricEigen) -> np.ndarray:
        """Singular values of after − before from its blocks and its Gram matrix."""
        return singular_values(blocks, self.length, self.width, eigen)

    def columns(self) -> dict[str, Any]:
        row: dict[str, Any] = {"spectrum_mode": self.mode}
        row |= self._delta_columns()
        row |= self._rotation_columns()
        if self.settings.permutations and self.c.delta_energy > 0:
            row |= permutation_columns(
                self.before, self.after, self.source, self.sines, self.c.delta_energy, self.ranks, self.settings, row
            )
        row |= self._coverage_columns()
        return row

    def _delta_columns(self) -> dict[str, Any]:
        """Spectrum of Δ and its projections."""
        passed: DeltaPass | None
        if self.c.delta_energy == 0:
            values, passed = np.zeros(self.width), None
        elif self.low_rank is not None:
            values, passed = product_singular_values(*self.low_rank), self._delta_pass(self.after)
        else:
            values, passed = self._update(self.after)
        self.spectra["delta"] = values
        return {**spectrum_metrics(values), **self._chance_columns(), **self._projection_columns(passed)}

    def _chance_columns(self) -> dict[str, Any]:
        m, n = self.before.shape
        row: dict[str, Any] = {"stable_rank_random": random_values.stable_rank_random(m, n)}
        for k in TOP_ENERGIES:
            row[f"top{k}_energy_random"] = random_values.top_energy_random(m, n, min(k, self.width))
        return row

    def _projection_columns(self, passed: DeltaPass | None) -> dict[str, Any]:
        """Projections and their random values, then the columns of the simulated null."""
        m, n = self.before.shape
        row: dict[str, Any] = {}
        draws = self._simulated()
        for k, ratio in zip(self.ranks, self.settings.ratios, strict=True):
            suffix = ratio_suffix(ratio)
            joint, left, right = self._projections(passed, self.c.delta_energy, k)
            for name, value, chance in (
                ("principal", joint, (k / m) * (k / n)),
                ("left", left, k / m),
                ("right", right, k / n),
            ):
                row[f"{name}_projection_{suffix}"] = value
                row[f"{name}_projection_{suffix}_random"] = chance
        return row | draws

    def _projections(
        self, passed: DeltaPass | None, energy: float, k: int
    ) -> tuple[float | None, float | None, float | None]:
        """(joint, left, right); None for a zero update."""
        if passed is None:
            return None, None, None
        joint, long, short = projections(passed, energy, k)
        return (joint, long, short) if is_tall(self.before.shape) else (joint, short, long)

    def _simulated(self) -> dict[str, Any]:
        null = self.nulls[1]
        if not self.settings.null_draws or null is None or self.before.dtype != np.uint16:
            return {}
        return simulated_null(self.before, null.scale, self._update, self.ranks, self.settings, self.stream)

    def _rotation_columns(self) -> dict[str, Any]:
        trained = self._factorise(self.after)
        self.spectra["source"], self.spectra["trained"] = self.source.values, trained.values
        row: dict[str, Any] = {"spectral_shift": spectral_shift(self.source.values, trained.values)}
        defined = self.c.source_energy > 0
        long = self.sines(self.source.long, trained.long, self.ranks)
        short = self.sines(self.source.short, trained.short, self.ranks)
        left, right = (long, short) if is_tall(self.before.shape) else (short, long)
        for i, ratio in enumerate(self.settings.ratios):
            row[f"rotation_{ratio_suffix(ratio)}"] = left[i] if defined else None
            row[f"rotation_right_{ratio_suffix(ratio)}"] = right[i] if defined else None
        return row

    @property
    def members(self) -> PrincipalMembers:
        """Of the source's principal masks."""
        if self._members is None:
            masks = [mask for mask, _ in self.masks]
            find = partial(find_members, self.source, self.before, masks)
            self._members = find() if self.cache is None else self.cache.members(masks, find)
        return self._members

    def _packed(self) -> tuple[np.ndarray, np.ndarray]:
        """The visible and the nonzero updates, packed."""
        return pack_updates(self.before, self.after, self.tau)

    def _coverage_columns(self) -> dict[str, Any]:
        """Principal coverage of the visible and nonzero updates, its random value, null and excess."""
        counts = (self.c.visible, self.c.nonzero)
        sums = self._principal_sums()
        row: dict[str, Any] = {}
        for (_, suffix), total in zip(self.masks, sums, strict=True):
            for i, (kind, null) in enumerate(zip(KINDS, self.nulls, strict=True)):
                seen = float(total.sums[i]) / counts[i] if counts[i] else None
                expected = None if null is None else float(total.sums[2 + i]) / counts[i]
                name = f"principal_coverage_{suffix}{kind}"
                row[name] = seen
                row[f"{name}_random"] = total.entries / self.c.size
                row[f"{name}_null"] = expected
                row[f"{name}_excess"] = excess(seen, expected)
        return row

    def _principal_sums(self) -> list[MaskSums]:
        """For each mask: visible updates, nonzero updates, and Σ P over it for both nulls (0 without one)."""
        without = np.zeros(WORD_COUNT)
        return self.members.sums(self._packed(), [without if null is None else null.table() for null in self.nulls])

    def _master_sums(self, before: np.ndarray, master: np.ndarray, tau: float) -> list[MaskSums]:
        """For each mask: the updates of the float32 master that it holds."""
        return self.members.sums(pack_updates(before, master, tau)[:1])

    def master_columns(self, master: np.ndarray | None) -> dict[str, Any]:
        """Both coverages of the float32 update that rounding has not touched, |W_master − W| > τ."""
        if master is None:
            return {}
        before = word_values(self.before) if self.before.dtype == np.uint16 else self.before.astype(np.float32)
        delta = np.abs(master - before) > np.float32(self.settings.threshold)
        count = int(delta.sum())
        if not count:
            return {}
        return _master_coverages(self, before, master, count)


def _master_coverages(spectral: SpectralColumns, before: np.ndarray, master: np.ndarray, count: int) -> dict[str, Any]:
    tau = float(np.float32(spectral.settings.threshold))
    c = measure_coordinates(
        before.reshape(-1), master.reshape(-1), threshold=tau, ratios=mask_shares(spectral.settings)
    )
    if c.nonfinite:
        return {}
    sums = spectral._master_sums(before, master, tau)
    row: dict[str, Any] = {}
    for (mask, suffix), total in zip(spectral.masks, sums, strict=True):
        row[f"principal_coverage_{suffix}_master"] = float(total.sums[0]) / count
        row[f"low_magnitude_coverage_{suffix}_master"] = low_magnitude_coverage(c, mask.share)[0]
    return row
