"""``pysparse shapley``: values of the players of a game that a Python file defines, the plan first."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pysparse.cli.options import Debug, Json, Seed
from pysparse.cli.output import emit, guarded, say


class Estimator(StrEnum):
    """Estimators by the names people type."""

    permutation = "permutation"
    stratified = "stratified"
    owen = "owen"
    banzhaf = "banzhaf"
    kernelshap = "kernelshap"
    exact = "exact"


class Inputs(StrEnum):
    """What a game gets its coalitions as."""

    numpy = "numpy"
    torch = "torch"


def shapley(
    game: Annotated[
        str,
        typer.Argument(
            help="FILE.py:FUNCTION; the function takes a NumPy array of bool [B, players] (True: takes part; see "
            "--inputs) and returns B numbers.",
            show_default=False,
        ),
    ],
    players: Annotated[int, typer.Option(min=1, help="How many players there are.")],
    budget: Annotated[int, typer.Option(min=1, help="Most evaluations of the game.")],
    estimator: Annotated[
        Estimator, typer.Option(help="How orders or coalitions are drawn.")
    ] = Estimator.permutation,
    stop: Annotated[
        float | None,
        typer.Option(help="End once the largest standard error is below this share of the spread."),
    ] = None,
    inputs: Annotated[
        Inputs, typer.Option(help="What the function is given: a NumPy array or a torch tensor.")
    ] = Inputs.numpy,
    batch_size: Annotated[int, typer.Option(min=1, help="Coalitions in one call.")] = 256,
    state: Annotated[
        Path | None, typer.Option(help="File of the progress; a run that finds one goes on.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan of evaluations and stop.")] = False,
    seed: Seed = 0,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Estimate Shapley (or Banzhaf) values within a budget of evaluations, with standard errors."""
    with guarded(debug):
        function = _function(game, inputs)
        from pysparse import shapley as library

        estimators: dict[str, Any] = {
            "permutation": library.Permutation(), "stratified": library.PositionStratified(),
            "owen": library.Owen(), "banzhaf": library.Banzhaf(), "kernelshap": library.KernelSHAP(),
            "exact": library.Exact(),
        }  # fmt: skip
        chosen = estimators[estimator.value]
        planned = chosen.plan(players, budget)
        say(f"{planned} evaluations at most, {batch_size} in a call")
        if dry_run:
            emit(f"plan: {planned} evaluations", json, {"evaluations": planned, "players": players})
            return
        options = library.Options(batch_size, stop, state=state)
        played = library.FunctionGame(function, players, inputs.value)
        found = chosen.estimate(played, budget, seed, options)
        content = {
            "estimator": found.estimator, "evaluations": found.evaluations, "seed": seed, "empty": found.empty,
            "full": found.full, "mean": found.mean.tolist(), "stderr": found.stderr.tolist(),
        }  # fmt: skip
        emit(_table(found), json, content)


def _function(place: str, inputs: Inputs) -> Any:
    """Return the function of ``FILE.py:FUNCTION``; what it raises tells in a note what it was given."""
    import runpy

    path, separator, name = place.rpartition(":")
    if not separator:
        raise ValueError(f"a game is FILE.py:FUNCTION, got {place!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}, of the game {place}")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise ValueError(f"{path} defines no function {name!r}")
    kind, other = ("NumPy array", "torch") if inputs is Inputs.numpy else ("torch tensor", "numpy")

    def played(coalitions: Any) -> Any:
        try:
            return function(coalitions)
        except Exception as error:
            error.add_note(
                f"{place} raised it for a {kind}, bool {list(coalitions.shape)}; --inputs {other} gives the other kind"
            )
            raise

    return played


def _table(found: Any) -> Any:
    from pysparse.measure.results import make_table

    lines = [
        [player, f"{mean:.6g}", f"{error:.2g}"]
        for player, (mean, error) in enumerate(zip(found.mean, found.stderr, strict=True))
    ]
    return make_table(f"{found.evaluations} evaluations", ["player", "value", "standard error"], lines)
