"""Sparse patches: a run carried bit for bit in the bytes it really changed."""

from deltalens.patch.apply import ApplyResult, apply, apply_in_place, verify
from deltalens.patch.export import export_sparse, read_sparse
from deltalens.patch.format import PatchFile
from deltalens.patch.pack import PackResult, pack

__all__ = [
    "ApplyResult",
    "PackResult",
    "PatchFile",
    "apply",
    "apply_in_place",
    "export_sparse",
    "pack",
    "read_sparse",
    "verify",
]
