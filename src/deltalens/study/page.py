"""A study's two pages, HTML and Markdown: the same tables, the paper's rows beside ours. Reads small numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltalens._version import __version__
from deltalens.files import whole_file
from deltalens.report.tables import Table, printable
from deltalens.study import tables
from deltalens.study.outcome import Outcome
from deltalens.study.spec import Claim, SmallVLM, expand

__all__ = ["render_html", "render_markdown", "rule_in_words", "write_pages"]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, its figures (by place) with what they show, and its tables."""

    key: str
    title: str
    charts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]


def write_pages(outcome: Outcome, folder: Path, made: Mapping[str, Any]) -> list[Path]:
    """Write study.html and study.md.

    Args:
        made: `command`, `versions` (a list of lines), `outdated` (steps whose inputs have changed since).
    """
    written = []
    for name, render in (("study.html", render_html), ("study.md", render_markdown)):
        page = render(outcome, made)
        with whole_file(folder / name) as temporary:
            temporary.write_text(page, encoding="utf-8")
        written.append(folder / name)
    return written


def rule_in_words(claim: Claim) -> str:
    """The rule of a claim as it was stated."""
    relation = {"above": "above", "below": "below", "same": "the same as"}[claim.rule]
    text = f"{claim.seen} {relation} {claim.chance}"
    if claim.margin:
        text += f", {'within' if claim.rule == 'same' else 'by more than'} {claim.margin:g}"
    if claim.control is not None:
        text += f"; explained by rounding where {claim.control} gives {claim.share:.0%} of the effect"
    if claim.spread is not None:
        text += f"; with one seed ± {claim.spread:g}"
    return text


def render_html(outcome: Outcome, made: Mapping[str, Any]) -> str:
    """The whole page as text; everything from the study and its runs is escaped."""
    import jinja2

    from deltalens.report.html import page_assets, script_json, template_environment
    from deltalens.study.figures import figures

    charts = figures(outcome)
    environment = template_environment()
    assert environment.loader is not None
    environment.loader = jinja2.ChoiceLoader([environment.loader, jinja2.PackageLoader("deltalens.study")])
    return environment.get_template("study.html.j2").render(
        **page_assets(),
        data=script_json({"figures": charts, "heatmap": None, "spectra": None}),
        title=printable(outcome.study.title or outcome.study.name),
        name=outcome.study.name,
        version=__version__,
        lead=_lead(outcome),
        claims=tables.claims_table(outcome),
        rules=[(claim.id, rule_in_words(claim)) for claim in outcome.study.claims],
        sections=[
            (one, [(key, said) for key, said in one.charts if key in charts]) for one in _sections(outcome)
        ],
        lacking=outcome.study.lacking,
        notes=outcome.study.notes,
        missing=_missing(outcome),
        made=made,
    )  # fmt: skip


def render_markdown(outcome: Outcome, made: Mapping[str, Any]) -> str:
    """The same tables in Markdown, without the figures."""
    study = outcome.study
    lines = [f"# {_plain(study.title or study.name)}", "", _lead(outcome), ""]
    for note in study.notes:
        lines += [f"- {_plain(note)}"]
    lines += ["", "## The paper's claims", ""]
    lines += [*_markdown(tables.claims_table(outcome)), "Rules, from the study file:", ""]
    lines += [f"- `{claim.id}`: {_plain(rule_in_words(claim))}" for claim in study.claims]
    for section in _sections(outcome):
        lines += ["", f"## {section.title}", ""]
        for table in section.tables:
            lines += _markdown(table)
    if study.lacking:
        lines += ["## What the paper has and this study does not", ""]
        lines += [f"- {_plain(what)}: {_plain(why)}" for what, why in study.lacking.items()]
    missing = _missing(outcome)
    if missing:
        lines += ["", "## Not run", "", ", ".join(_plain(one) for one in missing)]
    lines += ["", "## Made with", "", f"`{_plain(made['command'])}`", ""]
    lines += [f"- {_plain(line)}" for line in made["versions"]]
    if made["outdated"]:
        lines += ["", "Left out, since what they rest on has changed: " + ", ".join(map(_plain, made["outdated"]))]
    return "\n".join(lines) + "\n"


def _lead(outcome: Outcome) -> str:
    study = outcome.study
    source = "a small image-text model" if isinstance(study.source, SmallVLM) else study.source
    counted: dict[str, int] = {}
    for claim in study.claims:
        verdict = outcome.verdict(claim).verdict
        counted[verdict] = counted.get(verdict, 0) + 1
    said = ", ".join(f"{count} {verdict}" for verdict, count in counted.items())
    return f"Source: {printable(source)}; task: {printable(study.task)}. Claims: {said or 'none'}."


def _sections(outcome: Outcome) -> list[Section]:
    along = tuple(tables.trajectory_tables(outcome))
    empty = Table("Along the runs", ("step",), (), "Not run: no trajectory has been measured.")
    return [
        Section(
            "main", "The update",
            (("published", "Relative norm against sparsity, the paper's runs in grey"),
             ("coverage", "Low-magnitude coverage (core): seen, by rounding alone, by chance")),
            (tables.main_table(outcome), tables.coverage_table(outcome)),
        ),
        Section("energy", "Energy by role", (), (tables.energy_table(outcome),)),
        Section("overlaps", "Overlap of masks", (), (tables.overlap_table(outcome),)),
        Section(
            "subnetworks", "Subnetwork training",
            (("subnetwork", "Accuracy along the run: means over seeds with 95 % t intervals"),),
            (tables.subnetwork_table(outcome),),
        ),
        Section(
            "optimizer", "Optimizers", (("optimizers", "Accuracy against learning rate"),),
            (tables.optimizer_table(outcome),),
        ),
        Section(
            "trajectories", "Along the runs",
            (("similarity", "Similarity of the leading subspaces to those of the end"),
             ("rank", "Stable rank along the run")),
            along or (empty,),
        ),
        Section("runs", "Every run", (), (tables.runs_table(outcome),)),
    ]  # fmt: skip


def _missing(outcome: Outcome) -> list[str]:
    """Runs of the study that were not made."""
    return [
        one.name
        for one in expand(outcome.study)
        if outcome.study.runs[one.run].checkpoint is None and f"train:{one.name}" not in outcome.numbers
    ]


def _plain(text: str) -> str:
    """Text made inert in Markdown: no HTML, no table cell ended, no line broken."""
    return printable(str(text)).replace("<", "&lt;").replace("|", "\\|")


def _markdown(table: Table) -> list[str]:
    if not table.rows:
        return [f"**{table.title}.** {table.note}", ""] if table.note else [f"**{table.title}.** Not run.", ""]
    text = any(len(cell) > 60 for row in table.rows for cell in row[1:])
    lines = ["| " + " | ".join(_plain(column) for column in table.columns) + " |"]
    lines.append("|---|" + ("---|" if text else "---:|") * (len(table.columns) - 1))
    lines += ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in table.rows]
    return [f"**{table.title}**", "", *lines, "", *([_plain(table.note), ""] if table.note else [])]
