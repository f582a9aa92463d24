"""Small checkpoints that differ as a run's ends do, and what is compared of them."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BF16 = np.dtype(ml_dtypes.bfloat16)


def contents(folder: Path) -> dict[str, str]:
    """Path below the folder → hash of the file, of everything there, hidden files too."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def weights(seed: int = 0, size: int = 40) -> dict[str, np.ndarray]:
    """Tensors of several dtypes and shapes, a scalar and an empty one among them."""
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": (rng.standard_normal((size, 32)) * 0.02).astype(BF16),
        "layer.weight": (rng.standard_normal((size, size)) * 0.02).astype(BF16),
        "norm.weight": np.ones(size, np.float32),
        "half.weight": rng.standard_normal(size).astype(np.float16),
        "counter": np.array(3, np.int64),
        "nothing": np.zeros((0, 4), np.float32),
        "mask": rng.random(size) < 0.5,
    }


def moved(tensors: dict[str, np.ndarray], density: float = 0.3, seed: int = 1) -> dict[str, np.ndarray]:
    """The same tensors with about `density` of the 16-bit and 32-bit words a few units in the last place away."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, values in tensors.items():
        values = values.copy()
        if values.dtype.itemsize in (2, 4) and values.ndim:
            words = values.view(f"<u{values.dtype.itemsize}")
            where = rng.random(words.shape) < density
            words[where] += rng.integers(1, 30, int(where.sum())).astype(words.dtype)
        out[name] = values
    return out


def write_folder(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1, stem: str = "model") -> Path:
    """A checkpoint folder with config, tokenizer and generation files."""
    folder.mkdir(parents=True)
    metadata = {"format": "pt", "step": folder.name}
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", metadata=metadata)
    else:
        places = {name: f"{stem}-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
        for file in sorted(set(places.values())):
            part = {name: tensors[name] for name in tensors if places[name] == file}
            save_file(part, folder / file, metadata=metadata)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"vocab": "équal"}' * 100)
    return folder
