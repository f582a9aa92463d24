"""A source and what was trained from it, small, with a tensor of every kind that rules treat differently."""

from pathlib import Path

import ml_dtypes
import numpy as np

from deltalens.checkpoint import open_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
EMBEDDING = "model.embed_tokens.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
SHAPES = {EMBEDDING: (40, 16), Q: (16, 16), UP: (24, 16), DOWN: (16, 24), NORM: (16,)}


def source_tensors(seed: int = 0, dtype: np.dtype = BF16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(shape) * 0.05).astype(dtype) for name, shape in SHAPES.items()}


def trained_tensors(source: dict[str, np.ndarray], scale: float = 2e-4, seed: int = 1) -> dict[str, np.ndarray]:
    """A Gaussian step on every weight, rounded to the source's dtype: some weights of bf16 stay where they are."""
    rng = np.random.default_rng(seed)
    return {
        name: (values.astype(np.float64) + scale * rng.standard_normal(values.shape)).astype(values.dtype)
        for name, values in source.items()
    }


def delta(source: dict[str, np.ndarray], trained: dict[str, np.ndarray], name: str) -> np.ndarray:
    """W₊ − W in float64, exactly."""
    return trained[name].astype(np.float64) - source[name].astype(np.float64)


def stored(folder: Path) -> dict[str, bytes]:
    """Name → stored bytes of every tensor of a checkpoint."""
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name).tobytes() for name in checkpoint.entries}


def words(folder: Path, name: str) -> np.ndarray:
    """The 16-bit words of a tensor, flat."""
    return np.frombuffer(stored(folder)[name], np.uint16)
