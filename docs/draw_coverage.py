"""Draws coverage.svg, the README's picture: `python docs/draw_coverage.py`.

The figures are those of two real runs of a 135M model, read from docs/results: core coverages of the 10 % masks
(without the embedding), all updates that are not zero.
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
RUNS = {
    "smollm2-opd.json": "60 steps of on-policy distillation",
    "smollm2-sft.json": "240 steps of supervised fine-tuning",
}
MASKS = {
    "low_magnitude": "Smallest 10 % of the weights",
    "principal": "Principal 10 % of the weights",
}


def _rows() -> list[tuple[str, str, float, float]]:
    """(mask, run, seen, rounding null), in percent to one decimal."""
    rows = []
    for which, mask in MASKS.items():
        for file, run in RUNS.items():
            overall = json.loads((RESULTS / file).read_text())["global"]
            coverage = overall[f"{which}_coverage_10pct_nonzero_core"]
            rows.append((mask, run, round(100 * coverage["pooled"], 1), round(100 * coverage["null"], 1)))
    return rows


ROWS = _rows()
CHANCE = 10.0
LEFT, SCALE, BAR = 270, 13.0, 15

STYLE = """
  text { font: 14px system-ui, "Segoe UI", Roboto, sans-serif; fill: #1c2330; }
  .soft { fill: #576071; font-size: 12.5px; } .head { font-weight: 600; font-size: 16px; } .mask { font-weight: 600; }
  .seen { fill: #3b7dd8; } .null { fill: #e08a1e; } .chance { stroke: #8a8f98; stroke-dasharray: 5 4; }
  @media (prefers-color-scheme: dark) { text { fill: #e6e9ef; } .soft { fill: #a4adbb; } }
"""


def draw() -> str:
    """The picture as SVG text."""
    parts = [_text(16, 28, "Where do the updates go, and how much of that is only rounding?", "head")]
    parts.append(_text(16, 49, "Share of the updates of SmolLM2-135M that fall inside each mask", "soft"))
    top = 74
    parts.append(f'<rect x="16" y="{top - 11}" width="14" height="12" class="seen"/>' + _text(36, top, "seen", "soft"))
    parts.append(f'<rect x="86" y="{top - 11}" width="14" height="12" class="null"/>')
    parts.append(_text(106, top, "what bf16 rounding alone predicts for an update without any preference", "soft"))
    y, previous = 104, ""
    start = y - 8
    for mask, run, seen, null in ROWS:
        if mask != previous:
            y += 8 if previous else 0
            parts.append(_text(16, y + 6, mask, "mask"))
            y, previous = y + 20, mask
        parts.append(_text(LEFT - 10, y + 19, run, "soft", anchor="end"))
        for offset, value, kind in ((0, seen, "seen"), (BAR + 1, null, "null")):
            width = value * SCALE
            parts.append(f'<rect x="{LEFT}" y="{y + offset}" width="{width:.1f}" height="{BAR}" class="{kind}"/>')
            parts.append(_text(LEFT + width + 6, y + offset + 12, f"{value} %", "soft"))
        y += 2 * BAR + 16
    x = LEFT + CHANCE * SCALE
    parts.append(f'<line x1="{x}" x2="{x}" y1="{start}" y2="{y - 4}" class="chance"/>')
    parts.append(_text(x, y + 12, "chance: 10 %", "soft", anchor="middle"))
    label = "; ".join(f"{mask}, {run}: seen {seen} %, rounding predicts {null} %" for mask, run, seen, null in ROWS)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {y + 24}" role="img" aria-label="{label}">\n'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" class="{kind}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    (Path(__file__).parent / "coverage.svg").write_text(draw(), encoding="utf-8")
