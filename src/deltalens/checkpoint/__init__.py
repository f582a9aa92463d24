"""Reading and pairing checkpoints; the only room that opens weight files."""

from deltalens.checkpoint.base import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, TensorEntry, TensorSource
from deltalens.checkpoint.open import open_checkpoint
from deltalens.checkpoint.pairing import Pairing, Skipped, TensorPair, pair_checkpoints
from deltalens.checkpoint.roles import ROLES, role_of

__all__ = [
    "DTYPE_BYTES",
    "FLOAT_DTYPES",
    "ROLES",
    "Checkpoint",
    "Pairing",
    "Skipped",
    "TensorEntry",
    "TensorPair",
    "TensorSource",
    "open_checkpoint",
    "pair_checkpoints",
    "role_of",
]
