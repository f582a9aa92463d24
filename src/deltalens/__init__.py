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
    from deltalens.train.callback import UpdateGeometryCallback

__all__ = [
    "AnalysisResult",
    "CompareResult",
    "Settings",
    "SubnetworkMask",
    "TrajectoryResult",
    "UpdateGeometryCallback",
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
    "CompareResult": "deltalens.analysis.compare",
    "Settings": "deltalens.analysis",
    "SubnetworkMask": "deltalens.subnetwork",
    "TrajectoryResult": "deltalens.analysis.trajectory",
    "UpdateGeometryCallback": "deltalens.train.callback",
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
