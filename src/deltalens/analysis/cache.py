"""What is made of the source alone, on disk, so that a second run against the same base need not make it again.

Two uncompressed .npz a matrix: its factorisation, and which entries its principal masks hold. They are named by what
they depend on: the BLAKE3 hash of the source's bytes, the shape, the number of vectors, the compare dtype, how the
factors are made (with a revision), and the masks. A file that cannot be read is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from zipfile import BadZipFile

import numpy as np

from deltalens.errors import DeltalensError
from deltalens.files import whole_file

if TYPE_CHECKING:
    from deltalens.metrics.masks import MaskSpec
    from deltalens.metrics.members import PrincipalMembers
    from deltalens.metrics.spectrum import Factorisation

__all__ = ["SourceCache"]

REVISION = 3  # raised when the same source would give other factors (their last digits too) or other masks

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class SourceCache:
    """A folder of factorisations and masks; safe to share between runs, since files appear whole and never change.

    Attributes:
        folder: where they are.
        key: what is asked for depends on; set by `of`.
    """

    folder: Path
    key: str = ""

    def of(self, content_hash: str, shape: tuple[int, int], k: int, compare: str, how: str) -> SourceCache:
        """For one matrix. `how`: whatever else its factors depend on."""
        return replace(self, key=f"{content_hash}-{shape[0]}x{shape[1]}-k{k}-{compare}-{how}-r{REVISION}")

    def factorisation(self, make: Callable[[], Factorisation]) -> Factorisation:
        """The stored one, or the one that `make` gives, which is then stored.

        Raises:
            DeltalensError: the folder cannot be written.
        """
        from deltalens.metrics.spectrum import Factorisation

        def read(stored: Mapping[str, np.ndarray]) -> Factorisation:
            return Factorisation(stored["long"], stored["values"], stored["short"], stored.get("residuals"))

        def arrays(made: Factorisation) -> dict[str, Any]:
            held = {name: getattr(made, name) for name in ("long", "values", "short", "residuals")}
            return {name: array for name, array in held.items() if array is not None}

        return self._get(f"{self.key}.npz", read, make, arrays)

    def members(self, masks: Sequence[MaskSpec], make: Callable[[], PrincipalMembers]) -> PrincipalMembers:
        """The same of what the principal masks hold."""
        from deltalens.metrics.members import PrincipalMembers

        def read(stored: Mapping[str, np.ndarray]) -> PrincipalMembers:
            tied = np.split(stored["tied"], np.cumsum(stored["ties"])[:-1])
            entries, shares = stored["entries"].tolist(), stored["shares"].tolist()
            words, histograms = stored["words"], stored["histograms"]
            return PrincipalMembers(tuple(masks), entries, list(stored["inside"]), tied, shares, words, histograms)

        def arrays(made: PrincipalMembers) -> dict[str, Any]:
            ties = np.array([places.size for places in made.tied], np.int64)
            held = {name: np.array(getattr(made, name)) for name in ("entries", "inside", "shares")}
            rest = {"words": made.words, "histograms": made.histograms}
            return {**held, **rest, "ties": ties, "tied": np.concatenate(made.tied)}

        which = "-".join(f"{mask.rank}of{mask.share!r}" for mask in masks)
        return self._get(f"{self.key}-masks-{which}.npz", read, make, arrays)

    def _get(
        self,
        name: str,
        read: Callable[[Mapping[str, np.ndarray]], Made],
        make: Callable[[], Made],
        arrays: Callable[[Made], dict[str, Any]],
    ) -> Made:
        file = self.folder / name
        try:
            with np.load(file, allow_pickle=False) as stored:
                return read(stored)
        except (OSError, ValueError, KeyError, BadZipFile):
            made = make()
        try:
            with whole_file(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **arrays(made))
        except OSError as error:
            message = f"{self.folder}: cannot be written ({error.strerror}); free some space, or leave out --cache"
            raise DeltalensError(message) from None
        return made
