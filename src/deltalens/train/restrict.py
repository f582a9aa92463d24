"""A run's restriction: which coordinates are trained, and by which optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deltalens.errors import ConfigError
from deltalens.train.config import Run

__all__ = ["restriction_callback"]


def restriction_callback(run: Run, source: Path, model: Any) -> Any:
    """The `SubnetworkCallback` of a run with a mask, a projection or another optimizer than AdamW; else None.

    Args:
        run: its `mask`, `project` and `optimizer`.
        source: folder of the model before training; a mask made for another one is refused.
        model: the loaded model.

    Raises:
        ConfigError: the keys do not go together.
        CheckpointError: the mask or the early checkpoint cannot be read, or belongs to another source.
    """
    if run.mask is None and run.project is None and run.optimizer == "adamw":
        return None
    if run.lora is not None:
        raise ConfigError("lora goes with neither mask, project nor another optimizer than adamw")
    if run.mask is not None and run.project is not None:
        raise ConfigError("give either mask or project, not both")
    from deltalens.subnetwork import SubnetworkMask
    from deltalens.subnetwork import optimizers as compact
    from deltalens.subnetwork.callback import SubnetworkCallback
    from deltalens.subnetwork.projection import Projection

    kinds = {
        "adamw": compact.CompactAdamW,
        "adamw-no-momentum": compact.CompactAdamWNoMomentum,
        "sgd": compact.CompactSGD,
        "momentum": compact.CompactSGDMomentum,
        "rmsprop": compact.CompactRMSprop,
        "lion": compact.CompactLion,
        "muon": compact.WholeMatrixMuon,
    }
    restriction: Any
    if run.mask is not None:
        restriction = SubnetworkMask.load(run.mask, source=source)
    elif run.project is not None:
        restriction = Projection.from_update(source, run.project.update, run.project.k)
    else:
        restriction = _Everything(model, matrices=run.optimizer == "muon")
    return SubnetworkCallback(restriction, kinds[run.optimizer])


class _Everything:
    """No restriction: every coordinate of every parameter, or of every matrix (Muon is defined for no other)."""

    def __init__(self, model: Any, *, matrices: bool) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2 or not matrices}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def count(self, name: str) -> int:
        return int(np.prod(self._shapes[name], dtype=np.int64))

    def dense(self, name: str) -> np.ndarray:
        return np.ones(self._shapes[name], np.bool_)
