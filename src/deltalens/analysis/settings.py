"""What a user chooses about an analysis; written into summary.json and manifest.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from deltalens.metrics.values import COMPARE_DTYPES, Compare

__all__ = ["DEFAULT_RATIOS", "HEADLINE", "KINDS", "Settings", "mask_shares", "mask_suffix", "ratio_suffix"]

HEADLINE = 0.1
KINDS = ("", "_nonzero")  # column suffixes: visible updates, and all that are not zero
DEFAULT_RATIOS = (0.01, 0.05, HEADLINE, 0.2)
Spectrum = Literal["exact", "fast", "none"]
Permutation = Literal["sign", "exponent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of `analyze`.

    Attributes:
        threshold: τ; an update is visible where |Δ| > τ.
        compare_dtype: `bf16` casts both sides to bf16 first, `stored` compares as saved, `fp32` in float32. Not given,
            it is `bf16`, and `stored` where TRAINED is a LoRA adapter, whose update rounding would hide.
        spectrum: `exact` (float64 LAPACK), `fast` (randomised), or `none` (coordinates and magnitude masks only).
        ratios: ratios of the principal subspaces and the masks; 10 % is always among them.
        mask_rank, mask_share: one more pair of masks, of rank k and share α ([G] uses 64 and 0.5), columns
            `…_rank64_50pct`.
        null_draws: simulated rounding-null draws a matrix for what has no closed form; 0 for none.
        permutations: permuted copies of each update against which projections and rotations get a z-score; 0 for none.
        permutation: `sign` flips signs in place, `exponent` moves updates among coordinates of one source exponent.
        seed: of the draws, the permutations and the bootstrap.
        device: `cpu`, or a torch device such as `cuda` that has float64; not with `fast`.

    Raises:
        ValueError: a value is out of range.
    """

    threshold: float = 1e-5
    compare_dtype: Compare | None = None
    spectrum: Spectrum = "exact"
    ratios: tuple[float, ...] = DEFAULT_RATIOS
    mask_rank: int | None = None
    mask_share: float = 0.5
    null_draws: int = 0
    permutations: int = 0
    permutation: Permutation = "sign"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"the threshold must be finite and not negative, not {self.threshold}")
        if self.compare_dtype is not None and self.compare_dtype not in COMPARE_DTYPES:
            raise ValueError(f"compare dtype {self.compare_dtype!r}: choose one of {', '.join(COMPARE_DTYPES)}")
        if self.spectrum not in ("exact", "fast", "none"):
            raise ValueError(f"spectrum {self.spectrum!r}: choose exact, fast or none")
        if self.device != "cpu" and self.spectrum == "fast":
            raise ValueError(f"spectrum fast is for the processor: choose exact with device {self.device!r}")
        for ratio in (*self.ratios, self.mask_share):
            if not 0 < ratio < 1:
                raise ValueError(f"a ratio lies between 0 and 1, not {ratio}")
        if self.permutation not in ("sign", "exponent"):
            raise ValueError(f"permutation {self.permutation!r}: choose sign or exponent")
        if self.permutations < 0:
            raise ValueError("permutations are not negative")
        if self.null_draws < 0 or (self.mask_rank is not None and self.mask_rank < 1):
            raise ValueError("null draws and the mask's rank are not negative")
        object.__setattr__(self, "ratios", tuple(sorted({*self.ratios, HEADLINE})))

    @property
    def compare(self) -> Compare:
        """The compare dtype in force."""
        return self.compare_dtype or "bf16"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "ratios": list(self.ratios)}


def ratio_suffix(ratio: float) -> str:
    """`10pct` for 0.1, `0.5pct` for 0.005."""
    return f"{ratio * 100:.6g}pct"


def mask_suffix(settings: Settings) -> str:
    """Column suffix of the masks of `mask_rank`: `rank64_50pct`."""
    return f"rank{settings.mask_rank}_{ratio_suffix(settings.mask_share)}"


def mask_shares(settings: Settings) -> tuple[float, ...]:
    """Shares of all low-magnitude masks, ascending."""
    extra = (settings.mask_share,) if settings.mask_rank else ()
    return tuple(sorted({*settings.ratios, *extra}))
