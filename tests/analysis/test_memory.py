"""What a matrix is taken to hold, against the peaks that were measured, and against the bound."""

import dataclasses
import threading
import time
from math import prod

import pytest

from deltalens import Settings
from deltalens.analysis.engine import Gate, run_all
from deltalens.analysis.memory import PAIR_BYTES, PROCESS_BYTES, held_bytes, room_for
from deltalens.analysis.pair import Buffers, Measured
from deltalens.checkpoint.pairing import TensorPair


def pair(*shape: int, dtype: str = "BF16", name: str = "w") -> TensorPair:
    return TensorPair(
        name=name,
        role="other",
        layer=None,
        module="",
        shape=shape,
        source_name=name,
        trained_name=name,
        source_dtype=dtype,
        trained_dtype=dtype,
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "spectrum", "megabytes"),
    [
        ((4096, 1024), "BF16", "exact", 301),
        ((2048, 2048), "BF16", "exact", 318),
        ((3072, 3072), "BF16", "exact", 415),
        ((4096, 4096), "BF16", "exact", 553),
        ((8960, 1536), "BF16", "exact", 354),
        ((49152, 576), "BF16", "exact", 444),
        ((2048, 2048), "F32", "exact", 370),
        ((8960, 1536), "F32", "exact", 494),
        ((4096, 4096), "F32", "exact", 709),
        ((8960, 1536), "BF16", "fast", 350),
        ((1536, 8960), "BF16", "fast", 400),
        ((4096, 4096), "BF16", "fast", 511),
        ((49152, 576), "BF16", "none", 306),
        ((8960, 1536), "F32", "none", 428),
    ],
)
def test_a_process_with_one_matrix_peaks_below_what_is_reckoned(shape, dtype, spectrum, megabytes):
    """Peaks of whole processes (docs/performance.md)."""
    reckoned = PROCESS_BYTES + held_bytes(pair(*shape, dtype=dtype), Settings(spectrum=spectrum))
    assert megabytes * 1e6 < reckoned < 1.3 * megabytes * 1e6


def test_what_is_cast_or_drawn_counts():
    plain, shape = Settings(spectrum="none"), (100, 50)
    size, stored = prod(shape), Settings(spectrum="none", compare_dtype="stored")
    base = held_bytes(pair(*shape), plain) - 4 * size
    assert held_bytes(pair(*shape, dtype="F32"), plain) - base == (8 + 4) * size
    assert held_bytes(pair(*shape, dtype="F32"), stored) - base == 8 * size
    assert held_bytes(pair(*shape), stored) - base == (4 + 8) * size
    mixed = dataclasses.replace(pair(*shape), trained_dtype="F32")
    assert held_bytes(mixed, plain) - base == (2 + 4 + 2) * size
    exact = held_bytes(pair(*shape), Settings())
    signs = held_bytes(pair(*shape), Settings(permutations=1))
    assert held_bytes(pair(*shape), Settings(null_draws=1)) == signs == exact + PAIR_BYTES + 4 * size
    assert held_bytes(pair(*shape), Settings(permutations=1, permutation="exponent")) > signs > exact
    assert held_bytes(pair(*shape), Settings(ratios=(0.5,))) == exact + 20 * 0.3 * size
    assert held_bytes(pair(*shape), Settings(mask_rank=25)) == exact + 20 * 0.3 * size
    assert held_bytes(pair(*shape), Settings(mask_rank=10)) == exact
    assert held_bytes(pair(size), Settings()) == held_bytes(pair(size), plain)  # a vector has no spectrum


@pytest.mark.parametrize(
    "shapes",
    [
        [(4096, 4096)] * 5,
        [(8192, 8192)] * 3,
        [(49152, 576)] + [(1536, 576), (576, 576)] * 30,
        [(128256, 4096)] * 2 + [(14336, 4096), (4096, 4096), (1024, 4096)] * 20,
        [(64, 64)] * 100,
    ],
    ids=["square", "large square", "135M", "8B", "tiny"],
)
@pytest.mark.parametrize("jobs", [1, 2, 64])
def test_all_that_are_let_in_together_stay_under_the_bound(shapes, jobs):
    """500 MB and 4 × the largest tensor in float32."""
    pairs, settings = [pair(*shape, name=str(i)) for i, shape in enumerate(shapes)], Settings()
    lock, inside, most = threading.Lock(), 0, 0

    def work(one: TensorPair, buffers: Buffers) -> Measured:
        nonlocal inside, most
        with lock:
            inside += held_bytes(one, settings)
            most = max(most, inside)
        time.sleep(0.002)
        with lock:
            inside -= held_bytes(one, settings)
        return Measured({"name": one.name})

    gate = Gate(room_for(pairs, settings), lambda one: held_bytes(one, settings))
    run_all(pairs, work, gate=gate, jobs=jobs, blas=False)
    assert PROCESS_BYTES + most <= 500e6 + 16 * max(one.count for one in pairs)
    if jobs == 64:
        assert most > gate.limit / 2  # and the room is used


def test_counts_alone_get_a_quarter_beside_the_largest():
    pairs = [pair(100_000, 4096), pair(4096, 4096)]
    settings = Settings(spectrum="none")
    assert room_for(pairs, settings) == int(1.25 * held_bytes(pairs[0], settings))
    assert room_for([], settings) > 0
