"""Reading and pairing checkpoints; the only room that opens weight files."""

from deltalens.checkpoint.base import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, TensorEntry, TensorSource
from deltalens.checkpoint.open import open_checkpoint

__all__ = ["DTYPE_BYTES", "FLOAT_DTYPES", "Checkpoint", "TensorEntry", "TensorSource", "open_checkpoint"]
