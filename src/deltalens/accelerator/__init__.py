"""The same numbers from a torch device (`--device cuda`): integer counts equal, floats to about 1e-9.

Everything is float64 torch and knows nothing of the kind of device. It is tested against the NumPy path through
torch's own `cpu` device; it has not yet been run on a GPU. There, sums by `bincount` with weights may differ in
the last bits from run to run. A device holds a few float64 copies of the tensor being measured.

This package imports torch: `analysis` imports it only where a device other than `cpu` is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from deltalens.accelerator.columns import DeviceColumns
from deltalens.accelerator.coordinates import measure_coordinates_on
from deltalens.accelerator.device import check_device
from deltalens.analysis.spectral import SpectralColumns
from deltalens.metrics.coordinates import Coordinates

__all__ = ["backend", "check_device"]


def backend(device: str) -> tuple[Callable[..., Coordinates], type[SpectralColumns]]:
    """What `analysis.pair` calls instead of `measure_coordinates` and `SpectralColumns`."""
    return partial(measure_coordinates_on, device), DeviceColumns
