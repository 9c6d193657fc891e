"""A grid from beginning to end: which cells are left, who runs them, what becomes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pysparse.measure.results import write_text
from pysparse.suite.cells import Cell
from pysparse.suite.execute import Runner
from pysparse.suite.grid import Grid
from pysparse.suite.records import Record, Results, explaining_full_disk
from pysparse.suite.workers import run_in_processes

OnCell = Callable[[Record, int, int], None]
Execute = Callable[[Sequence[tuple[Cell, str]]], Iterator[Record]]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did."""

    done: int
    failed: int
    kept: int  # finished by an earlier run
    files: tuple[Path, ...]  # tables of all cells


def run_grid(
    grid: Grid, output: str | Path, *, resume: bool = False, workers: int = 1, ray: str | None = None,
    cell: str | None = None, on_cell: OnCell | None = None,
) -> Summary:  # fmt: skip
    """Run the cells of ``grid`` (or the one whose id is ``cell``) and keep each record as soon as it is there.

    ``workers`` processes run them, or with 0 this one; ``ray`` is "local" (then with so many CPUs) or the address of
    a cluster. Everything but times and memory is the same however cells are run. A cell that fails, or whose process
    dies twice, is recorded with its error and the others go on. With ``resume`` finished cells of an earlier run are
    kept, failed ones are run again. ``on_cell(record, done, total)`` is called after each.

    Raises ValueError for an ``output`` that holds cells already when not ``resume``, or an unknown ``cell``;
    DiskFullError when a record finds no room; ModuleNotFoundError for Ray where it is not installed.
    """
    results = Results(output)
    if workers < 0:
        raise ValueError(f"workers={workers}: at least 1, or 0 for this process")
    wanted = grid.cells if cell is None else (grid.cell(cell),)
    finished = _finished(results, resume or cell is not None)
    again = () if cell is None else (cell,)
    left = [one for one in wanted if one.id not in finished or one.id in again]
    with explaining_full_disk(results.folder):
        write_text(results.folder / "grid.toml", grid.text)
    failed = 0
    try:
        for count, record in enumerate(
            _executor(workers, ray)([(one, one.command(grid.path)) for one in left]), 1
        ):
            results.write(record)
            failed += record["status"] != "done"
            if on_cell is not None:
                on_cell(record, count, len(left))
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(
            f"the finished cells are kept in {results.cells}; --resume goes on with the others"
        )
        raise
    return Summary(len(left) - failed, failed, len(wanted) - len(left), tuple(results.write_tables()))


def _finished(results: Results, resume: bool) -> set[str]:
    """Return the ids of cells that are done; what an interrupted write left behind is removed."""
    for part in results.cells.glob("*.part"):
        part.unlink(missing_ok=True)
    records = results.read()
    if records and not resume:
        raise ValueError(
            f"{results.folder} holds {len(records)} cells already: go on with --resume, or pass another --output"
        )
    return {record["id"] for record in records if record["status"] == "done"}


def _executor(workers: int, ray: str | None) -> Execute:
    if ray is not None:
        from pysparse.suite.ray_workers import run_on_ray

        return lambda cells: run_on_ray(cells, ray, workers)
    if workers == 0:
        return _run_here
    return lambda cells: run_in_processes(cells, workers)


def _run_here(cells: Sequence[tuple[Cell, str]]) -> Iterator[Record]:
    runner = Runner()
    for cell, command in cells:
        yield runner(cell, command)
