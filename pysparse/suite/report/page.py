"""One HTML file that works offline: style, script and data inside, every value escaped, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from importlib import resources
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup

import pysparse
from pysparse.suite.report.findings import HOW_TO_READ, find
from pysparse.suite.report.rows import Record, Row, Statistic, number, quality_kept, rows_of
from pysparse.suite.report.summary import best_table, overview, show_setting, shown_of

LIMIT_BYTES = 2_000_000
_SCRIPTS = ("base.js", "filters.js", "chart.js", "pareto.js", "layers.js", "table.js", "main.js")
_SHADES = (0.99, 0.95, 0.90, 0.75)  # of the quality kept: a table cell's background
_logger = logging.getLogger("pysparse")


def page(records: Sequence[Record], title: str) -> str:
    """Return the report of a run as HTML.

    A run whose page would pass LIMIT_BYTES goes without the layers' sparsities, and the page says so.
    """
    rows = rows_of(records)
    text = _render(records, rows, title, layers=True)
    if len(text.encode()) > LIMIT_BYTES:
        text = _render(records, rows, title, layers=False)
    size = len(text.encode())
    if size > LIMIT_BYTES:
        _logger.warning(
            "the report of %d cells is %.1f MB, over %.1f", len(records), size / 1e6, LIMIT_BYTES / 1e6
        )
    return text


def _render(records: Sequence[Record], rows: list[Row], title: str, *, layers: bool) -> str:
    style = _asset("style.css")
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "setting": _setting,
        "duration": show_duration,
        "shade": shade,
    }
    tasks = dict.fromkeys(row.task for row in rows)
    return environment.from_string(_asset("page.html")).render(
        title=title, version=pysparse.__version__, run=overview(records), findings=find(records),
        how_to_read=HOW_TO_READ, best=[table for task in tasks if (table := best_table(rows, task))],
        machines=_machines(records), layers=layers, style=Markup(style), style_hash=_hash(style),
        script=Markup(script), script_hash=_hash(script),
        data=embedded(payload(records, rows, layers=layers)),
    )  # fmt: skip


def payload(records: Sequence[Record], rows: Sequence[Row], *, layers: bool) -> dict[str, Any]:
    """Return what the page's script draws from: rows, the layers they share, cells that failed."""
    layouts: dict[tuple[tuple[str, str], ...], int] = {}
    shown = [_row(row) | (_layers(row, layouts) if layers else {}) for row in rows]
    failed = [_failure(record) for record in records if record["status"] != "done"]
    return {"rows": shown, "layouts": [list(layout) for layout in layouts], "failed": failed}


def embedded(content: Any) -> Markup:
    """Return JSON for the inside of a script element: no text in it can end that element or start a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # line separators and everything beyond ASCII are escaped already
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def shade(kept: float) -> int:
    """Return the step of the scale, 0 for the best, on which a quality kept stands."""
    return sum(kept < bar for bar in _SHADES)


def show_duration(seconds: float) -> str:
    """Show seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _setting(column: tuple[str, float]) -> str:
    return show_setting(*column)


def _row(row: Row) -> dict[str, Any]:
    others = dict.fromkeys(name for cell in row.cells for name in cell["quality"]["others"] or {})
    return {
        "task": row.task, "model": row.model, "family": row.family, "recipe": row.recipe, "method": row.method,
        "allocation": row.allocation, "reconstruction": row.reconstruction, "pattern": row.pattern,
        "sparsity": _short(row.sparsity), "setting": show_setting(row.pattern, row.sparsity), "metric": row.metric,
        "up": row.higher_is_better, "quality": _statistic(row.quality), "dense": _statistic(row.dense),
        "kept": _statistic(row.kept), "achieved": _statistic(row.measured("achieved_sparsity")),
        "file": _statistic(row.file_ratio), "prune": _statistic(row.measured("prune_seconds")),
        "memory": _statistic(row.measured("peak_memory_bytes")), "parameters": _statistic(row.measured("parameters")),
        "speed": [
            [one.name, one.unit, *map(_short, (one.dense, one.sparse, one.ratio, one.ratio_p10, one.ratio_p90))]
            for one in row.paces
        ],
        "others": {
            name: _statistic(Statistic.of(number(cell["quality"]["others"].get(name)) for cell in row.cells))
            for name in others
        },
        "cells": [_cell(cell) for cell in row.cells],
    }  # fmt: skip


def _cell(cell: Record) -> dict[str, Any]:
    return {
        "id": cell["id"], "seed": cell["seed"], "quality": _short(number(cell["quality"]["value"])),
        "kept": _short(quality_kept(cell["quality"])), "seconds": _short(number(cell["seconds"])),
        "started": str(cell["started"] or "")[:16], "command": cell["command"],
    }  # fmt: skip


def _failure(record: Record) -> dict[str, Any]:
    error = record["error"] or {}
    keys = ("id", "task", "model", "recipe", "method", "pattern", "sparsity", "seed", "command")
    return {key: record[key] for key in keys} | {
        "setting": show_setting(record["pattern"], record["sparsity"]),
        "type": str(error.get("type", "")), "message": str(error.get("message", "")),
    }  # fmt: skip


def _layers(row: Row, layouts: dict[tuple[tuple[str, str], ...], int]) -> dict[str, Any]:
    """Return the layers' sparsities in thousandths, medians of the seeds, and the number of their shared layout."""
    profiles = [cell["layers"] or [] for cell in row.cells]
    layout = tuple((str(layer["name"]), "x".join(map(str, layer["shape"]))) for layer in profiles[0])
    same = [
        profile
        for profile in profiles
        if [layer["name"] for layer in profile] == [name for name, _ in layout]
    ]
    values = [median(layer["sparsity"] for layer in layers) for layers in zip(*same, strict=True)]
    if not layout:
        return {}
    return {
        "layout": layouts.setdefault(layout, len(layouts)),
        "layers": [round(1000 * value) for value in values],
    }


def _machines(records: Sequence[Record]) -> list[str]:
    """Return the first environment in full, as JSON, of each that looks different in what is shown."""
    full = {shown_of(record): record["environment"] for record in reversed(records) if record["environment"]}
    return [json.dumps(environment, indent=1) for environment in reversed(full.values())]


def _statistic(found: Statistic | None) -> list[float | None] | None:
    return None if found is None else [_short(found.median), _short(found.low), _short(found.high)]


def _short(value: float | None) -> float | None:
    """Return six significant digits; None for what JSON has no number for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
