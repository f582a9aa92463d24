"""deltalens shows, tests and exploits what post-training does to a model's weights.

Exports are loaded when first used (PEP 562): analysing and patching safetensors imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltalens._version import __version__

if TYPE_CHECKING:
    from deltalens.analysis import AnalysisResult, Settings, analyze
    from deltalens.analysis.compare import CompareResult, compare
    from deltalens.analysis.trajectory import TrajectoryResult, trajectory
    from deltalens.patch import apply, pack
    from deltalens.subnetwork import SubnetworkMask, intervene
    from deltalens.subnetwork.callback import SubnetworkCallback
    from deltalens.subnetwork.optimizers import (
        CompactAdamW,
        CompactAdamWNoMomentum,
        CompactLion,
        CompactRMSprop,
        CompactSGD,
        CompactSGDMomentum,
        WholeMatrixMuon,
    )
    from deltalens.subnetwork.projection import Projection
    from deltalens.train.callback import UpdateGeometryCallback
    from deltalens.train.opd import OPDConfig, OPDTrainer
    from deltalens.train.teachers import EndpointTeacher

__all__ = [
    "AnalysisResult",
    "CompactAdamW",
    "CompactAdamWNoMomentum",
    "CompactLion",
    "CompactRMSprop",
    "CompactSGD",
    "CompactSGDMomentum",
    "CompareResult",
    "EndpointTeacher",
    "OPDConfig",
    "OPDTrainer",
    "Projection",
    "Settings",
    "SubnetworkCallback",
    "SubnetworkMask",
    "TrajectoryResult",
    "UpdateGeometryCallback",
    "WholeMatrixMuon",
    "__version__",
    "analyze",
    "apply",
    "compare",
    "intervene",
    "pack",
    "trajectory",
]

_HOMES = {
    "AnalysisResult": "deltalens.analysis",
    "CompactAdamW": "deltalens.subnetwork.optimizers",
    "CompactAdamWNoMomentum": "deltalens.subnetwork.optimizers",
    "CompactLion": "deltalens.subnetwork.optimizers",
    "CompactRMSprop": "deltalens.subnetwork.optimizers",
    "CompactSGD": "deltalens.subnetwork.optimizers",
    "CompactSGDMomentum": "deltalens.subnetwork.optimizers",
    "CompareResult": "deltalens.analysis.compare",
    "EndpointTeacher": "deltalens.train.teachers",
    "OPDConfig": "deltalens.train.opd",
    "OPDTrainer": "deltalens.train.opd",
    "Projection": "deltalens.subnetwork.projection",
    "Settings": "deltalens.analysis",
    "SubnetworkCallback": "deltalens.subnetwork.callback",
    "SubnetworkMask": "deltalens.subnetwork",
    "TrajectoryResult": "deltalens.analysis.trajectory",
    "UpdateGeometryCallback": "deltalens.train.callback",
    "WholeMatrixMuon": "deltalens.subnetwork.optimizers",
    "analyze": "deltalens.analysis",
    "apply": "deltalens.patch",
    "compare": "deltalens.analysis.compare",
    "intervene": "deltalens.subnetwork",
    "pack": "deltalens.patch",
    "trajectory": "deltalens.analysis.trajectory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltalens' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
