"""``pysparse suite report`` and ``findings``: a finished or a running grid as a page, plots, tables and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pysparse.cli.options import Debug
from pysparse.cli.output import guarded, say

Run = Annotated[
    Path, typer.Argument(help="Folder of a run, or its cells.jsonl.", metavar="DIR", show_default=False)
]
Title = Annotated[str | None, typer.Option(help="What stands on top. [default: the folder's name]")]


def report(
    run: Run,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file. [default: report.html in the folder]")
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

        records = _records(run)
        name = title or _folder(run).name
        said = [write_text(output or _folder(run) / "report.html", page(records, name))]
        if markdown is not None:
            said.append(write_text(markdown, markdown_tables(records)))
        if plots is not None:
            said += save_plots(records, plots)
        say(f"wrote {', '.join(map(str, said))}")


def findings(
    run: Run,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Markdown file. [default: findings.md in the folder]"),
    ] = None,
    title: Title = None,
    debug: Debug = False,
) -> None:
    """Answer from a run's paired cells: which allocation, which reconstruction, which architecture."""
    with guarded(debug):
        from pysparse.measure.results import write_text
        from pysparse.suite.report import findings_markdown

        text = findings_markdown(_records(run), title or _folder(run).name)
        say(f"wrote {write_text(output or _folder(run) / 'findings.md', text)}")


def _records(run: Path) -> list[dict[str, Any]]:
    from pysparse.suite.records import read_records
    from pysparse.suite.report import with_settings

    return with_settings(read_records(run), _folder(run) / "grid.toml")


def _folder(run: Path) -> Path:
    return (run.parent if run.is_file() else run).resolve()
