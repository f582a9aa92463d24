import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CODE = """
import sys
from deltalens.checkpoint import open_checkpoint, pair_checkpoints
source, trained = open_checkpoint(sys.argv[1]), open_checkpoint(sys.argv[2])
pair, = pair_checkpoints(source, trained).pairs
source.read(pair.source_name)
heavy = {"torch", "transformers", "trl", "gguf", "peft", "huggingface_hub", "ml_dtypes"} & set(sys.modules)
assert not heavy, heavy
"""


def test_safetensors_need_no_framework(tmp_path: Path) -> None:
    for side in ("source", "trained"):
        (tmp_path / side).mkdir()
        save_file({"model.a.weight": np.ones((2, 2), np.float32)}, tmp_path / side / "model.safetensors")
    subprocess.run([sys.executable, "-c", CODE, tmp_path / "source", tmp_path / "trained"], check=True)
