"""Rows of the report: the cells of a run that differ in the seed only, with medians and ranges over the seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from pysparse.methods import ALLOCATIONS, METHODS
from pysparse.pruning import Keep
from pysparse.suite.recipes import GRANULARITIES, own_reconstruction

Record = Mapping[str, Any]
_Identity = tuple[str, str, str, str, str, str, str, str, float, str]


@dataclass(frozen=True, slots=True)
class Statistic:
    """Median, lowest and highest of the seeds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Statistic | None:
        """Return the statistic of those values that are numbers; None when there are none."""
        known = [value for value in values if value is not None and not math.isnan(value)]
        return cls(median(known), min(known), max(known)) if known else None

    @property
    def half_range(self) -> float:
        """Half the distance from the lowest to the highest."""
        return 0.0 if self.low == self.high else (self.high - self.low) / 2

    def overlaps(self, other: Statistic) -> bool:
        """Tell whether the two ranges share a value."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, slots=True)
class Pace:
    """One workload's speed over the seeds: dense and sparse in ``unit``, and sparse over dense."""

    name: str
    unit: str
    dense: float
    sparse: float
    ratio: float  # median of the seeds' ratios; over 1 is faster than dense
    ratio_p10: float  # lowest p10 and highest p90 of the seeds
    ratio_p90: float


@dataclass(frozen=True, slots=True)
class Row:
    """One recipe on one model at one pattern and sparsity, all its seeds."""

    task: str
    model: str
    family: str
    recipe: str
    method: str
    allocation: str
    reconstruction: str
    pattern: str
    sparsity: float
    protocol: str  # see :func:`protocol_of`
    cells: tuple[Record, ...]  # that are done, by seed

    @property
    def metric(self) -> str:
        """Name of what was measured."""
        return str(self.cells[0]["quality"]["metric"])

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        return bool(self.cells[0]["quality"]["higher_is_better"])

    @property
    def quality(self) -> Statistic | None:
        """The metric."""
        return Statistic.of(number(cell["quality"]["value"]) for cell in self.cells)

    @property
    def dense(self) -> Statistic | None:
        """The metric of the dense model."""
        return Statistic.of(number(cell["quality"]["dense"]) for cell in self.cells)

    @property
    def kept(self) -> Statistic | None:
        """Share of the dense quality that is left, see :func:`quality_kept`."""
        return Statistic.of(quality_kept(cell["quality"]) for cell in self.cells)

    @property
    def file_ratio(self) -> Statistic | None:
        """Bytes of the sparse file over those of the dense one."""
        return Statistic.of(file_ratio(cell) for cell in self.cells)

    @property
    def paces(self) -> tuple[Pace, ...]:
        """Speeds by workload, in the order of the first cell; the first one stands for the row."""
        found = [speed for cell in self.cells for speed in cell["speed"] or ()]
        return tuple(
            pace(name, [speed for speed in found if speed["name"] == name])
            for name in dict.fromkeys(str(speed["name"]) for speed in found)
        )

    @property
    def speedup(self) -> float | None:
        """Ratio of the first workload; None where nothing was timed."""
        return next((one.ratio for one in self.paces), None)

    def measured(self, key: str) -> Statistic | None:
        """Return the statistic of a number that every cell holds, such as ``prune_seconds``."""
        return Statistic.of(number(cell[key]) for cell in self.cells)


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Return the rows of the records that are done: by task, model, pattern, sparsity and recipe.

    A file of a cell whose speed was not measured simply has no :attr:`Row.paces`.
    """
    groups: dict[_Identity, list[Record]] = {}
    for record in records:
        if record["status"] == "done":
            groups.setdefault(_identity(record), []).append(record)
    found = [
        Row(*identity, tuple(sorted(cells, key=lambda cell: (cell["seed"], cell["id"]))))
        for identity, cells in groups.items()
    ]
    return sorted(found, key=lambda row: (row.task, natural(row.model), *_setting(row), natural(row.recipe)))


def _identity(record: Record) -> _Identity:
    return (
        record["task"], record["model"], record["family"] or "", record["recipe"], record["method"],
        allocation_of(record), record["reconstruction"] or "none", record["pattern"], record["sparsity"],
        protocol_of(record),
    )  # fmt: skip


def _setting(row: Row) -> tuple[Any, ...]:
    return (row.pattern != "unstructured", natural(row.pattern), row.sparsity)


def natural(text: str) -> tuple[Any, ...]:
    """Return a sorting key by which "resnet8" comes before "resnet20"."""
    parts = re.split(r"(\d+)", str(text).lower())
    return tuple(int(part) if part.isascii() and part.isdigit() else part for part in parts)


def allocation_of(record: Record) -> str:
    """Return the allocation of a record; of one that left it to the method, the name of the method's own."""
    given = record["allocation"]
    if given:
        return str(given)
    recipe = METHODS.get(str(record["method"]))
    own = None if recipe is None else recipe.allocation
    return next((name for name, known in ALLOCATIONS.items() if known == own), "the method's own")


def method_of(record: Record) -> str:
    """Return what chooses the mask of a record: of "pot", which corrects the survivors of "magnitude", the latter."""
    return _plain_method(str(record["method"]))


def reconstruction_of(record: Record) -> str:
    """Return what is done to the survivors of a mask that another recipe may leave as they are; "none" for nothing.

    What a method does while it chooses the mask (SparseGPT's update) is part of the method.
    """
    given, method = str(record["reconstruction"] or "none"), str(record["method"])
    tuned = given if given.partition(":")[0] in GRANULARITIES else ""
    own = "" if _plain_method(method) == method else own_reconstruction(METHODS[method])
    return ", ".join(filter(None, (own, tuned))) or "none"


@cache
def _plain_method(name: str) -> str:
    """Return the method with the same scores and structure that leaves survivors as they are, else ``name``."""
    recipe = METHODS.get(name)
    if recipe is None or recipe.reconstruction == Keep():
        return name
    plain = dataclasses.replace(recipe, reconstruction=Keep())
    return next(
        (other for other, known in METHODS.items()
         if dataclasses.replace(known, allocation=plain.allocation) == plain),
        name,
    )  # fmt: skip


def protocol_of(record: Record) -> str:
    """Return the task's options and the threads of a record as text: cells are compared at equal ones only."""
    environment = record["environment"] or {}
    return json.dumps([environment.get("options"), environment.get("torch_threads")], sort_keys=True)


def number(value: Any) -> float | None:
    """Return a number of a record; "inf" and "nan" are text there, as JSON has no word for them."""
    return None if value is None else float(value)


def quality_kept(quality: Mapping[str, Any]) -> float | None:
    """Return value over dense where higher is better, dense over value where lower is: 1 is as good as dense.

    An infinite perplexity keeps nothing, 0. None where the ratio has no meaning: a figure is not a number, or the
    dense one is not above zero, or a value that should be low is not.
    """
    value, dense = number(quality["value"]), number(quality["dense"])
    if value is None or dense is None or math.isnan(value) or not 0 < dense < math.inf:
        return None
    if quality["higher_is_better"]:
        return value / dense if math.isfinite(value) else None
    return dense / value if value > 0 else None


def file_ratio(cell: Record) -> float | None:
    """Return bytes of the sparse file over those of the dense one; None where they were not measured."""
    sizes = cell["file_bytes"]
    if not sizes or not sizes.get("dense") or sizes.get("sparse") is None:
        return None
    return float(sizes["sparse"] / sizes["dense"])


def pace(name: str, speeds: Sequence[Mapping[str, Any]]) -> Pace:
    """Return the workload's speed over the seeds."""

    def middle(key: str) -> float:
        return float(median(float(speed[key]) for speed in speeds))

    return Pace(
        name, str(speeds[0]["unit"]), middle("dense"), middle("sparse"), middle("ratio"),
        min(float(speed["ratio_p10"]) for speed in speeds), max(float(speed["ratio_p90"]) for speed in speeds),
    )  # fmt: skip


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (x, y) that no other is as good as in both and better in one, by x.

    Larger is better in both. Equal points are all in.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    found: list[int] = []
    best = -math.inf
    for index in order:
        if points[index][1] > best or (found and points[index] == points[found[-1]]):
            found.append(index)
            best = max(best, points[index][1])
    return found[::-1]
