"""What structured pruning did: widths, removed modules, the steps of the search."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from pysparse.measure.results import (
    Chart,
    Result,
    make_table,
    megabytes,
    save_plot,
    to_jsonable,
)
from pysparse.pruning.depth import Removal
from pysparse.pruning.parts import Block, parameters_of


@dataclass(frozen=True, slots=True)
class BlockChange:
    """One block, before and after."""

    path: str  # before: deleted blocks shift the ones behind
    width_before: int  # neurons of the FFN
    width: int
    parameters_before: int
    parameters: int
    attention: bool = True  # it still has one
    deleted: bool = False

    @classmethod
    def before(cls, block: Block) -> BlockChange:
        """Note a block that nothing has been done to."""
        size = parameters_of(block.module)
        return cls(block.path, block.ffn.width, block.ffn.width, size, size)

    def after(self, block: Block, attention_gone: bool, deleted: bool) -> BlockChange:
        """Note what became of it."""
        if deleted:
            return dataclasses.replace(self, width=0, parameters=0, attention=False, deleted=True)
        size = parameters_of(block.module)
        return dataclasses.replace(self, width=block.ffn.width, parameters=size, attention=not attention_gone)


@dataclass(frozen=True, slots=True)
class StructuralReport(Result):
    """What :func:`pysparse.pruning.prune_structure` did."""

    target: float  # share of the blocks' parameters that was to go
    recipe: dict[str, Any]
    blocks: tuple[BlockChange, ...]
    model_parameters: tuple[int, int]  # of the whole model, before and after
    steps: tuple[Removal, ...]  # of the search for attention modules
    scores: dict[str, float]  # of blocks, where the method ranks them
    calibration: dict[str, Any]
    seed: int
    seconds: dict[str, float]
    threads: int
    warnings: tuple[str, ...] = ()
    memory: dict[str, int | str] = field(default_factory=dict)  # bytes: the process at its largest

    @property
    def sparsity(self) -> float:
        """Share of the blocks' parameters that went, norms included in the total."""
        before = sum(one.parameters_before for one in self.blocks)
        return 1 - sum(one.parameters for one in self.blocks) / before

    @property
    def removed_attentions(self) -> tuple[str, ...]:
        """Paths of the attention modules that went, in the order of the search."""
        return tuple(step.path for step in self.steps)

    def table(self) -> Table:
        """Return a rich table, one line a block."""
        columns = ("block", "FFN neurons", "attention", "parameters", "of before")
        rows: list[tuple[Any, ...]] = [
            (
                one.path,
                "deleted" if one.deleted else f"{one.width_before} -> {one.width}",
                "kept" if one.attention else "removed",
                one.parameters, f"{one.parameters / one.parameters_before:.1%}",
            )
            for one in self.blocks
        ]  # fmt: skip
        total = sum(one.parameters for one in self.blocks)
        rows.append(("total", "", "", total, f"{1 - self.sparsity:.1%}"))
        title = f"{self.recipe['type']}: {self.sparsity:.2%} of the blocks' parameters removed"
        return make_table(title, columns, rows, "\n".join(self._remarks()))

    def _remarks(self) -> list[str]:
        before, after = self.model_parameters
        peak = self.memory.get("resident_peak")
        lines = [
            f"the model has {after:,} of {before:,} parameters; {self.seconds['total']:.1f} s"
            + (f", {megabytes(int(peak))} resident at most" if peak else ""),
            f"calibrated on {self.calibration['sequences']} sequences of {self.calibration['source']}",
        ]
        lines += [
            f"removed {step.path}: perplexity {step.perplexity:.4g}, best of {step.candidates}"
            for step in self.steps
        ]
        return [*lines, *self.warnings]

    def with_warnings(self, warnings: Sequence[str]) -> StructuralReport:
        """Return a copy with more warnings."""
        return dataclasses.replace(self, warnings=(*self.warnings, *warnings))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, totals first."""
        return {"sparsity": self.sparsity, **to_jsonable(self)}

    def plot(self, path: str | Path) -> Path:
        """Draw parameters by block and the perplexity of the search; RuntimeError without matplotlib."""
        share = [one.parameters / one.parameters_before for one in self.blocks]
        charts = [
            Chart(
                "parameters left by block",
                "block",
                "fraction",
                {"": (list(range(len(share))), share)},
                bars=True,
            )
        ]
        if self.steps:
            steps = (list(range(1, len(self.steps) + 1)), [step.perplexity for step in self.steps])
            charts.append(Chart("search", "attention modules removed", "perplexity", {"": steps}))
        return save_plot(path, charts, caption=self.recipe["type"])
