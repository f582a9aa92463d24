"""Analysing safetensors and asking for help load none of the libraries that take seconds to import."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets")


def loaded(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    report = f"import json; print(json.dumps([name for name in {names!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{report}"], capture_output=True, text=True, check=True, timeout=120
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


@pytest.mark.parametrize("spectrum", ["none", "exact"])
def test_counting_loads_nothing_that_spectra_need(spectrum, write_checkpoint):
    words = np.arange(0x3C00, 0x3C00 + 6, dtype=np.uint16).reshape(2, 3)
    sides = [str(write_checkpoint({"up_proj.weight": w.view(ml_dtypes.bfloat16)})) for w in (words, words ^ 1)]
    code = f"""
sys.argv = ["deltalens", "analyze", *{sides!r}, "--quiet", "--spectrum", {spectrum!r}]
from deltalens.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code"""
    names = ("scipy.linalg", "deltalens.analysis.spectral", "deltalens.metrics.lapack", "blake3")
    assert loaded(code, names) == ([] if spectrum == "none" else list(names))


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
