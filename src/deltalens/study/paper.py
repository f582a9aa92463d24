"""Tables of arXiv 2606.13657 v3 that `deltalens.report.published` lacks: subnetwork training and the optimizers.

Scores are percentages as published; None: not given.
"""

from __future__ import annotations

__all__ = ["OPTIMIZERS", "SUBNETWORKS", "SUBNETWORKS_VLM"]

# mask, density, peak, late average; mean@16 on AIME24 and AIME25, DS-Qwen-1.5B
SUBNETWORKS: tuple[tuple[str, float, float, float | None], ...] = (
    ("full OPD", 1.0, 35.52, 34.27),
    ("OPD mask", 0.175, 35.10, 34.73),
    ("RLVR mask", 0.221, 34.69, None),
    ("random mask", 0.175, 32.92, None),
)
# mask, peak, final, mean of the last five; Geo3K, Qwen2.5-VL-3B
SUBNETWORKS_VLM: tuple[tuple[str, float, float | None, float | None], ...] = (
    ("full OPD", 55.72, 54.94, 54.65),
    ("OPD mask", 54.24, 54.23, 53.86),
    ("random mask, OPD's density", 52.30, None, None),
    ("GRPO mask", 49.98, None, None),
    ("random mask, GRPO's density", 47.40, None, None),
)
# optimizer, learning rate, peak, final; JustRL teacher
OPTIMIZERS: tuple[tuple[str, float, float, float], ...] = (
    ("AdamW", 1e-6, 43.02, 42.40),
    ("SGD", 1e-2, 39.06, 37.92),
)
