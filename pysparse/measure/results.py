"""Results for machines and for people: JSON, tables, plots."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Result(ABC):
    """What a call returns: a table for people, JSON for programs."""

    __slots__ = ()

    @abstractmethod
    def table(self) -> Table | Group:
        """Return a rich table, or several."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        fields: dict[str, Any] = to_jsonable(self)
        return fields

    def to_json(self, path: str | Path | None = None) -> str:
        """Return JSON text, and write it to ``path`` when given."""
        if path is not None:
            write_json(path, self.to_dict())
        return dumps(self.to_dict())

    def __rich__(self) -> Table | Group:
        return self.table()


def to_jsonable(value: Any) -> Any:
    """Turn dataclasses, paths, dtypes and array scalars into JSON types, infinities into strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity: "inf", "nan"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, str | int | bool):
        return value
    if hasattr(value, "item"):
        return to_jsonable(value.item())
    if hasattr(value, "__qualname__"):  # a function or class: by name, as its address differs at each start
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def dumps(value: Any) -> str:
    """Return ``value`` as indented JSON text, without NaN literals that strict parsers refuse."""
    return json.dumps(to_jsonable(value), indent=2, allow_nan=False)


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    return write_text(path, dumps(value) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` atomically (temporary file in the same folder, then rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide results from the group
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None = None
) -> Table:
    """Return a rich table; the first column is a label, the others are right-aligned figures."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else format_number(cell) for cell in row))
    return table


def format_number(value: Any) -> str:
    """Show a figure with three or four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    return (
        f"{value:.0f}"
        if size >= 1000
        else f"{value:.1f}"
        if size >= 100
        else f"{value:.2f}"
        if size >= 1
        else f"{value:.3f}"
    )


def megabytes(size: float) -> str:
    """Show bytes as MB (10^6)."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one axis: ``series`` maps a label to (x, y) lists."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    bars: bool = False  # one bar a series and x instead of lines
    x_names: Sequence[str] | None = None  # names of x = 0, 1, 2, ...
    reference: float | None = None  # a dashed horizontal line: the dense model
    log_y: bool = False


def save_plot(path: str | Path, charts: Sequence[Chart], caption: str = "") -> Path:
    """Draw ``charts`` side by side into a PNG (or whatever the suffix says).

    Raises RuntimeError that names the extra to install when matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}): pip install 'pysparse[plot]'") from None
    if not charts:
        raise ValueError("nothing to plot: no charts given")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(5.2 * len(charts), 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # no display, no global pyplot state
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        _draw(axes, chart)
    if caption:
        figure.supxlabel(caption, fontsize=7)
    figure.savefig(path, dpi=130)
    return path


def _draw(axes: Axes, chart: Chart) -> None:
    width = 0.8 / max(1, len(chart.series))
    for index, (label, (x, y)) in enumerate(chart.series.items()):
        if chart.bars:
            axes.bar(
                [value + (index - (len(chart.series) - 1) / 2) * width for value in x], y, width, label=label
            )
        else:
            axes.plot(x, y, marker="o", label=label)
    if chart.reference is not None:
        axes.axhline(chart.reference, linestyle="--", color="gray", label="dense")
    if chart.x_names is not None:
        axes.set_xticks(range(len(chart.x_names)), chart.x_names)
    if chart.log_y:
        axes.set_yscale("log")
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(axis="y", alpha=0.3)
    if len(chart.series) > 1 or chart.reference is not None:
        axes.legend(fontsize=8)
