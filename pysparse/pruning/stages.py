"""Several methods one after the other as one recipe, and what became of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Group

from pysparse.measure.results import Result
from pysparse.pruning.recipe import Recipe
from pysparse.pruning.structural import StructuralMethod


class StageReport(Protocol):
    """What a stage reports."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What went otherwise than asked."""

    def table(self) -> Any:
        """Return something that rich can print."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""

    def plot(self, path: str | Path) -> Path:
        """Draw it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One method at one sparsity; None is the method's default or what its pattern implies."""

    method: Any  # a StructuralMethod, a Recipe, or an adaptation that has a runner in pysparse.api.stages
    sparsity: float | None = None


@dataclass(frozen=True, slots=True)
class StagedRecipe:
    """Stages in order: structure first, then zeros, then adaptation; each sees the model that the last one left.

    Statistics are collected anew in every stage. The sparsity of a later stage counts what the earlier left.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a recipe with stages needs at least one")
        ranks = [_rank(stage.method) for stage in self.stages]
        if ranks != sorted(ranks) or ranks.count(0) > 1:
            names = ", ".join(type(stage.method).__name__ for stage in self.stages)
            raise ValueError(
                f"stages go from structure (once) to zeros to adaptation, got {names}: neurons cut later would "
                "take the zeros with them"
            )


def _rank(method: Any) -> int:
    return 0 if isinstance(method, StructuralMethod) else 1 if isinstance(method, Recipe) else 2


@dataclass(frozen=True, slots=True)
class StagedReport(Result):
    """The reports of all stages."""

    stages: tuple[Any, ...]  # StageReport
    extra: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all stages."""
        return (*(text for one in self.stages for text in one.warnings), *self.extra)

    def table(self) -> Group:
        """Return a table a stage."""
        return Group(*(one.table() for one in self.stages))

    def with_warnings(self, warnings: Sequence[str]) -> StagedReport:
        """Return a copy with more warnings."""
        return dataclasses.replace(self, extra=(*self.extra, *warnings))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {"stages": [one.to_dict() for one in self.stages], "warnings": list(self.warnings)}

    def plot(self, path: str | Path) -> Path:
        """Draw a picture a stage, numbered; return the last one's path. RuntimeError without matplotlib."""
        place = Path(path)
        for number, one in enumerate(self.stages, start=1):
            place = one.plot(Path(path).with_stem(f"{Path(path).stem}-{number}"))
        return place
