"""One tensor pair in, one row out: the only place where the metrics meet.

`measure` reads both sides, and calls each metric once, sharing the source's factorisation. A row is a dict of plain
numbers; undefined values are None. Column names and their meaning: METRICS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from blake3 import blake3

from deltalens.analysis.cache import FactorisationCache
from deltalens.analysis.null_draws import simulated_null
from deltalens.analysis.settings import Settings, ratio_suffix
from deltalens.checkpoint.base import DTYPE_BYTES, Checkpoint
from deltalens.checkpoint.formats.peft import LoraSource
from deltalens.checkpoint.pairing import TensorPair
from deltalens.metrics import random_values
from deltalens.metrics.alignment import delta_pass, principal_sines, projections, spectral_shift
from deltalens.metrics.blocks import delta_blocks, is_tall, value_blocks
from deltalens.metrics.coordinates import Coordinates, low_magnitude_coverage, measure_coordinates
from deltalens.metrics.masks import MaskSpec, entry_codes, principal_mask_sums
from deltalens.metrics.rounding_null import RoundingNull, expected_low_magnitude_coverage, fine_histogram, fit
from deltalens.metrics.spectrum import (
    Factorisation,
    factorise,
    product_singular_values,
    singular_values,
    spectrum_metrics,
)
from deltalens.metrics.values import ceil_share, prepare, round_threshold, word_values

__all__ = ["Buffers", "Measured", "measure"]

KINDS = ("", "_nonzero")  # visible updates, and all that are not zero


@dataclass(slots=True)
class Measured:
    """A row, the spectra behind it (`delta`, `source`, `trained` → (d,) float64), and both content hashes."""

    row: dict[str, Any]
    spectra: dict[str, np.ndarray] = field(default_factory=dict)
    source_hash: str | None = None
    trained_hash: str | None = None


class Buffers:
    """Read buffers that one thread uses again and again: fresh memory costs more than the read itself."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def take(self, side: str, nbytes: int) -> np.ndarray:
        """A uint8 buffer of at least `nbytes` for `source` or `trained`; what it held before is lost."""
        if side not in self._held or self._held[side].size < nbytes:
            self._held.pop(side, None)
            self._held[side] = np.empty(nbytes, np.uint8)
        return self._held[side]


def measure(
    pair: TensorPair,
    source: Checkpoint,
    trained: Checkpoint,
    settings: Settings,
    master: Checkpoint | None = None,
    buffers: Buffers | None = None,
    cache: FactorisationCache | None = None,
) -> Measured:
    """Every metric of one tensor.

    Args:
        pair: which tensor, and where its bytes are.
        source, trained: the opened checkpoints.
        settings: what to compute.
        master: float32 weights of TRAINED before rounding, for the `…_master` coverages.
        buffers: the calling thread's read buffers.
        cache: factorisations of the source, taken from it and put into it.

    Raises:
        CheckpointError: a tensor's bytes cannot be read.
    """
    buffers = buffers or Buffers()
    raw_source = _read(source, pair.source_name, pair.source_start, pair, buffers, "source")
    raw_trained = _read(trained, pair.trained_name, pair.trained_start, pair, buffers, "trained")
    before = prepare(raw_source, pair.source_dtype, settings.compare)
    after = prepare(raw_trained, pair.trained_dtype, settings.compare)
    tau = round_threshold(settings.threshold, settings.compare, _finer(pair))
    coordinates = measure_coordinates(
        before, after, threshold=tau, stored=(raw_source, raw_trained), ratios=_shares(settings)
    )
    result = Measured(_identity(pair))
    if settings.spectrum != "none":
        result.source_hash, result.trained_hash = (
            blake3(raw_source.data).hexdigest(),
            blake3(raw_trained.data).hexdigest(),
        )
    row = result.row
    row |= _coordinate_columns(coordinates)
    if coordinates.nonfinite:
        return result
    nulls = _fit_nulls(pair, coordinates, tau, settings, raw_source)
    if not pair.is_matrix:
        return result
    row |= _low_magnitude_columns(coordinates, nulls, settings)
    if settings.spectrum == "none":
        return result
    shape = (pair.shape[0], pair.shape[1])
    left, right = before.reshape(shape), after.reshape(shape)
    spectral = _Spectral(left, right, coordinates, tau, nulls, settings, _low_rank(pair, trained, settings))
    if cache is not None:
        assert result.source_hash is not None
        spectral.source = cache.get(result.source_hash, shape, spectral.k, settings.compare, spectral.factorise_source)
    else:
        spectral.source = spectral.factorise_source()
    row |= spectral.columns()
    result.spectra = spectral.spectra
    if master is not None:
        row |= spectral.master_columns(_master_values(pair, master))
    return result


def _low_rank(pair: TensorPair, trained: Checkpoint, settings: Settings) -> tuple[np.ndarray, np.ndarray] | None:
    """L and R with L · R = Δ exactly, where TRAINED is a LoRA adapter and nothing has been rounded."""
    if settings.compare != "stored" or not isinstance(trained.tensors, LoraSource):
        return None
    factors = trained.tensors.factors(pair.trained_name)
    if factors is None:
        return None
    first = pair.trained_start // pair.shape[1]
    return factors[0][first : first + pair.shape[0]], factors[1]


def _read(checkpoint: Checkpoint, name: str, start: int, pair: TensorPair, buffers: Buffers, side: str) -> np.ndarray:
    nbytes = pair.count * DTYPE_BYTES[checkpoint.entries[name].dtype]
    return checkpoint.read(name, buffers.take(side, nbytes), start=start, count=pair.count)


def _finer(pair: TensorPair) -> str:
    return "F64" if "F64" in (pair.source_dtype, pair.trained_dtype) else pair.source_dtype


def _shares(settings: Settings) -> tuple[float, ...]:
    extra = (settings.mask_share,) if settings.mask_rank else ()
    return tuple(sorted({*settings.ratios, *extra}))


def _master_values(pair: TensorPair, master: Checkpoint) -> np.ndarray | None:
    name = next((n for n in (pair.trained_name, pair.source_name) if n in master.entries), None)
    if name is None or master.entries[name].size < pair.trained_start + pair.count:
        return None
    raw = master.read(name, start=pair.trained_start, count=pair.count)
    return prepare(raw, master.entries[name].dtype, "fp32").reshape(pair.shape)


def _identity(pair: TensorPair) -> dict[str, Any]:
    return {
        "name": pair.name,
        "layer": pair.layer,
        "role": pair.role,
        "module": pair.module,
        "shape": "x".join(map(str, pair.shape)),
        "parameters": pair.count,
        "source_dtype": pair.source_dtype,
        "trained_dtype": pair.trained_dtype,
    }


def _coordinate_columns(c: Coordinates) -> dict[str, Any]:
    size = c.size
    row: dict[str, Any] = {"nonfinite_count": c.nonfinite, "unchanged_bits": c.unchanged_bits / size}
    if c.nonfinite:
        return row
    row |= {
        "relative_norm": (c.delta_energy / c.source_energy) ** 0.5 if c.source_energy > 0 else None,
        "source_energy": c.source_energy,
        "delta_energy": c.delta_energy,
        "unchanged_count": c.unchanged,
        "unchanged_bits_count": c.unchanged_bits,
        "visible_count": c.visible,
        "nonzero_count": c.nonzero,
        "relative_sparse_count": c.relative_sparse,
        "unchanged_fraction": c.unchanged / size,
        "sparsity": (size - c.visible) / size,
        "relative_sparsity": c.relative_sparse / size,
    }
    for key, count in c.sparsity_at.items():
        row[f"sparsity_{key}_count"] = count
        row[f"sparsity_{key}"] = count / size
    for key, energy in c.top_energy.items():
        row[f"top_energy_{key}"] = energy / c.delta_energy if c.delta_energy > 0 else None
    return row


def _fit_nulls(
    pair: TensorPair, c: Coordinates, tau: float, settings: Settings, raw: np.ndarray
) -> tuple[RoundingNull | None, RoundingNull | None]:
    """The rounding null of the visible and of the nonzero updates."""
    grid = _grid(pair, settings)
    finer = grid == "bf16" and pair.source_dtype in ("F32", "F64")
    fine = fine_histogram(prepare(raw, pair.source_dtype, "fp32")) if finer else None
    return (
        fit(c.total_histogram, c.visible, tau, grid, fine=fine),
        fit(c.total_histogram, c.nonzero, 0.0, grid, fine=fine),
    )


def _grid(pair: TensorPair, settings: Settings) -> Literal["bf16", "fp16", "fp32"]:
    """The grid on which the trained weights were stored, as far as the comparison sees it."""
    if settings.compare == "stored":
        return {"BF16": "bf16", "F16": "fp16"}.get(pair.trained_dtype, "fp32")  # type: ignore[return-value]
    return "bf16" if settings.compare == "bf16" else "fp32"


def _excess(observed: float | None, null: float | None) -> float | None:
    return observed / null if observed is not None and null else None


def _low_magnitude_columns(
    c: Coordinates, nulls: tuple[RoundingNull | None, RoundingNull | None], settings: Settings
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    named = [(ratio, ratio_suffix(ratio)) for ratio in settings.ratios]
    if settings.mask_rank:
        named.append((settings.mask_share, _mask_suffix(settings)))
    for ratio, suffix in named:
        for kind, seen, null in zip(KINDS, low_magnitude_coverage(c, ratio), nulls, strict=True):
            expected = None if null is None else expected_low_magnitude_coverage(null, c.total_histogram, ratio)
            name = f"low_magnitude_coverage_{suffix}{kind}"
            row[name] = seen
            row[f"{name}_random"] = ceil_share(ratio, c.size) / c.size
            row[f"{name}_null"] = expected
            row[f"{name}_excess"] = _excess(seen, expected)
    return row


def _mask_suffix(settings: Settings) -> str:
    return f"rank{settings.mask_rank}_{ratio_suffix(settings.mask_share)}"


class _Spectral:
    """The spectral columns of one matrix; holds the source's factorisation while they are made."""

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
            self.masks.append((MaskSpec(rank, settings.mask_share), _mask_suffix(settings)))
            self.masks.sort(key=lambda item: item[0].rank)
        self.k = max(mask.rank for mask, _ in self.masks)
        self.spectra: dict[str, np.ndarray] = {}
        self.source: Factorisation  # set by `measure`, which may have it from a cache

    def factorise_source(self) -> Factorisation:
        return self._factorise(self.before)

    def _factorise(self, values: np.ndarray) -> Factorisation:
        return factorise(partial(value_blocks, values), self.length, self.width, self.k)

    def columns(self) -> dict[str, Any]:
        row = self._delta_columns()
        row |= self._rotation_columns()
        row |= self._coverage_columns(self._codes, KINDS, self.nulls)
        return row

    def _delta_columns(self) -> dict[str, Any]:
        """Spectrum of Δ and its projections, from one pass over Δ (a second where the Gram matrix is not enough)."""
        m, n = self.before.shape
        blocks = partial(delta_blocks, self.before, self.after)
        passed = delta_pass(blocks, self.width, self.source)
        if self.c.delta_energy == 0:
            values = np.zeros(self.width)
        elif self.low_rank is not None:
            values = product_singular_values(*self.low_rank)
        else:
            values = singular_values(blocks, self.length, self.width)
        self.spectra["delta"] = values
        row: dict[str, Any] = dict(spectrum_metrics(values))
        row["stable_rank_random"] = random_values.stable_rank_random(m, n)
        for k in (1, 2, 4, 8, 16, 32, 64):
            row[f"top{k}_energy_random"] = random_values.top_energy_random(m, n, min(k, self.width))
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

    def _projections(self, passed: Any, energy: float, k: int) -> tuple[float | None, float | None, float | None]:
        """(joint, left, right); None for a zero update."""
        if energy == 0:
            return None, None, None
        joint, long, short = projections(passed, energy, k)
        return (joint, long, short) if is_tall(self.before.shape) else (joint, short, long)

    def _simulated(self) -> dict[str, Any]:
        null = self.nulls[1]
        if not self.settings.null_draws or null is None or self.before.dtype != np.uint16:
            return {}
        return simulated_null(self.before, null.scale, self.source, self.ranks, self.settings)

    def _rotation_columns(self) -> dict[str, Any]:
        trained = self._factorise(self.after)
        self.spectra["source"], self.spectra["trained"] = self.source.values, trained.values
        row: dict[str, Any] = {"spectral_shift": spectral_shift(self.source.values, trained.values)}
        defined = self.c.source_energy > 0
        long = principal_sines(self.source.long, trained.long, self.ranks)
        short = principal_sines(self.source.short, trained.short, self.ranks)
        left, right = (long, short) if is_tall(self.before.shape) else (short, long)
        for i, ratio in enumerate(self.settings.ratios):
            row[f"rotation_{ratio_suffix(ratio)}"] = left[i] if defined else None
            row[f"rotation_right_{ratio_suffix(ratio)}"] = right[i] if defined else None
        return row

    def _codes(self, part: slice) -> np.ndarray:
        return entry_codes(self.before, self.after, part, self.tau)

    def _coverage_columns(
        self,
        codes: Callable[[slice], np.ndarray],
        kinds: tuple[str, ...],
        nulls: tuple[RoundingNull | None, ...],
    ) -> dict[str, Any]:
        """Principal coverage of the visible and nonzero updates, its random value, null and excess."""
        counts = (self.c.visible, self.c.nonzero)
        sums = principal_mask_sums(
            self.source, self.before.shape, _entry_weights(nulls), [mask for mask, _ in self.masks], codes
        )
        row: dict[str, Any] = {}
        for (_, suffix), total in zip(self.masks, sums, strict=True):
            for i, kind in enumerate(kinds):
                null = nulls[i]
                seen = float(total.sums[i]) / counts[i] if counts[i] else None
                expected = None if null is None else float(total.sums[2 + i]) / counts[i]
                name = f"principal_coverage_{suffix}{kind}"
                row[name] = seen
                row[f"{name}_random"] = total.entries / self.c.size
                row[f"{name}_null"] = expected
                row[f"{name}_excess"] = _excess(seen, expected)
        return row

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


def _master_coverages(spectral: _Spectral, before: np.ndarray, master: np.ndarray, count: int) -> dict[str, Any]:
    tau = float(np.float32(spectral.settings.threshold))
    c = measure_coordinates(before.reshape(-1), master.reshape(-1), threshold=tau, ratios=_shares(spectral.settings))
    if c.nonfinite:
        return {}
    sums = principal_mask_sums(
        spectral.source,
        before.shape,
        _entry_weights((None, None)),
        [mask for mask, _ in spectral.masks],
        lambda part: entry_codes(before, master, part, tau),
    )
    row: dict[str, Any] = {}
    for (mask, suffix), total in zip(spectral.masks, sums, strict=True):
        row[f"principal_coverage_{suffix}_master"] = float(total.sums[0]) / count
        row[f"low_magnitude_coverage_{suffix}_master"] = low_magnitude_coverage(c, mask.share)[0]
    return row


def _entry_weights(nulls: tuple[RoundingNull | None, ...]) -> np.ndarray:
    """What an entry of each code of `entry_codes` adds: visible, nonzero, P(visible | w), P(nonzero | w)."""
    words = 32768
    weights = np.zeros((3, words, 4))
    weights[2, :, 0] = 1.0
    weights[1:, :, 1] = 1.0
    for i, null in enumerate(nulls):
        if null is not None:
            weights[:, :, 2 + i] = null.probability
    return weights.reshape(3 * words, 4)
