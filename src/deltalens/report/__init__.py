"""Showing the tables of an analysis: in the terminal and as one self-contained HTML file.

Reads tables and the summary, knows no checkpoints. The exports are lazy: a terminal report loads neither plotly
nor jinja2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltalens.report.html import render_html, write_html
    from deltalens.report.tables import summary_repr
    from deltalens.report.terminal import print_report

__all__ = ["print_report", "render_html", "summary_repr", "write_html"]

_HOMES = {"print_report": "terminal", "render_html": "html", "summary_repr": "tables", "write_html": "html"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
