"""Analysing safetensors and asking for help load none of the libraries that take seconds to import."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets")
REPORT = f"import json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def loaded(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{REPORT}"], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_check_sees_an_import():
    assert loaded("sys.modules['torch'] = sys") == ["torch"]


def test_import_and_analyze(write_checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    before = rng.standard_normal((20, 16)).astype(ml_dtypes.bfloat16)
    after = (before.astype(np.float32) * 1.01).astype(before.dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    source, trained = write_checkpoint({name: before}), write_checkpoint({name: after})
    call = f"deltalens.analyze({str(source)!r}, {str(trained)!r}, output={str(tmp_path / 'out')!r})"
    assert loaded(f"import deltalens; result = {call}; repr(result)") == []
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("arguments", [["--help"], ["analyze", "--help"], ["--version"]])
def test_help(arguments):
    code = f"""
sys.argv = ["deltalens", *{arguments!r}]
from deltalens.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code"""
    assert loaded(code) == []
