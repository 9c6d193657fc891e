"""What a structural method would do to a model, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from pysparse.measure.results import make_table, megabytes, to_jsonable
from pysparse.pruning.parts import Anatomy, parameters_of
from pysparse.pruning.structural import StructuralMethod, describe_method


@dataclass(frozen=True, slots=True)
class StructuralPlan:
    """Widths, and how many modules will go; which ones the calibration decides."""

    target: float
    recipe: dict[str, Any]
    width_before: int
    widths: tuple[int, ...]  # FFN neurons that each block keeps, but for deleted blocks
    attentions: int  # modules to remove, of len(widths)
    blocks: int  # to delete, of len(widths)
    parameters_before: int  # of all blocks
    removed: int  # parameters, unused norms not counted
    dense_bytes: int  # of the whole model before
    saved_bytes: int  # on disk and in memory

    @property
    def sparsity(self) -> float:
        """Share of the blocks' parameters that goes."""
        return self.removed / self.parameters_before

    def table(self) -> Table:
        """Return a rich table."""
        rows = [
            ("FFN neurons in a block", str(self.width_before), " or ".join(map(str, sorted(set(self.widths))))),
            ("attention modules", str(len(self.widths)), str(len(self.widths) - self.attentions - self.blocks)),
            ("blocks", str(len(self.widths)), str(len(self.widths) - self.blocks)),
            ("parameters of the blocks", f"{self.parameters_before:,}", f"{self.parameters_before - self.removed:,}"),
            ("model", megabytes(self.dense_bytes), megabytes(self.dense_bytes - self.saved_bytes)),
        ]  # fmt: skip
        asked = f"{self.target:.3%} asked for"
        caption = f"{self.recipe['type']}: {self.sparsity:.3%} of the blocks' parameters go, {asked}"
        return make_table("plan: nothing was touched", ("", "before", "after"), rows, caption)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, totals first."""
        return {"sparsity": self.sparsity, **to_jsonable(self)}

    def __rich__(self) -> Table:
        return self.table()


def plan_structure(anatomy: Anatomy, method: StructuralMethod, sparsity: float | None) -> StructuralPlan:
    """Return what ``method`` would do; the model may be on the meta device. ValueError if the rate cannot be met."""
    target, cut = method.plan(anatomy, sparsity)
    sizes = anatomy.sizes
    neurons = sum(sizes.width - width for width in cut.widths) * sizes.neuron
    deleted = sum(parameters_of(anatomy.blocks[index].module) for index in cut.blocks)
    removed = neurons + len(cut.attentions) * sizes.attention + deleted
    parameters = list(anatomy.model.parameters())
    item = next(one.element_size() for one in anatomy.blocks[0].module.parameters())
    return StructuralPlan(
        target, describe_method(method), sizes.width, cut.widths, len(cut.attentions), len(cut.blocks), sizes.main,
        removed, sum(one.numel() * one.element_size() for one in parameters), removed * item,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StagedPlan:
    """The plans of all stages."""

    stages: tuple[Any, ...]
    notes: tuple[str, ...] = ()

    def table(self) -> Group:
        """Return a table a stage."""
        return Group(*(one.table() for one in self.stages), *self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {"stages": [one.to_dict() for one in self.stages], "notes": list(self.notes)}

    def __rich__(self) -> Group:
        return self.table()


def removed_note(plans: Sequence[Any]) -> tuple[str, ...]:
    """Say what later plans suppose about modules that are not chosen yet."""
    unknown = any(isinstance(one, StructuralPlan) and (one.attentions or one.blocks) for one in plans)
    if not unknown or len(plans) < 2:
        return ()
    return (
        "which modules go is decided by the calibration: later stages are planned without the first ones",
    )
