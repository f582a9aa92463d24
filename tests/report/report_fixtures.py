"""Synthetic tables of an analysis: a small model with layers, a vector, a zero update, and names that bite."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

HOSTILE = "model.layers.0.</script><img src=x onerror=alert(1)>.weight"

_MODULES = {
    "q_proj": ("attention", 96, 96),
    "k_proj": ("attention", 32, 96),
    "gate_proj": ("ffn", 256, 96),
    "down_proj": ("ffn", 96, 256),
}


def make_tensors(layers: int = 3) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(tensors, spectra) as `analyze` writes them; `model.norm.weight` has nulls, the last down_proj did not move."""
    random = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    spectra: list[dict[str, Any]] = []
    for name, role, layer, module, m, n in _tensors(layers):
        still = layer == layers - 1 and module == "down_proj"
        row: dict[str, Any] = {"name": name, "layer": layer, "role": role, "module": module, "parameters": m * (n or 1)}
        row["shape"] = f"{m}x{n}" if n else f"{m}"
        row["source_energy"] = float(m * (n or 1)) * 1e-3
        delta = np.zeros((m, n or 1)) if still else random.normal(0, 1e-5, (m, n or 1))
        row["delta_energy"] = float(np.sum(delta**2))
        row["relative_norm"] = float(np.sqrt(row["delta_energy"] / row["source_energy"]))
        row["sparsity"] = 1.0 if still else float(random.uniform(0.6, 0.8))
        row["unchanged_fraction"] = 1.0 if still else row["sparsity"] - 0.001
        matrix = n is not None and not still
        values = np.linalg.svd(delta, compute_uv=False) if matrix else None
        energy = values**2 / np.sum(values**2) if values is not None else None
        row["stable_rank"] = None if energy is None else float(1 / energy[0])
        row["stable_rank_random"] = m * n / (np.sqrt(m) + np.sqrt(n)) ** 2 if n else None
        row["effective_rank"] = None if values is None else float(len(values) * 0.8)
        row["top16_energy"] = None if energy is None else float(energy[:16].sum())
        for metric, seen, chance in (
            ("principal_projection_10pct", 0.009, 0.004),
            ("low_magnitude_coverage_10pct", 0.32, 0.1),
            ("principal_coverage_10pct", 0.047, 0.1),
        ):
            row[metric] = seen if matrix else None
            row[f"{metric}_random"] = chance if n else None
        row["low_magnitude_coverage_10pct_excess"] = 1.01 if matrix else None
        row["principal_coverage_10pct_excess"] = 0.98 if matrix else None
        row["rotation_10pct"] = 1e-3 if matrix else None
        row["spectral_shift"] = 1e-4 if matrix else None
        rows.append(row)
        if values is not None:
            source = np.linalg.svd(random.normal(0, 0.03, (m, n)), compute_uv=False)
            for which, series in (("delta", values), ("source", source), ("trained", source)):
                spectra += [
                    {"name": name, "which": which, "index": index, "value": float(value)}
                    for index, value in enumerate(series)
                ]
    return pl.DataFrame(rows, infer_schema_length=None), pl.DataFrame(spectra)


def make_summary(**overrides: Any) -> dict[str, Any]:
    """A schema-1 summary like that of a short on-policy run; `overrides` replace keys of `global`."""
    overall: dict[str, Any] = {
        "tensors": 15,
        "parameters": 250_000,
        "relative_norm": 0.00095,
        "unchanged_fraction": 0.7417,
        "unchanged_bits": 0.7417,
        "sparsity": 0.7425,
        "sparsity_at": {"1e-08": 0.7417, "1e-05": 0.7425},
        "relative_sparsity": 0.7417,
        "energy_share": {"ffn": 0.707, "attention": 0.242, "embedding": 0.051, "lm_head": 0.0, "norm": 0.0},
        "stable_rank": {"mean": 8.5, "median": 7.4},
        "effective_rank": {"mean": 372.0, "median": 404.0},
        "top16_energy": {"mean": 0.439, "median": 0.45},
        "principal_projection_10pct": {"mean": 0.0061, "median": 0.006},
        "low_magnitude_coverage_10pct": _coverage(0.329, 0.339, 0.971),
        "principal_coverage_10pct": _coverage(0.052, 0.053, 0.98),
        "low_magnitude_coverage_10pct_core": _coverage(0.318, 0.316, 1.006),
        "principal_coverage_10pct_core": _coverage(0.047, 0.0476, 0.987),
        "low_magnitude_coverage_10pct_nonzero_core": _coverage(0.319, 0.317, 1.006),
        **overrides,
    }
    return {
        "schema": 1,
        "deltalens": "0.1.0",
        "source": {"path": "base", "format": "safetensors", "files": 1, "bytes": 500_000, "parameters": 250_000},
        "trained": {
            "path": "out/<b>student",
            "format": "safetensors",
            "files": 1,
            "bytes": 500_000,
            "parameters": 250_000,
        },
        "settings": {"threshold": 1e-5, "compare_dtype": "bf16", "spectrum": "exact", "ratios": [0.1]},
        "global": overall,
        "by_role": {"ffn": dict(overall), "attention": dict(overall), "embedding": {"tensors": 1}},
        "by_layer": {"10": dict(overall), "2": dict(overall), "none": {"tensors": 2, "relative_norm": None}},
        "skipped": [{"tensor": "rotary.inv_freq<i>", "reason": "only in the source"}],
        "warnings": ["the source <may> be another model"],
    }


def _coverage(seen: float, null: float, ratio: float) -> dict[str, float | None]:
    return {
        "pooled": seen,
        "median": seen,
        "random": 0.1,
        "null": null,
        "excess": ratio,
        "excess_low": ratio - 0.01,
        "excess_high": ratio + 0.01,
    }


def _tensors(layers: int) -> list[tuple[str, str, int | None, str, int, int | None]]:
    found: list[tuple[str, str, int | None, str, int, int | None]] = [
        ("model.embed_tokens.weight", "embedding", None, "embed_tokens", 512, 96),
        ("model.norm.weight", "norm", None, "norm", 96, None),
        (HOSTILE, "other", 0, "</script><img src=x>", 64, 96),
    ]
    for layer in range(layers):
        for module, (role, m, n) in _MODULES.items():
            found.append((f"model.layers.{layer}.{module}.weight", role, layer, module, m, n))
    return found
