"""A grid as TOML: which cells are run. Everything in it is checked before anything runs.

name = "quick"
threads = 1                      # of torch, in every cell: figures may depend on their number in the last bits

[recipes.wanda]                  # see RecipeSpec; every key is optional
[recipes.sparsegpt-owl]
method = "sparsegpt"
allocation = "owl:m=7"

[tasks.language]                 # options of a task
windows = 16

[[cells]]                        # the product of its lists; several such tables add up
task = "language"
models = ["demo", "path/to/model"]
recipes = ["wanda"]              # all of the grid's when left out
sparsities = [0.5, 0.7]
patterns = ["unstructured", "2:4"]   # "n:m" (n kept) has the sparsity 1 - n/m, once
seeds = [0, 1, 2]

[[skip]]                         # cells that all of a rule's keys match; text may hold *
recipe = "sparsegpt*"
sparsity = [0.9]
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils.hub import cached_file

from pysparse.methods.registry import lookup
from pysparse.models.sources import check_source
from pysparse.pruning import check_sparsity
from pysparse.suite.cells import UNSTRUCTURED, Cell, RecipeSpec
from pysparse.suite.recipes import implied_sparsity, plan_for
from pysparse.suite.tasks import Task, task_for

T = TypeVar("T")
_LIMIT = 1 << 18  # bytes of a file: a grid has some hundred lines
_MOST = 100_000  # cells
_TOP = {
    "name": str,
    "threads": int,
    "timed": bool,
    "recipes": dict,
    "tasks": dict,
    "cells": list,
    "skip": list,
}
_CELLS: dict[str, type] = {
    "task": str, "models": list, "recipes": list, "sparsities": list, "patterns": list, "seeds": list,
    "threads": int, "timed": bool,
}  # fmt: skip
_SKIP = {"task": "task", "model": "model", "recipe": "recipe", "pattern": "pattern", "sparsity": "sparsity",
         "seed": "seed"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grid:
    """What a file asks for."""

    name: str
    path: str  # as it was given; part of each cell's command
    cells: tuple[Cell, ...]
    skipped: int  # cells that a rule took out
    text: str  # of the file

    def cell(self, id: str) -> Cell:
        """Return the cell of that id; ValueError with the closest one for an unknown id."""
        return lookup("cell", id, {cell.id: cell for cell in self.cells})


def load_grid(path: str | Path) -> Grid:
    """Read a grid file.

    Raises FileNotFoundError, or ValueError that names the file, the place in it and, for an unknown name or key, the
    closest known one; ModuleNotFoundError for a task whose extra is not installed.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"no such grid file: {path}")
    if place.stat().st_size > _LIMIT:
        raise ValueError(f"{path} has {place.stat().st_size} bytes: a grid has at most {_LIMIT}")
    try:
        return parse_grid(place.read_text(encoding="utf-8"), str(path))
    except ValueError as error:  # UnicodeDecodeError and TOMLDecodeError are ones
        raise ValueError(f"{path}: {error}") from None


def parse_grid(text: str, path: str = "GRID.toml") -> Grid:
    """Return the grid that TOML ``text`` describes; raises what :func:`load_grid` does."""
    content = tomllib.loads(text)
    _check_keys("a grid", content, _TOP)
    if not content.get("cells"):
        raise ValueError("a grid needs at least one [[cells]] table")
    rules = [
        _rule(f"[[skip]] {number}", rule) for number, rule in enumerate(content.get("skip", []), start=1)
    ]
    reader = _Reader(content, rules)
    cells: dict[str, Cell] = {}
    for number, block in enumerate(content["cells"], start=1):
        for cell in reader.cells(f"[[cells]] {number}", block):
            cells.setdefault(cell.id, cell)
            if len(cells) > _MOST:
                raise ValueError(f"the grid has more than {_MOST} cells")
    if not cells:
        raise ValueError(f"no cell is left: the skip rules take out all {reader.skipped}")
    name = content.get("name", Path(path).stem)
    return Grid(name, path, tuple(cells.values()), reader.skipped, text)


class _Reader:
    """Turns tables of cells into cells, with the tasks and recipes of the grid at hand."""

    def __init__(self, content: Mapping[str, Any], rules: Sequence[Mapping[str, Sequence[Any]]]) -> None:
        self._rules = rules
        self.skipped = 0
        self._threads = _positive("threads", content.get("threads", 1))
        self._timed = content.get("timed", True)
        self._options = {
            name: _typed(f"[tasks.{name}]", options, dict)
            for name, options in content.get("tasks", {}).items()
        }
        for name, options in self._options.items():
            task_for(name, options)
        self._specs = {name: _spec(name, spec) for name, spec in content.get("recipes", {}).items()}
        if not self._specs:
            raise ValueError("a grid needs at least one [recipes.NAME]")
        self._checked: set[tuple[str, str, float]] = set()

    def cells(self, where: str, block: Any) -> Iterator[Cell]:
        """Yield the product of one table's lists, each checked."""
        block = _typed(where, block, dict)
        _check_keys(where, block, _CELLS)
        for key in ("task", "models"):
            if key not in block:
                raise ValueError(f"{where} needs '{key}'")
        name = block["task"]
        options = self._options.get(name, {})
        task = task_for(name, options)
        models = [_model(where, task, model) for model in _list(where, block, "models", str)]
        for model in models:
            task.require(model)
        recipes = _list(where, block, "recipes", str, list(self._specs))
        targets = list(_targets(where, block))
        seeds = _list(where, block, "seeds", int, [0])
        threads = _positive(f"{where} threads", block.get("threads", self._threads))
        timed = block.get("timed", self._timed)
        chosen = tuple(sorted((key, _frozen(value)) for key, value in options.items()))
        for model, recipe, (pattern, sparsity), seed in product(models, recipes, targets, seeds):
            spec = lookup(f"recipe in {where}", recipe, self._specs)
            cell = Cell(name, model, recipe, spec, pattern, sparsity, seed, threads, chosen, timed)
            if any(_matches(rule, cell) for rule in self._rules):
                self.skipped += 1
                continue
            self._check(cell)
            yield cell

    def _check(self, cell: Cell) -> None:
        """Build what the cell will do, once for each recipe and target."""
        known = (cell.recipe, cell.pattern, cell.sparsity)
        if known in self._checked:
            return
        try:
            plan_for(cell)
        except ValueError as error:
            target = f"at {cell.pattern} {cell.sparsity:g}"
            raise ValueError(f"[recipes.{cell.recipe}] {target}: {error}") from None
        self._checked.add(known)


def _targets(where: str, block: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (pattern, sparsity): every sparsity unstructured, and each n:m once with its own."""
    for pattern in _list(where, block, "patterns", str, [UNSTRUCTURED]):
        implied = implied_sparsity(pattern)
        if implied is not None:
            yield pattern, implied
            continue
        for sparsity in _list(where, block, "sparsities", float):
            yield pattern, check_sparsity(sparsity)


def _model(where: str, task: Task, name: str) -> str:
    """Return ``name`` when the task has such a model, or it is one of Hugging Face that is there."""
    known = dict.fromkeys(task.models(), name)
    folder = Path(name).expanduser().is_dir()
    if name in known or not (task.takes_paths and (folder or "/" in name)):
        also = ", which also takes the folder of a model" if task.takes_paths else ""
        return lookup(f"model in {where} for task '{task.name}'{also}:", name, known)
    try:
        cached_file(check_source(name), "config.json")
    except OSError as error:
        raise ValueError(f"{where}: model '{name}': {' '.join(str(error).split())[:300]}") from None
    return name


def _spec(name: str, content: Any) -> RecipeSpec:
    where = f"[recipes.{name}]"
    fields = {field.name: field for field in dataclasses.fields(RecipeSpec)}
    given = _typed(where, content, dict)
    for key, value in given.items():
        kind = str(lookup(f"key of {where}", key, fields).type)
        wanted = {"str": str, "int": int, "bool": bool}[kind.split(" ")[0]]
        _typed(f"{where} {key}", value, wanted)
    for key in ("num_samples", "max_length"):
        if key in given:
            _positive(f"{where} {key}", given[key])
    return RecipeSpec(**given)


def _rule(where: str, content: Any) -> dict[str, list[Any]]:
    rule = _typed(where, content, dict)
    if not rule:
        raise ValueError(f"{where} is empty: it would take out every cell")
    for key in rule:
        lookup(f"key of {where}", key, _SKIP)
    return {key: value if isinstance(value, list) else [value] for key, value in rule.items()}


def _matches(rule: Mapping[str, Sequence[Any]], cell: Cell) -> bool:
    return all(any(_same(value, getattr(cell, key)) for value in values) for key, values in rule.items())


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(found, str):
        return fnmatchcase(found, str(wanted))
    return bool(isinstance(wanted, int | float) and abs(wanted - found) < 1e-9)


def _check_keys(where: str, content: Mapping[str, Any], known: Mapping[str, type]) -> None:
    for key, value in content.items():
        _typed(f"{key} of {where}", value, lookup(f"key of {where}", key, known))


def _list(
    where: str, block: Mapping[str, Any], key: str, kind: type[T], default: list[T] | None = None
) -> list[T]:
    """Return a list of ``kind`` without repetitions; ValueError when it is empty or missing."""
    values = block.get(key, default)
    if not values:
        raise ValueError(f"{where} needs a list '{key}' that is not empty")
    for value in values:
        allowed: tuple[type, ...] = (float, int) if kind is float else (kind,)
        if type(value) not in allowed:
            raise ValueError(f"{where}: {key} holds {value!r}, expected {kind.__name__}")
    return list(dict.fromkeys(values))


def _typed(where: str, value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise ValueError(f"{where} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _positive(where: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{where} is a whole number of at least 1, got {value!r}")
    return value


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
