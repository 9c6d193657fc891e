"""Plots of the committed results, beside their JSON: speed-up against sparsity with the byte limit; a roofline."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from harness import RESULTS, read_runs
from matplotlib import pyplot as plt

mpl.use("Agg")
Row = dict[str, Any]
BASELINES = {
    "pysparse dense": "our dense kernel",
    "torch, no oneDNN": "torch, best setting",
    "torch": "torch",
}
SPARSE, PROBE = "pysparse sparse", "read probe"
MARKERS = {1: "o", 4: "s", 16: "^"}


def full_runs(pattern: str, folder: Path) -> Iterator[tuple[Path, Row]]:
    """Every run that was not quick, of the files that match."""
    for path in sorted(folder.glob(pattern)):
        yield from ((path, run) for run in read_runs(path) if not run["quick"])


def median_by_sparsity(rows: list[Row], figure: Any) -> tuple[list[float], list[float]]:
    """Sparsities, and the median of the figure over the rows (of several runs) that have it."""
    found: dict[float, list[float]] = {}
    for row in rows:
        value = figure(row)
        if value is not None:
            found.setdefault(row["sparsity"], []).append(value)
    return sorted(found), [statistics.median(found[sparsity]) for sparsity in sorted(found)]


def plot_speedups(path: Path, rows: list[Row]) -> Path | None:
    """Speed-up of the sparse kernel over each dense baseline, one panel a shape: bf16, one token, random zeros."""
    rows = [row for row in rows if (row["dtype"], row["tokens"], row["mask"]) == ("bf16", 1, "random")]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not shapes:
        return None
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(3.4 * len(shapes), 3.4), sharey=True, squeeze=False
    )
    for panel, shape in zip(panels[0], shapes, strict=True):
        mine = [row for row in rows if row["shape"] == shape]
        for name, label in BASELINES.items():
            line = median_by_sparsity(mine, lambda row, n=name: _median(row["sparse_speedup_over"].get(n)))
            panel.plot(*line, marker="o", label=f"over {label}")
        panel.plot(
            *median_by_sparsity(mine, lambda row: row["byte_limit"]), "k--", label="byte limit over dense"
        )
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=shape, xlabel="fraction of zeros")
    panels[0][0].set_ylabel("speed-up, bf16, 1 token, cold")
    panels[0][0].legend(fontsize=7)
    return _save(figure, path.with_name(path.stem + "_speedup.svg"))


def plot_roofline(path: Path, run: Row) -> Path | None:
    """Useful GFLOP/s of every engine against its useful operations per byte, under the measured limits."""
    rows = [row for row in run["rows"] if not row["cached"]]
    read = [row["engines"][PROBE]["gigabytes_per_second"] for row in rows]
    read = [rate for rate in read if rate]
    peaks = {name: peak for name, peak in run["protocol"]["peak_gigaflop_per_second"].items() if peak}
    if not read or not peaks:
        return None
    bandwidth = max(read)
    figure, panel = plt.subplots(figsize=(7, 4.6))
    engines = dict.fromkeys(name for row in rows for name in row["engines"] if name != PROBE)
    for index, name in enumerate(engines):
        color = mpl.colormaps["tab20"](index % 20)
        for tokens, marker in MARKERS.items():
            points = list(_roofline_points(rows, name, tokens))
            if points:
                label = name if tokens == min(row["tokens"] for row in rows) else None
                panel.scatter(*zip(*points, strict=True), s=18, marker=marker, color=color, label=label)
    intensities = [0.05 * 2 ** (step / 4) for step in range(48)]
    for name, peak in peaks.items():
        panel.plot(intensities, [min(peak, bandwidth * i) for i in intensities], "k-", linewidth=0.8)
        panel.annotate(
            f"{name} peak {peak:.0f} GFLOP/s", (intensities[-1], peak), ha="right", va="bottom", fontsize=7
        )
    panel.annotate(f"read {bandwidth:.0f} GB/s", (0.08, bandwidth * 0.08), rotation=35, fontsize=7)
    panel.set(
        xscale="log", yscale="log", xlabel="useful operations per byte of weight", ylabel="useful GFLOP/s"
    )
    panel.set_title(f"{run['machine'].get('cpu')}, cold weights; " + ", ".join(
        f"{marker} {tokens} tokens" for tokens, marker in MARKERS.items()), fontsize=8)  # fmt: skip
    panel.legend(fontsize=6, ncols=2, loc="upper left")
    return _save(figure, path.with_name(path.stem + "_roofline.svg"))


def _roofline_points(rows: list[Row], name: str, tokens: int) -> Iterator[tuple[float, float]]:
    for row in rows:
        one = row["engines"].get(name)
        if row["tokens"] == tokens and one and one["microseconds"]:
            rate = one["useful_gigaflop_per_second"]
            yield rate / one["gigabytes_per_second"], rate


def _median(spread: Row | None) -> float | None:
    return None if spread is None else float(spread["median"])


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    # Without the date and with fixed identifiers, an unchanged result gives an unchanged file.
    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plot.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the result files")
    folder = parser.parse_args(arguments).results
    drawn = []
    for path in sorted(folder.glob("linear_*.json")):
        rows = [row for _, run in full_runs(path.name, folder) for row in run["rows"]]
        drawn.append(plot_speedups(path, rows))
    drawn += [plot_roofline(path, run) for path, run in full_runs("rivals_*.json", folder)]
    for path in filter(None, drawn):
        print(path)


if __name__ == "__main__":
    main()
