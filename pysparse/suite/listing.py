"""What can be named in a grid, and what came out of one, as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table

from pysparse.measure.results import make_table
from pysparse.methods import ALLOCATIONS, METHODS, STRUCTURAL
from pysparse.suite.cells import RecipeSpec
from pysparse.suite.recipes import GRANULARITIES, LEARNED
from pysparse.suite.records import Record
from pysparse.suite.tasks import TASKS, task_for


def known_names() -> dict[str, Any]:
    """Return the names that a grid may use; a task whose extra is missing has the reason instead of its models."""
    return {
        "tasks": {name: _task(name) for name in TASKS},
        "methods": sorted(METHODS),
        "methods that make a smaller model": sorted(STRUCTURAL),
        "allocations": [*ALLOCATIONS, LEARNED],
        "reconstructions": list(GRANULARITIES),
        "keys of a recipe": [field.name for field in dataclasses.fields(RecipeSpec)],
    }


def _task(name: str) -> dict[str, Any]:
    try:
        task: Any = task_for(name)
    except ModuleNotFoundError as error:
        return {"missing": str(error)}
    options = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    return {"models": list(task.models()), "takes_paths": task.takes_paths, "options": options}


def names_table(names: Mapping[str, Any]) -> Group:
    """Return :func:`known_names` for people."""
    rows = [
        (
            name, task.get("missing") or ", ".join([*task["models"], *["FOLDER"] * task["takes_paths"]]),
            ", ".join(f"{key}={value}" for key, value in task.get("options", {}).items()),
        )
        for name, task in names["tasks"].items()
    ]  # fmt: skip
    words = [(key, ", ".join(values)) for key, values in names.items() if key != "tasks"]
    return Group(
        make_table("tasks", ["task", "models", "options"], rows),
        make_table("recipes", ["what", "names"], words),
    )


def results_table(records: Sequence[Record]) -> Table:
    """Return one line a setting: medians over its seeds."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record["status"] == "done":
            key = tuple(record[name] for name in ("task", "model", "pattern", "sparsity", "recipe"))
            groups.setdefault(key, []).append(record)
    rows = [_row(key, group) for key, group in sorted(groups.items())]
    columns = ["task and model", "recipe", "zeros", "quality", "dense", "file of dense", "speed-up", "seeds"]
    failed = sum(record["status"] != "done" for record in records)
    return make_table("suite", columns, rows, f"medians over seeds; {failed} cells failed")


def _row(key: tuple[Any, ...], group: Sequence[Record]) -> tuple[Any, ...]:
    task, model, pattern, sparsity, recipe = key
    first = group[0]["quality"]
    ratios: dict[str, list[float]] = {}
    for record in group:
        for speed in record["speed"]:
            ratios.setdefault(speed["name"], []).append(speed["ratio"])
    return (
        f"{task} {model}", recipe, f"{sparsity:.0%}" if pattern == "unstructured" else pattern,
        f"{first['metric']} {median(float(one['quality']['value']) for one in group):.4g}",
        f"{float(first['dense']):.4g}",
        f"{median(one['file_bytes']['sparse'] / one['file_bytes']['dense'] for one in group):.1%}",
        ", ".join(f"{name} {median(values):.2f}x" for name, values in ratios.items()) or "-", len(group),
    )  # fmt: skip
