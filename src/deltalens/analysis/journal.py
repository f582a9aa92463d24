"""Finished rows on disk while an analysis runs, so that a killed one goes on where it stopped.

`rows.jsonl` holds one line a tensor; its spectra lie in `spectra.bin` as raw float64, at the offsets the line names.
Spectra are written and flushed before their line: a line that can be read is complete, a torn last line is dropped.
`identity.json` says what the rows are of; a journal of other inputs or settings is not taken up.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.analysis.pair import Measured
from deltalens.errors import DeltalensError
from deltalens.files import whole_file

__all__ = ["Journal"]

FOLDER = ".deltalens-partial"


class Journal:
    """The journal of one output folder.

    Args:
        output: the folder that the results will be written to.
        identity: what the rows depend on (inputs, settings, version), JSON-able.
        resume: take up an earlier journal of the same identity; otherwise start afresh.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, resume: bool) -> None:
        self.folder = output / FOLDER
        self._rows = self.folder / "rows.jsonl"
        self._spectra = self.folder / "spectra.bin"
        wanted = json.loads(json.dumps(identity))
        if not (resume and self._identity() == wanted):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with whole_file(self.folder / "identity.json") as file:
                file.write_text(json.dumps(wanted))
        self._finished = self._load()
        self._row_stream = self._rows.open("a")
        self._spectra_stream = self._spectra.open("ab")

    def _identity(self) -> Any:
        try:
            return json.loads((self.folder / "identity.json").read_text())
        except (OSError, ValueError):
            return None

    def _load(self) -> dict[str, Measured]:
        """Complete rows; both files are cut back to them."""
        finished: dict[str, Measured] = {}
        kept, used = 0, 0
        self._rows.touch()
        self._spectra.touch()
        size = self._spectra.stat().st_size
        with self._rows.open("rb") as stream, self._spectra.open("rb") as values:
            for line in stream:
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                end = record["offset"] + 8 * sum(record["lengths"].values())
                if not line.endswith(b"\n") or end > size:
                    break
                values.seek(record["offset"])
                spectra = {
                    which: np.frombuffer(values.read(8 * length), np.float64)
                    for which, length in record["lengths"].items()
                }
                row = record["row"]
                finished[row["name"]] = Measured(row, spectra, record["source_hash"], record["trained_hash"])
                kept += len(line)
                used = max(used, end)
        with self._rows.open("rb+") as file:
            file.truncate(kept)
        with self._spectra.open("rb+") as file:
            file.truncate(used)
        return finished

    def finished(self) -> dict[str, Measured]:
        """Rows of an earlier run, by name."""
        return self._finished

    def add(self, measured: Measured) -> None:
        """Write one finished row.

        Raises:
            DeltalensError: the disk is full, or gone.
        """
        try:
            self._write(measured)
        except OSError as error:
            raise DeltalensError(
                f"{self.folder}: cannot be written ({error.strerror}); free some space, and the same command goes on"
            ) from None

    def _write(self, measured: Measured) -> None:
        offset = self._spectra_stream.tell()
        for values in measured.spectra.values():
            self._spectra_stream.write(np.ascontiguousarray(values, np.float64).tobytes())
        self._spectra_stream.flush()
        record = {
            "row": measured.row,
            "offset": offset,
            "lengths": {which: int(values.size) for which, values in measured.spectra.items()},
            "source_hash": measured.source_hash,
            "trained_hash": measured.trained_hash,
        }
        self._row_stream.write(json.dumps(record) + "\n")
        self._row_stream.flush()

    def close(self) -> None:
        """Close the files; the journal stays, for a later run to take up."""
        self._row_stream.close()
        self._spectra_stream.close()

    def remove(self) -> None:
        """Close and delete: the results are written."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
