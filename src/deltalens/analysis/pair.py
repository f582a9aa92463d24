"""One tensor pair in, one row out: the only place where the metrics meet.

`measure` reads both sides, and calls each metric once, sharing the source's factorisation. A row is a dict of plain
numbers; undefined values are None. Column names and their meaning: METRICS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deltalens.analysis.cache import SourceCache
from deltalens.analysis.settings import KINDS, Settings, mask_shares, mask_suffix, ratio_suffix
from deltalens.checkpoint.base import DTYPE_BYTES, Checkpoint
from deltalens.checkpoint.formats.peft import LoraSource
from deltalens.checkpoint.pairing import TensorPair
from deltalens.metrics.coordinates import Coordinates, low_magnitude_coverage, measure_coordinates
from deltalens.metrics.rounding_null import (
    RoundingNull,
    excess,
    expected_low_magnitude_coverage,
    fine_histogram,
    fit_all,
)
from deltalens.metrics.values import ceil_share, prepare, round_threshold

if TYPE_CHECKING:  # loaded where a spectrum is wanted: without one, loading them would take as long as the work
    from deltalens.analysis.spectral import SpectralColumns

__all__ = ["Buffers", "Measured", "SourceSide", "measure", "measure_against", "read_source"]

Seen = Callable[[np.ndarray, np.ndarray, float, Coordinates, RoundingNull | None], None]
"""Called with both prepared sides, the rounded τ, the counts, and the null of the visible updates."""


@dataclass(slots=True)
class Measured:
    """A row, the spectra behind it (`delta`, `source`, `trained` → (d,) float64), and both content hashes."""

    row: dict[str, Any]
    spectra: dict[str, np.ndarray] = field(default_factory=dict)
    source_hash: str | None = None
    trained_hash: str | None = None


class Buffers:
    """Read buffers that are used again and again: fresh memory costs more than the read itself."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.size for held in self._held.values())

    def take(self, side: str, nbytes: int) -> np.ndarray:
        """A uint8 buffer of at least `nbytes` for `source` or `trained`; what it held before is lost."""
        if side not in self._held or self._held[side].size < nbytes:
            self._held.pop(side, None)
            self._held[side] = np.empty(nbytes, np.uint8)
        return self._held[side]


@dataclass(slots=True)
class SourceSide:
    """One tensor of SOURCE, read once; `factorised` holds what its factorisation gave, for the next checkpoint."""

    raw: np.ndarray
    values: np.ndarray
    content_hash: str | None
    factorised: SpectralColumns | None = None


def measure(
    pair: TensorPair,
    source: Checkpoint,
    trained: Checkpoint,
    settings: Settings,
    master: Checkpoint | None = None,
    buffers: Buffers | None = None,
    cache: SourceCache | None = None,
) -> Measured:
    """Every metric of one tensor.

    Args:
        pair: which tensor, and where its bytes are.
        source, trained: the opened checkpoints.
        settings: what to compute.
        master: float32 weights of TRAINED before rounding, for the `…_master` coverages.
        buffers: the calling thread's read buffers.
        cache: what was made of the source alone, taken from it and put into it.

    Raises:
        CheckpointError: a tensor's bytes cannot be read.
    """
    buffers = buffers or Buffers()
    side = read_source(pair, source, settings, buffers)
    return measure_against(side, pair, trained, settings, buffers, master=master, cache=cache)


def read_source(pair: TensorPair, source: Checkpoint, settings: Settings, buffers: Buffers) -> SourceSide:
    """SOURCE's side of a tensor; valid until `buffers` are read into again on that side.

    Raises:
        CheckpointError: the tensor's bytes cannot be read.
    """
    raw = _read(source, pair.source_name, pair.source_start, pair, buffers, "source")
    content_hash = _hash(raw) if settings.spectrum != "none" else None
    return SourceSide(raw, prepare(raw, pair.source_dtype, settings.compare), content_hash)


def measure_against(
    side: SourceSide,
    pair: TensorPair,
    trained: Checkpoint,
    settings: Settings,
    buffers: Buffers,
    *,
    master: Checkpoint | None = None,
    cache: SourceCache | None = None,
    columns_of: Callable[..., SpectralColumns] | None = None,
    seen: Seen | None = None,
    hashed: bool = True,
) -> Measured:
    """`measure` with SOURCE's side at hand; what is made of that side is left in it for the next checkpoint.

    Args:
        side: from `read_source`, for a pair with the same part of SOURCE.
        columns_of: what makes the spectral columns, instead of what the settings say.
        seen: called once the counts of a finite tensor are there.
        hashed: whether the result has the hash of TRAINED's side.

    The others, and what is raised, as in `measure`.
    """
    raw_source, before = side.raw, side.values
    raw_trained = _read(trained, pair.trained_name, pair.trained_start, pair, buffers, "trained")
    after = prepare(raw_trained, pair.trained_dtype, settings.compare)
    tau = round_threshold(settings.threshold, settings.compare, _finer(pair))
    coordinates = _coordinate_pass(settings)(
        before, after, threshold=tau, stored=(raw_source, raw_trained), ratios=mask_shares(settings)
    )
    result = Measured(_identity(pair))
    if settings.spectrum != "none":
        result.source_hash = side.content_hash
        result.trained_hash = _hash(raw_trained) if hashed else None
    row = result.row
    row |= _coordinate_columns(coordinates, same_dtype=pair.source_dtype == pair.trained_dtype)
    if coordinates.nonfinite:
        return result
    if not pair.is_matrix and seen is None:
        return result
    nulls = _fit_nulls(pair, coordinates, tau, settings, raw_source)
    if seen is not None:
        seen(before, after, tau, coordinates, nulls[0])
    if not pair.is_matrix:
        return result
    row |= _low_magnitude_columns(coordinates, nulls, settings)
    if settings.spectrum == "none":
        return result
    shape = (pair.shape[0], pair.shape[1])
    left, right = before.reshape(shape), after.reshape(shape)
    make = columns_of or _spectral_columns(settings)
    spectral = make(left, right, coordinates, tau, nulls, settings, _low_rank(pair, trained, settings))
    if side.factorised is not None:
        spectral.share_source(side.factorised)
    else:
        if cache is not None:
            assert result.source_hash is not None
            how = "exact" if settings.spectrum == "exact" else f"{settings.spectrum}-seed{settings.seed}"
            cache = cache.of(result.source_hash, shape, spectral.k, settings.compare, how)
        spectral.take_source(cache)
    side.factorised = spectral
    row |= spectral.columns()
    result.spectra = spectral.spectra
    if master is not None:
        row |= spectral.master_columns(_master_values(pair, master))
    return result


def _hash(raw: np.ndarray) -> str:
    from blake3 import blake3

    return blake3(raw.data).hexdigest()


def _coordinate_pass(settings: Settings) -> Callable[..., Coordinates]:
    """On the processor or on a device (only then is torch imported)."""
    if settings.device != "cpu":
        from deltalens.accelerator import backend

        return backend(settings.device)[0]
    return measure_coordinates


def _spectral_columns(settings: Settings) -> type[SpectralColumns]:
    if settings.device != "cpu":
        from deltalens.accelerator import backend

        return backend(settings.device)[1]
    if settings.spectrum == "fast":
        from deltalens.analysis.fast import FastColumns

        return FastColumns
    from deltalens.analysis.spectral import SpectralColumns

    return SpectralColumns


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


def _coordinate_columns(c: Coordinates, *, same_dtype: bool) -> dict[str, Any]:
    size = c.size
    same_bits = c.unchanged_bits if same_dtype else 0  # bits of two formats are never the same
    row: dict[str, Any] = {"nonfinite_count": c.nonfinite, "unchanged_bits": same_bits / size}
    if c.nonfinite:
        return row
    row |= {
        "relative_norm": (c.delta_energy / c.source_energy) ** 0.5 if c.source_energy > 0 else None,
        "source_energy": c.source_energy,
        "delta_energy": c.delta_energy,
        "unchanged_count": c.unchanged,
        "unchanged_bits_count": same_bits,
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
    finer = grid == "bf16" and pair.source_dtype != "BF16"
    fine = fine_histogram(prepare(raw, pair.source_dtype, "fp32")) if finer else None
    visible, nonzero = fit_all(c.words, c.weights_by_word, [(c.visible, tau, grid), (c.nonzero, 0.0, grid)], fine)
    return visible, nonzero


def _grid(pair: TensorPair, settings: Settings) -> Literal["bf16", "fp16", "fp32"]:
    """The grid on which the trained weights were stored, as far as the comparison sees it."""
    if settings.compare == "stored":
        return {"BF16": "bf16", "F16": "fp16"}.get(pair.trained_dtype, "fp32")  # type: ignore[return-value]
    return "bf16" if settings.compare == "bf16" else "fp32"


def _low_magnitude_columns(
    c: Coordinates, nulls: tuple[RoundingNull | None, RoundingNull | None], settings: Settings
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    named = [(ratio, ratio_suffix(ratio)) for ratio in settings.ratios]
    if settings.mask_rank:
        named.append((settings.mask_share, mask_suffix(settings)))
    shares = mask_shares(settings)
    expected: list[dict[float, float]] = [
        {} if null is None else dict(zip(shares, expected_low_magnitude_coverage(null, shares), strict=True))
        for null in nulls
    ]
    for ratio, suffix in named:
        for kind, seen, by_share in zip(KINDS, low_magnitude_coverage(c, ratio), expected, strict=True):
            name = f"low_magnitude_coverage_{suffix}{kind}"
            row[name] = seen
            row[f"{name}_random"] = ceil_share(ratio, c.size) / c.size
            row[f"{name}_null"] = by_share.get(ratio)
            row[f"{name}_excess"] = excess(seen, by_share.get(ratio))
    return row
