"""Compiled loops of `coordinates` over floats: one pass, and the second look at the bins where a quantile falls.

A module of its own, so that a pair of bf16 checkpoints need not load them. Conventions as in `coordinate_kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from deltalens.metrics.coordinate_kernels import COUNTERS, RELATIVE_SHARE
from deltalens.metrics.values import DOUBLES, KERNEL, SINGLES

__all__ = ["count_floats", "gather_edges"]


@njit(**KERNEL)
def _bin(magnitude):  # type: ignore[no-untyped-def]
    return np.int64((np.float32(magnitude).view(np.uint32) >> np.uint32(16)) & np.uint32(0x7FFF))


def _signature(values: Any, scalar: Any) -> Any:
    return types.void(values, values, types.Array(scalar, 1, "C"), COUNTERS, COUNTERS, COUNTERS, types.float64[::1])


@njit([_signature(SINGLES, types.float32), _signature(DOUBLES, types.float64)], **KERNEL)
def count_floats(source, trained, thresholds, counts, total, changed, energy):  # type: ignore[no-untyped-def]
    """Counters of one pass. `thresholds`: τ, then those of the table. `counts`: for each threshold the number with
    |Δ| ≤ it, then relative_sparse, nonfinite. `total` by |W|; `changed`: 4 columns a bin (visible and nonzero by |W|,
    number by |Δ|); `energy`: Δ² by |Δ|, then the source's energy in the last place.
    """
    block = 1024
    deltas = np.empty(block, source.dtype)
    tau, t0, t1, t2, t3, t4 = thresholds
    eta = RELATIVE_SHARE
    source_energy = 0.0
    for start in range(0, source.size, block):
        stop = min(start + block, source.size)
        for i in range(start, stop):  # no table look-ups in here: this loop becomes vector instructions
            before, after = abs(source[i]), abs(trained[i])
            delta = abs(trained[i] - source[i])
            deltas[i - start] = delta
            counts[0] += delta <= tau
            counts[1] += delta <= t0
            counts[2] += delta <= t1
            counts[3] += delta <= t2
            counts[4] += delta <= t3
            counts[5] += delta <= t4
            counts[6] += np.float64(delta) <= eta * np.float64(max(before, after))
            counts[7] += not ((before < np.inf) & (after < np.inf))
        for i in range(start, stop):
            weight, delta = abs(source[i]), deltas[i - start]
            bin_w = _bin(weight)
            total[bin_w] += 1
            source_energy += np.float64(weight) * np.float64(weight)
            if delta != 0:
                bin_d = _bin(delta)
                changed[4 * bin_w] += delta > tau
                changed[4 * bin_w + 1] += 1
                changed[4 * bin_d + 2] += 1
                energy[bin_d] += np.float64(delta) * np.float64(delta)
    energy[energy.size - 1] = source_energy


_SLOTS = types.Array(types.boolean, 1, "C")
_FLAGS = types.uint8[::1]


def _gather_signature(values: Any, scalar: Any) -> Any:
    out = types.Array(scalar, 1, "C")
    return types.void(values, values, types.float64, _SLOTS, _SLOTS, out, _FLAGS, out)


@njit([_gather_signature(SINGLES, types.float32), _gather_signature(DOUBLES, types.float64)], **KERNEL)
def gather_edges(source, trained, threshold, want_w, want_d, weights, flags, deltas):  # type: ignore[no-untyped-def]
    """Collect |W| (with flags: 1 nonzero, 2 visible) and |Δ| of the coordinates that fall in wanted bins."""
    n_w = n_d = 0
    for i in range(source.size):
        weight, delta = abs(source[i]), abs(trained[i] - source[i])
        if want_w[_bin(weight)]:
            weights[n_w] = weight
            flags[n_w] = np.uint8(delta != 0) | (np.uint8(delta > threshold) << np.uint8(1))
            n_w += 1
        if delta != 0 and want_d[_bin(delta)]:
            deltas[n_d] = delta
            n_d += 1
