"""What an analysis returns, and how it is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltalens.analysis.pair import Measured
from deltalens.files import whole_file

if TYPE_CHECKING:  # loaded when the first table is made
    import polars as pl

__all__ = ["AnalysisResult", "table_of"]


@dataclass(frozen=True, slots=True, repr=False)
class AnalysisResult:
    """Tables and summary of one comparison.

    Attributes:
        tensors: a row a tensor; columns of METRICS.md.
        spectra: `name`, `which` (`delta`, `source`, `trained`), `index`, `value`.
        summary: the content of summary.json.
        manifest: what was read, with hashes; versions; settings.
    """

    tensors: pl.DataFrame
    spectra: pl.DataFrame
    summary: dict[str, Any]
    manifest: dict[str, Any]

    @classmethod
    def of(cls, measured: Sequence[Measured], summary: dict[str, Any], manifest: dict[str, Any]) -> AnalysisResult:
        """Build the tables from measured rows, in their order."""
        return cls(table_of([m.row for m in measured]), _spectra_table(measured), summary, manifest)

    def save(self, folder: str | Path) -> Path:
        """Write tensors.parquet, spectra.parquet, summary.json, manifest.json and report.html; returns the folder."""
        output = Path(folder)
        with whole_file(output / "tensors.parquet") as file:
            self.tensors.write_parquet(file)
        if self.spectra.height:
            with whole_file(output / "spectra.parquet") as file:
                self.spectra.write_parquet(file)
        for name, value in (("summary.json", self.summary), ("manifest.json", self.manifest)):
            with whole_file(output / name) as file:
                file.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        self.to_html(output / "report.html")
        return output

    def to_html(self, path: str | Path) -> Path:
        """Write the self-contained report; returns its path."""
        from deltalens.report.html import render_html

        with whole_file(Path(path)) as file:
            file.write_text(render_html(self.tensors, self.spectra, self.summary), encoding="utf-8")
        return Path(path)

    def __repr__(self) -> str:
        from deltalens.report import summary_repr

        return summary_repr(self.summary)


def table_of(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Columns in the order in which they first appear; a column that a row lacks is null there."""
    import polars as pl

    names: dict[str, None] = {}
    for row in sorted(rows, key=len, reverse=True):  # the fullest row gives the order
        names.update(dict.fromkeys(row))
    data = {name: [row.get(name) for row in rows] for name in names}
    schema = {name: _dtype(values) for name, values in data.items()}
    return pl.DataFrame(data, schema=schema, strict=False)


def _dtype(values: Sequence[Any]) -> Any:
    import polars as pl

    kinds = {type(value) for value in values if value is not None}
    if kinds == {str}:
        return pl.String
    return pl.Int64 if kinds == {int} else pl.Float64


def _spectra_table(measured: Sequence[Measured]) -> pl.DataFrame:
    import polars as pl

    places: list[np.ndarray] = []
    indices: list[np.ndarray] = []
    values: list[np.ndarray] = []
    kinds: list[tuple[str, str]] = []
    for m in measured:
        for which, spectrum in m.spectra.items():
            places.append(np.full(spectrum.size, len(places)))
            kinds.append((m.row["name"], which))
            indices.append(np.arange(spectrum.size, dtype=np.int32))
            values.append(spectrum)
    if not values:
        schema = {"name": pl.String, "which": pl.String, "index": pl.Int32, "value": pl.Float64}
        return pl.DataFrame(schema=schema)
    place = np.concatenate(places)
    labels = pl.DataFrame(kinds, schema=["name", "which"], orient="row")[place]
    return labels.with_columns(pl.Series("index", np.concatenate(indices)), pl.Series("value", np.concatenate(values)))
