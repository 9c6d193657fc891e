"""``pysparse suite``: grids of models, recipes and sparsities, resumable, and what changed between two runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pysparse.cli.options import Debug, Json
from pysparse.cli.output import EXIT_FAILED, emit, guarded, say
from pysparse.cli.suite_report import findings, report

if TYPE_CHECKING:
    from pysparse.suite.grid import Grid
    from pysparse.suite.records import Record

app = typer.Typer(
    help="Run every recipe on every model at every sparsity: quality beside measured speed and size.",
    no_args_is_help=True,
)
app.command()(report)
app.command()(findings)


@app.command("run")
def run(
    grid: Annotated[
        Path, typer.Argument(help="TOML file; benchmarks/grids/ has examples.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results. [default: suite_NAME]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the finished cells of an earlier run.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes, 0 is this one; timings are taken one at a time.")
    ] = 1,
    ray: Annotated[
        str | None, typer.Option(help="'local', or the address of a Ray cluster; needs pysparse[ray].")
    ] = None,
    cell: Annotated[str | None, typer.Option(help="Run this one again, by its id, in this process.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and run nothing.")] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Run a grid. Exit code 1 when a cell failed; its error is in its record, and the others went on."""
    with guarded(debug):
        from pysparse.suite.grid import load_grid
        from pysparse.suite.run import run_grid

        asked = load_grid(grid)
        if dry_run:
            _list_cells(asked, json)
            return
        folder = output or Path(f"suite_{asked.name}")
        with _progress() as on_cell:
            summary = run_grid(
                asked,
                folder,
                resume=resume,
                workers=0 if cell else workers,
                ray=ray,
                cell=cell,
                on_cell=on_cell,
            )
        emit(_overview(folder), json, summary)
        say(f"{summary.done} cells done, {summary.failed} failed, {summary.kept} kept; {folder}")
        if summary.failed:
            raise typer.Exit(EXIT_FAILED)


@app.command("list")
def list_names(json: Json = None, debug: Debug = False) -> None:
    """List the tasks with their models and options, and the methods, allocations and reconstructions of recipes."""
    with guarded(debug):
        from pysparse.suite.listing import known_names, names_table

        names = known_names()
        emit(names_table(names), json, names)


@app.command("compare")
def compare(
    first: Annotated[
        Path,
        typer.Argument(
            help="Folder of the run before, or its cells.jsonl (or .jsonl.gz).", show_default=False
        ),
    ],
    second: Annotated[Path, typer.Argument(help="Folder of the run after.", show_default=False)],
    everything: Annotated[bool, typer.Option("--all", help="Also what stayed within its noise.")] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Show what changed between two runs beyond their noise: seeds for quality, p10 to p90 for speed."""
    with guarded(debug):
        from pysparse.suite.compare import compare as compare_runs

        found = compare_runs(first, second)
        emit(found.table_of(found.changes) if everything else found, json, found.to_dict())


def _list_cells(grid: Grid, json: str | None) -> None:
    from pysparse.measure.results import make_table

    rows = [
        (one.id, one.task, one.model, one.recipe, one.pattern, f"{one.sparsity:.0%}", str(one.seed))
        for one in grid.cells
    ]
    columns = ["id", "task", "model", "recipe", "pattern", "sparsity", "seed"]
    caption = f"{len(grid.cells)} cells; {grid.skipped} taken out by skip rules"
    emit(
        make_table(grid.name, columns, rows, caption),
        json,
        [{"id": one.id, **one.to_dict()} for one in grid.cells],
    )


@contextmanager
def _progress() -> Iterator[Any]:
    """Say of each cell what came out, with what is left."""

    def on_cell(record: Record, done: int, total: int) -> None:
        setting = f"{record['task']} {record['model']} {record['recipe']} {record['pattern']} {record['sparsity']:.0%}"
        if record["status"] == "done":
            quality = record["quality"]
            found = f"{quality['metric']} {float(quality['value']):.4g} (dense {float(quality['dense']):.4g})"
        else:
            found = f"FAILED: {record['error']['type']}: {record['error']['message']}"
        say(f"[{done}/{total}] {setting} seed {record['seed']}: {found}, {record['seconds']:.1f} s")

    yield on_cell


def _overview(folder: Path) -> Any:
    from pysparse.suite.listing import results_table
    from pysparse.suite.records import read_records

    return results_table(read_records(folder))
