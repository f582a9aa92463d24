"""The source's factorisations on disk, so that a second run against the same base need not make them again.

One uncompressed .npz a matrix, named by what it depends on: the BLAKE3 hash of the source's bytes, the shape, the
number of vectors, the compare dtype and how they are made. A file that cannot be read is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from deltalens.errors import DeltalensError
from deltalens.files import whole_file

if TYPE_CHECKING:
    from deltalens.metrics.spectrum import Factorisation

__all__ = ["FactorisationCache"]


@dataclass(frozen=True, slots=True)
class FactorisationCache:
    """A folder of factorisations; safe to share between runs, since files appear whole and never change."""

    folder: Path

    def get(
        self,
        content_hash: str,
        shape: tuple[int, int],
        k: int,
        compare: str,
        make: Callable[[], Factorisation],
        *,
        how: str = "exact",
    ) -> Factorisation:
        """The stored factorisation, or the one that `make` gives, which is then stored.

        `how`: whatever else it depends on.

        Raises:
            DeltalensError: the folder cannot be written.
        """
        from deltalens.metrics.spectrum import Factorisation

        file = self.folder / f"{content_hash}-{shape[0]}x{shape[1]}-k{k}-{compare}-{how}.npz"
        try:
            with np.load(file, allow_pickle=False) as stored:
                residuals = stored.get("residuals")
                return Factorisation(stored["long"], stored["values"], stored["short"], residuals)
        except (OSError, ValueError, KeyError, BadZipFile):
            made = make()
        try:
            with whole_file(file) as temporary, temporary.open("wb") as stream:
                held: dict[str, Any] = {name: getattr(made, name) for name in ("long", "values", "short", "residuals")}
                np.savez(stream, **{name: array for name, array in held.items() if array is not None})
        except OSError as error:
            message = f"{self.folder}: cannot be written ({error.strerror}); free some space, or leave out --cache"
            raise DeltalensError(message) from None
        return made
