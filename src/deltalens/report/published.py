"""Figures that others published, as plain data, to be shown beside a run's own.

[S] arXiv 2606.13657 v3, "Dense Supervision, Sparse Updates": its main table, its energy shares and its overlaps.
[G] arXiv 2606.07082 v3, "On the Geometry of On-Policy Distillation": its markers of the three regimes.

Fractions are fractions, not percentages. None: not given by the source.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ENERGY_SHARES",
    "GEOMETRY_MARKERS",
    "OPD",
    "OVERLAPS",
    "PUBLISHED",
    "RLVR",
    "SFT",
    "SOURCE_NOTE",
    "EnergyShare",
    "GeometryMarker",
    "Overlap",
    "PublishedRow",
]

SFT = "SFT / offline distillation"
OPD = "OPD"
RLVR = "RLVR"

SOURCE_NOTE = (
    "Published rows: arXiv 2606.13657 v3, main table (bf16 checkpoints, visible: |Δ| > 1e-5, coverages over all "
    "matrices at the 10 % masks)."
)


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row of the main table of [S]; the field names are the keys of summary.json without their ratio."""

    name: str
    regime: str
    relative_norm: float
    sparsity: float
    top16_energy: float | None
    stable_rank: float | None
    principal_coverage: float | None
    low_magnitude_coverage: float | None


PUBLISHED = (
    PublishedRow("Qwen-Math offline distillation", SFT, 0.11936, 0.0306, 0.0857, 82.74, 0.0995, 0.1010),
    PublishedRow("DeepScaleR RLVR", RLVR, 0.00073, 0.7789, 0.1962, 16.07, 0.0529, 0.3126),
    PublishedRow("JustRL RLVR", RLVR, 0.00497, 0.3468, None, None, 0.0834, None),
    PublishedRow("DS-Qwen OPD", OPD, 0.00047, 0.8258, 0.2692, 9.97, 0.0481, 0.3804),
    PublishedRow("DS-Qwen OPD (JustRL teacher)", OPD, 0.00108, 0.7043, 0.4094, 7.25, 0.0546, 0.2304),
    PublishedRow("MiniCPM OPD", OPD, 0.00069, 0.8165, 0.2681, 12.32, 0.0539, 0.3942),
    PublishedRow("Qwen2.5-VL OPD", OPD, 0.00142, 0.6672, 0.3052, 12.58, 0.0523, 0.2499),
    PublishedRow("Qwen3-1.7B OPD", OPD, 0.00045, 0.7903, 0.1969, 20.31, 0.0445, 0.3469),
    PublishedRow("Qwen3 OPSD", OPD, 0.00036, 0.8950, 0.2619, 7.77, 0.0439, 0.4857),
)


@dataclass(frozen=True, slots=True)
class EnergyShare:
    """Share of the update's energy by module, [S]."""

    name: str
    ffn: float
    attention: float
    embedding: float
    lm_head: float | None
    other: float


ENERGY_SHARES = (
    EnergyShare("DeepScaleR RLVR", 0.8389, 0.1141, 0.0206, 0.0264, 0.0),
    EnergyShare("DS-Qwen OPD", 0.8588, 0.1111, 0.0055, 0.0246, 0.0),
    EnergyShare("MiniCPM OPD", 0.6506, 0.2101, 0.0469, 0.0923, 0.0),
    EnergyShare("Qwen2.5-VL OPD", 0.8140, 0.1052, 0.0348, None, 0.0460),
    EnergyShare("Qwen3-1.7B OPD", 0.6970, 0.2703, 0.0327, None, 0.0),
    EnergyShare("Qwen3 OPSD", 0.6231, 0.3736, 0.0033, None, 0.0),
)


@dataclass(frozen=True, slots=True)
class Overlap:
    """Share of run a's visible updates that run b made too, and what chance gives (b's density), [S]."""

    a: str
    b: str
    a_in_b: float
    random: float


OVERLAPS = (
    Overlap("DeepScaleR RLVR", "DS-Qwen OPD", 0.5321, 0.1750),
    Overlap("DS-Qwen OPD", "DeepScaleR RLVR", 0.6720, 0.2211),
    Overlap("Qwen2.5-VL GRPO", "Qwen2.5-VL OPD", 0.7353, 0.3328),
    Overlap("Qwen2.5-VL OPD", "Qwen2.5-VL GRPO", 0.2969, 0.1344),
    Overlap("DS-Qwen OPD", "DS-Qwen OPD (JustRL teacher)", 0.8017, 0.2957),
    Overlap("DS-Qwen OPD (JustRL teacher)", "DS-Qwen OPD", 0.4745, 0.1750),
)


@dataclass(frozen=True, slots=True)
class GeometryMarker:
    """A regime's marker in [G], on Qwen3-8B: share with |Δ| ≤ 1e-3 max(|W|, |W₊|), and the order of magnitude of
    the normalised spectral shift."""

    regime: str
    relative_sparsity: float
    spectral_shift: float


GEOMETRY_MARKERS = (
    GeometryMarker(SFT, 0.081, 1e-3),
    GeometryMarker(OPD, 0.516, 1e-4),
    GeometryMarker(RLVR, 0.772, 1e-5),
)
