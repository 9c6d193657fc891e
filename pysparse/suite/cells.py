"""One cell of a grid: what is run, under an id that depends on nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
UNSTRUCTURED = "unstructured"
_NAMED = ("method", "allocation", "reconstruction")  # parts of a recipe that records hold by their names


@dataclass(frozen=True, slots=True)
class RecipeSpec:
    """A recipe of a grid: pysparse's own words for what is done to a model."""

    method: str = "wanda"  # a name of pysparse.methods.METHODS or STRUCTURAL, with settings after ":"
    allocation: str | None = (
        None  # a name of ALLOCATIONS, or "fcpts"; settings after ":"; None is the method's own
    )
    reconstruction: str | None = (
        None  # "op", "layer" or "block", settings after ":": survivors tuned after pruning
    )
    fold_batch_norm: bool = False  # into the convolutions, before pruning
    recalibrate: bool = False  # statistics of batch normalisation, after pruning
    propagate: str = "pruned"
    compat: str | None = None
    num_samples: int | None = None  # calibration sequences, for texts
    max_length: int | None = None  # tokens of each

    @property
    def settings(self) -> dict[str, Any]:
        """What is set beyond method, allocation and reconstruction."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                 if getattr(self, field.name) != field.default}  # fmt: skip
        return {name: value for name, value in given.items() if name not in _NAMED}


@dataclass(frozen=True, slots=True)
class Cell:
    """A model, a recipe, a sparsity, a pattern and a seed, and how they are measured."""

    task: str
    model: str
    recipe: str  # its name in the grid
    spec: RecipeSpec
    pattern: str  # "unstructured" or "n:m"
    sparsity: float
    seed: int
    threads: int  # torch threads of everything in the cell
    options: tuple[tuple[str, Any], ...] = field(default=())  # of the task, sorted by name
    timed: bool = True  # whether speed is measured

    @property
    def id(self) -> str:
        """16 hexadecimal digits: the same for the same cell, in any grid and on any machine."""
        content = {"schema": SCHEMA, **self.to_dict()}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_dict` reads back."""
        return dataclasses.asdict(self) | {"options": dict(self.options)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Cell:
        """Return the cell that :meth:`to_dict` described."""
        options = tuple(sorted((key, _frozen(value)) for key, value in content["options"].items()))
        return cls(**{**content, "spec": RecipeSpec(**content["spec"]), "options": options})

    def command(self, grid: str) -> str:
        """Return the command that runs this cell alone."""
        return f"pysparse suite run {grid} --cell {self.id}"

    def __str__(self) -> str:
        pattern = "" if self.pattern == UNSTRUCTURED else f" {self.pattern}"
        return f"{self.task} {self.model} {self.recipe}{pattern} {self.sparsity:.0%} seed {self.seed}"


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
