"""The quick grid of `pysparse suite`: language modelling, embedding and zero-shot, quality beside speed and size."""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness import Run, command_line, show

from pysparse.suite.grid import Grid, load_grid
from pysparse.suite.listing import results_table
from pysparse.suite.records import read_records
from pysparse.suite.run import run_grid

GRIDS = Path(__file__).resolve().parent / "grids"
KEPT = (
    "id", "status", "error", "task", "model", "family", "recipe", "allocation", "reconstruction", "pattern", "sparsity",
    "seed", "quality", "achieved_sparsity", "prune_seconds", "peak_memory_bytes", "file_bytes", "speed",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("suite", __doc__ or "")
    parser.add_argument("--grid", type=Path, default=GRIDS / "quick.toml")
    parser.add_argument(
        "--folder", type=Path, help="where cells are kept; a second run resumes. Default: nowhere"
    )
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    grid = load_grid(options.grid)
    if options.quick:
        grid = Grid(grid.name, grid.path, grid.cells[:1], grid.skipped, grid.text)
    this = Run.start("suite", options)
    with tempfile.TemporaryDirectory(prefix="pysparse-bench-") as work:
        folder = options.folder or Path(work) / "suite"
        run_grid(grid, folder, resume=True, workers=0 if options.quick else options.workers)
        records = read_records(folder)
    protocol = {"grid": grid.name, "cells": len(records), "threads": grid.cells[0].threads}
    path = this.save(protocol, [{key: record[key] for key in KEPT} for record in records])
    show(results_table(records), path=path)


if __name__ == "__main__":
    main()
