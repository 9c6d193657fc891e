"""Tables for a README: quality and speed of every recipe at every sparsity."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pysparse.measure.results import format_number
from pysparse.suite.report.rows import Record, Row, Statistic, natural, rows_of
from pysparse.suite.report.summary import show_setting


def markdown_tables(records: Iterable[Record]) -> str:
    """Return a table for each task and model: a line for each recipe, a column for each pattern and sparsity.

    A cell is the metric's median, half the range over the seeds where it shows, and the speed-up of the task's first
    workload; the best median of a column is bold.
    """
    rows = rows_of(records)
    parts = []
    for task, model in dict.fromkeys((row.task, row.model) for row in rows):
        mine = [row for row in rows if (row.task, row.model) == (task, model)]
        parts.append(f"### {escape(task)}: {escape(model)}\n\n{_caption(mine)}\n\n{_table(mine)}")
    return "\n\n".join(parts) + "\n" if parts else "No finished cell.\n"


def markdown_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of plain text."""
    head = [_line(columns), "|" + " --- |" * len(columns)]
    return "\n".join(head + [_line(line) for line in lines])


def escape(text: str) -> str:
    """Return ``text`` so that Markdown and HTML show it as it is, on one line."""
    flat = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat)


def show_statistic(found: Statistic | None) -> str:
    """Show a median with half the range, "31.38 ±0.02"; without it when all seeds agree."""
    if found is None:
        return "-"
    if found.half_range == 0:
        return format_number(found.median)
    return f"{format_number(found.median)} ±{format_number(found.half_range)}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"


def _caption(rows: list[Row]) -> str:
    first = rows[0]
    direction = "higher" if first.higher_is_better else "lower"
    seeds = sorted({cell["seed"] for row in rows for cell in row.cells})
    paces = [row.paces[0] for row in rows if row.paces]
    timed = f"; speed-up over dense: {paces[0].name}" if paces else ""
    count = "1 seed" if len(seeds) == 1 else f"median and half the range of {len(seeds)} seeds"
    caption = f"{first.metric}, {direction} is better, dense {show_statistic(first.dense)}; {count}{timed}"
    return escape(caption) + "."


def _table(rows: list[Row]) -> str:
    settings = list(dict.fromkeys((row.pattern, row.sparsity) for row in rows))
    best = {
        setting: _best([row for row in rows if (row.pattern, row.sparsity) == setting])
        for setting in settings
    }
    at = {(row.recipe, row.pattern, row.sparsity): row for row in rows}
    lines = []
    for recipe in sorted({row.recipe for row in rows}, key=natural):
        cells = []
        for setting in settings:
            row = at.get((recipe, *setting))
            text = "" if row is None else escape(_show(row))
            cells.append(f"**{text}**" if row is not None and row is best[setting] else text)
        lines.append("| " + " | ".join([escape(recipe), *cells]) + " |")
    columns = ["recipe", *(show_setting(*setting) for setting in settings)]
    return "\n".join([_line(columns), "|" + " --- |" * len(columns), *lines])


def _show(row: Row) -> str:
    speed = "" if row.speedup is None else f", {row.speedup:.2f}x"
    return show_statistic(row.quality) + speed


def _best(rows: list[Row]) -> Row | None:
    measured = [row for row in rows if row.quality is not None]
    if len(measured) < 2:
        return None
    sign = 1 if measured[0].higher_is_better else -1
    return max(measured, key=lambda row: sign * row.quality.median if row.quality else 0.0)
