"""Rows of work are each done once, on torch's threads, a pool's, or one."""

import sys
from unittest import mock

import numpy as np
import pytest
import torch
from numba import carray, cfunc

from deltalens.subnetwork import threads
from deltalens.subnetwork.threads import BODY, CFUNC, pointer, run, take_row, unpack


@cfunc(BODY, **{**CFUNC, "cache": False})
def count_and_look_up(work):
    """Row: an address of two float32; which number is added to the second, and how often. Adds 1 to the first."""
    handed, rows, numbers = unpack(work)
    i = take_row(handed)
    while i < len(rows):
        at, kind, turns = rows[i]
        out = carray(pointer(at), 2, np.float32)
        for _ in range(turns):
            out[1] += numbers[kind, 6]
        out[0] += 1
        i = take_row(handed)


@pytest.mark.skipif(sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="no OpenMP of GNU's")
def test_torch_lends_its_threads():
    assert threads._openmp() is not None


@pytest.mark.parametrize("lent", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 2, 400])
def test_each_row_is_done_once(lent, count, size):
    out = np.zeros((size, 2), np.float32)
    numbers = np.arange(21, dtype=np.float32).reshape(3, 7)
    turns = np.random.default_rng(size).integers(1, 2000, size)
    rows = np.array([(out[i:].ctypes.data, i % 3, turns[i]) for i in range(size)], np.uint64).reshape(-1, 3)
    openmp = threads._openmp() if lent else None
    with (
        mock.patch.object(torch, "get_num_threads", return_value=count),
        mock.patch.object(threads, "_openmp", return_value=openmp) as asked,
    ):
        run(count_and_look_up, rows, numbers)
    assert asked.called == (min(count, size) > 1)
    assert (out[:, 0] == 1).all()
    np.testing.assert_array_equal(out[:, 1], numbers[np.arange(size) % 3, 6] * turns)
