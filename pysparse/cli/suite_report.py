"""``pysparse suite report`` and ``findings``: a finished or a running grid as a page, plots, tables and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pysparse.cli.options import Debug
from pysparse.cli.output import guarded, say

Runs = Annotated[
    list[Path],
    typer.Argument(
        help="Folder of a run, or its cells.jsonl (or .jsonl.gz); several become one report.",
        metavar="DIR...",
        show_default=False,
    ),
]
Title = Annotated[str | None, typer.Option(help="What stands on top. [default: the folders' names]")]


def report(
    runs: Runs,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="HTML file. [default: report.html in the first folder]"),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for every plot as PNG and SVG (needs the plot extra).")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="File for tables that a README can take.")] = None,
    title: Title = None,
    debug: Debug = False,
) -> None:
    """Write a run as one HTML page that works offline: tables, filters, plots, and the command of every cell."""
    with guarded(debug):
        from pysparse.measure.results import write_text
        from pysparse.suite.report import markdown_tables, page, save_plots

        records = _records(runs)
        name = title or _names(runs)
        said = [write_text(output or _folder(runs[0]) / "report.html", page(records, name))]
        if markdown is not None:
            said.append(write_text(markdown, markdown_tables(records)))
        if plots is not None:
            said += save_plots(records, plots)
        say(f"wrote {', '.join(map(str, said))}")


def findings(
    runs: Runs,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Markdown file. [default: findings.md in the first folder]"),
    ] = None,
    title: Title = None,
    debug: Debug = False,
) -> None:
    """Answer from a run's paired cells: which allocation, which reconstruction, which architecture."""
    with guarded(debug):
        from pysparse.measure.results import write_text
        from pysparse.suite.report import findings_markdown

        text = findings_markdown(_records(runs), title or _names(runs))
        say(f"wrote {write_text(output or _folder(runs[0]) / 'findings.md', text)}")


def _records(runs: list[Path]) -> list[dict[str, Any]]:
    """Return the records of all runs; of a cell that two of them have, the later run's."""
    from pysparse.suite.records import read_records

    found = {}
    for run in runs:
        found.update({record["id"]: record for record in read_records(run)})
    return list(found.values())


def _names(runs: list[Path]) -> str:
    return ", ".join(_folder(run).name for run in runs)


def _folder(run: Path) -> Path:
    return (run.parent if run.is_file() else run).resolve()
