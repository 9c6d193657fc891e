"""The plots as PNG and SVG files: quality against speed with the front, quality by sparsity, sparsity of the layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysparse.suite.report.rows import Record, Row, front, natural, rows_of
from pysparse.suite.report.summary import show_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f6fb4", "#b54c06", "#2a7f3b", "#7b4fb5", "#c0303a", "#117a84", "#85582e", "#b3428a")
_ACROSS = 4  # panels side by side
_MARKERS = {"unstructured": "o"}  # n:m is a diamond, what is left a square
_SAME = 0.005  # sparsity: profiles closer than this in every layer share a line


def save_plots(records: Iterable[Record], folder: str | Path) -> list[Path]:
    """Draw every task's plots into ``folder`` and return the files; a panel for each model.

    Raises RuntimeError that names the extra to install when matplotlib is missing, ValueError when no cell is done.
    """
    rows = rows_of(records)
    if not rows:
        raise ValueError("nothing to plot: no cell is done")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", task)
        speeds = [row for row in mine if row.speedup is not None and row.kept]
        measured = [row for row in mine if row.kept]
        layered = _one_setting([row for row in mine if row.cells[0]["layers"]])
        written += _save(folder / f"pareto-{name}", speeds, _pareto, _pace_label(speeds), "quality kept, %")
        written += _save(folder / f"quality-{name}", measured, _by_sparsity, "sparsity, %", "quality kept, %")
        setting = f"layer, at {show_setting(layered[0].pattern, layered[0].sparsity)}" if layered else ""
        written += _save(folder / f"layers-{name}", layered, _layers, setting, "sparsity of the layer, %")
    return written


def _save(
    path: Path,
    rows: list[Row],
    panel: Callable[[Axes, list[Row], Callable[[Row], str]], None],
    x_label: str,
    y_label: str,
) -> list[Path]:
    """Draw small multiples with shared axes and one legend; no date, so that the same run gives the same file."""
    if not rows:
        return []
    mpl, figure_class = _matplotlib()
    models = sorted({row.model for row in rows}, key=natural)
    across = min(_ACROSS, len(models))
    down = math.ceil(len(models) / across)
    with mpl.rc_context({"svg.hashsalt": path.name, "font.size": 9, "text.parse_math": False}):
        figure = figure_class(figsize=(max(4.2, 2.9 * across), 2.5 * down + 0.9), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharex=panel is not _layers, sharey=True)
        key = "allocation" if panel is _layers else _color_key(rows)
        colors = _colors(rows, key)

        def color(row: Row) -> str:
            return colors[str(getattr(row, key))]

        for axes, model in zip(panels.flat, models, strict=False):
            panel(axes, [row for row in rows if row.model == model], color)
            _dress(axes, model)
        for axes in list(panels.flat)[len(models) :]:
            axes.remove()
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        handles = [
            mpl.lines.Line2D([], [], color=c, marker="o", linestyle="", label=n) for n, c in colors.items()
        ]
        figure.legend(
            handles=handles, loc="outside upper left", ncols=min(8, len(handles)), frameon=False, fontsize=8
        )
        files = [path.with_name(path.name + suffix) for suffix in (".svg", ".png")]
        figure.savefig(files[0], metadata={"Date": None})
        figure.savefig(files[1], dpi=130)
    return files


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, fontweight="bold", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8, labelbottom=True)


def _pareto(axes: Axes, rows: list[Row], color: Callable[[Row], str]) -> None:
    axes.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    points = [(row.speedup or 0.0, 100 * row.kept.median if row.kept else 0.0) for row in rows]
    best = front(points)
    for index, (row, point) in enumerate(zip(rows, points, strict=True)):
        marked = index in best
        axes.plot(*point, marker=_marker(row), color=color(row), markersize=5 if marked else 4,
                  alpha=1 if marked else 0.35, linestyle="")  # fmt: skip
    axes.step(
        *_transposed([points[index] for index in best]), where="pre", color="black", alpha=0.5, linewidth=0.9
    )


def _by_sparsity(axes: Axes, rows: list[Row], color: Callable[[Row], str]) -> None:
    axes.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    for recipe in dict.fromkeys(row.recipe for row in rows):
        mine = [row for row in rows if row.recipe == recipe and row.kept]
        for pattern in dict.fromkeys(row.pattern for row in mine):
            line = [row for row in mine if row.pattern == pattern]
            spread = [(100 * row.sparsity, row.kept) for row in line if row.kept]
            x = [sparsity for sparsity, _ in spread]
            tone = color(line[0])
            style = "-" if pattern == "unstructured" else ""
            axes.plot(x, [100 * kept.median for _, kept in spread], color=tone, marker=_marker(line[0]), markersize=3,
                      linewidth=1, linestyle=style, alpha=0.8)  # fmt: skip
            axes.vlines(x, [100 * kept.low for _, kept in spread], [100 * kept.high for _, kept in spread], color=tone,
                        linewidth=0.8)  # fmt: skip


def _layers(axes: Axes, rows: list[Row], color: Callable[[Row], str]) -> None:
    drawn: list[list[float]] = []
    for row in rows:
        profile = [float(layer["sparsity"]) for layer in row.cells[0]["layers"]]
        if any(len(other) == len(profile) and _close(other, profile) for other in drawn):
            continue
        drawn.append(profile)
        axes.plot([100 * value for value in profile], color=color(row), linewidth=1.1, alpha=0.9,
                  marker="o" if len(profile) < 3 else "", markersize=3)  # fmt: skip
    axes.set_ylim(-3, 103)


def _close(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(abs(a - b) < _SAME for a, b in zip(first, second, strict=True))


def _one_setting(rows: list[Row]) -> list[Row]:
    """Return the rows of the middle sparsity of the grid, unstructured where there is that."""
    plain = [row for row in rows if row.pattern == "unstructured"] or rows
    settings = sorted(
        {(row.pattern, row.sparsity) for row in plain}, key=lambda setting: (setting[1], setting[0])
    )
    if not settings:
        return []
    chosen = settings[len(settings) // 2]
    return [row for row in plain if (row.pattern, row.sparsity) == chosen]


def _pace_label(rows: list[Row]) -> str:
    names = ", ".join(dict.fromkeys(row.paces[0].name for row in rows))
    return f"speed-up over dense: {names}"


def _color_key(rows: list[Row]) -> str:
    """Return what the colours stand for: the recipe while there are colours enough, the method beyond."""
    return "recipe" if len({row.recipe for row in rows}) <= len(COLORS) else "method"


def _colors(rows: list[Row], key: str) -> dict[str, str]:
    names = sorted({str(getattr(row, key)) for row in rows}, key=natural)
    return {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}


def _marker(row: Row) -> str:
    return _MARKERS.get(row.pattern, "D" if re.fullmatch(r"\d+:\d+", row.pattern) else "s")


def _transposed(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib as mpl
        import matplotlib.lines
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}): pip install 'pysparse[plot]'") from None
    return mpl, Figure
