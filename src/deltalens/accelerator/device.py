"""A device, and tensors on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from deltalens.errors import DeltalensError

__all__ = ["check_device", "delta_matrix", "differences", "enough_memory", "to_device", "value_matrix"]


def check_device(device: str) -> None:
    """Whether float64 tensors can be made there.

    Raises:
        DeltalensError: torch does not know the device, was built without it, finds none, or it has no float64.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DeltalensError(
            f"--device {device}: torch {torch.__version__} cannot use it ({reason}); leave out --device to work on the "
            "processor, or install a torch built for this GPU (https://pytorch.org/get-started)"
        ) from None


@contextmanager
def enough_memory(device: str, shape: tuple[int, ...]) -> Iterator[None]:
    """Turns a device that is out of memory into an error that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise DeltalensError(
            f"--device {device}: out of memory on a tensor of {'x'.join(map(str, shape))}; try --jobs 1, free the "
            "device, or leave out --device"
        ) from None


def to_device(values: np.ndarray, device: str) -> torch.Tensor:
    """Prepared values on the device; uint16 words become bfloat16."""
    if not values.flags.writeable:  # torch warns of memory that it may not write to
        values = values.copy()
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(values).to(device)


def differences(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """after − before in the compare dtype: words subtract in float32 and round to nearest even."""
    if before.dtype == torch.bfloat16:
        return (after.float() - before.float()).to(torch.bfloat16)
    return after - before


def value_matrix(values: np.ndarray, device: str) -> torch.Tensor:
    """(length, width) float64: a matrix with its longer side as rows."""
    matrix = to_device(values, device).to(torch.float64)
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def delta_matrix(before: np.ndarray, after: np.ndarray, device: str) -> torch.Tensor:
    """(length, width) float64: the update, longer side as rows."""
    matrix = differences(to_device(before, device), to_device(after, device)).to(torch.float64)
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
