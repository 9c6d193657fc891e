"""Methods that make a smaller dense model: what they are given, what they return, and the frame around them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pysparse.calib import Calibration, activations_in
from pysparse.calib.activations import Activations
from pysparse.measure.memory import peak_memory
from pysparse.measure.quality import evaluating
from pysparse.measure.results import to_jsonable
from pysparse.nn.structure import Structure, Surgery, record_structure
from pysparse.pruning.depth import Removal
from pysparse.pruning.influence import block_influences
from pysparse.pruning.journal import Journal
from pysparse.pruning.parts import Anatomy, shape_of
from pysparse.pruning.placement import check_device
from pysparse.pruning.probe import Seats
from pysparse.pruning.run import Execution, without_cache
from pysparse.pruning.structural_report import BlockChange, StructuralReport
from pysparse.pruning.width import neuron_scores

Advance = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True, slots=True)
class Cut:
    """What goes: of each block the width that stays, and indices of blocks."""

    widths: tuple[int, ...]
    attentions: tuple[int, ...] = ()  # blocks that lose their attention, in the order of the search
    blocks: tuple[int, ...] = ()  # blocks that go whole
    seats: tuple[Seats, ...] = ()  # of every block; empty when no attention goes
    steps: tuple[Removal, ...] = ()
    slots: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)  # of blocks, where the method ranks them


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A model on the bench: what a method works on and with."""

    anatomy: Anatomy
    calibration: Calibration
    surgery: Surgery  # all changes go through it: an error takes them back
    activations: Activations
    device: torch.device | None
    journal: Journal | None
    advance: Advance

    def neuron_scores(self) -> list[Tensor]:
        """Return each block's neuron scores, from the journal if an interrupted run had them."""
        paths = [block.path for block in self.anatomy.blocks]
        if self.journal is not None and self.journal.passed:
            kept = self.journal.recall_pass(0)
            return [kept[path] for path in paths]
        total = len(paths)
        scores = neuron_scores(
            self.anatomy, self.calibration, self.activations, self.device,
            lambda index: self.advance("scoring neurons", index + 1, total),
        )  # fmt: skip
        if self.journal is not None:
            self.journal.record_pass(0, dict(zip(paths, scores, strict=True)))
        return scores

    def influences(self) -> list[float]:
        """Return each block's influence, likewise."""
        total = len(self.anatomy.blocks)

        def compute() -> list[float]:
            return block_influences(
                self.anatomy, self.calibration, self.activations, self.device,
                lambda index: self.advance("scoring blocks", index + 1, total),
            )  # fmt: skip

        return self.remember("block influences", compute)  # type: ignore[no-any-return]

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what an interrupted run noted under ``name``, or compute and note it; it must be JSON-ready."""
        return compute() if self.journal is None else self.journal.remember(name, compute)


@runtime_checkable
class StructuralMethod(Protocol):
    """Chooses what goes, and cuts it out."""

    @property
    def default_samples(self) -> int:
        """Calibration sequences when the caller names no number."""

    def plan(self, anatomy: Anatomy, sparsity: float | None) -> tuple[float, Cut]:
        """Return the target and how much goes; which attentions or blocks is not known yet (indices from 0).

        ValueError for a rate that cannot be met. Looks at shapes alone.
        """

    def cut(self, bench: Bench, sparsity: float | None) -> Cut:
        """Change the model on the bench, through its surgery, and return what was done."""


def prune_structure(
    anatomy: Anatomy,
    method: StructuralMethod,
    sparsity: float | None,
    calibration: Calibration,
    *,
    seed: int = 0,
    execution: Execution | None = None,
    advance: Advance = lambda what, done, total: None,
    finish: Callable[[Cut, Surgery], None] = lambda cut, surgery: None,
) -> StructuralReport:
    """Make the model of ``anatomy`` smaller IN PLACE by ``method`` and return what was done.

    ``sparsity`` is the fraction of all parameters in the blocks, norms included, that goes. ``finish`` is called
    with what was done before the changes are final. After any error the model is what it was, modules, weights and
    config: the old weights are held until the end. Raises ValueError as the method does, and for missing calibration or
    a model without data.
    """
    where = Execution() if execution is None else execution
    device = check_device(anatomy.model, where.device)
    _check(anatomy, calibration)
    target, _ = method.plan(anatomy, sparsity)
    before = [BlockChange.before(block) for block in anatomy.blocks]
    total = sum(parameter.numel() for parameter in anatomy.model.parameters())
    start, surgery = time.perf_counter(), Surgery(anatomy.model)
    with (
        evaluating(anatomy.model), without_cache(anatomy.model), peak_memory() as memory,
        activations_in(where.activations, where.scratch) as activations,
    ):  # fmt: skip
        try:
            bench = Bench(anatomy, calibration, surgery, activations, device, where.journal, advance)
            cut = method.cut(bench, sparsity)
            record_structure(anatomy.model, structure_after(anatomy, cut, before), surgery)
            finish(cut, surgery)
        except BaseException:
            surgery.undo()
            raise
    seconds = {"total": time.perf_counter() - start}
    changes = [
        one.after(block, index in cut.attentions, index in cut.blocks)
        for index, (one, block) in enumerate(zip(before, anatomy.blocks, strict=True))
    ]
    left = sum(parameter.numel() for parameter in anatomy.model.parameters())
    return StructuralReport(
        target, describe_method(method), tuple(changes), (total, left), cut.steps, cut.scores, calibration.describe(),
        seed, seconds, torch.get_num_threads(), _warnings(calibration, cut, target, changes),
        {"resident_before": memory.before, "resident_peak": memory.peak, "since": memory.since},
    )  # fmt: skip


def _check(anatomy: Anatomy, calibration: Calibration | None) -> None:
    if calibration is None or not calibration.batches:
        raise ValueError("structured pruning measures activations and perplexity: pass calibration data")
    for name, parameter in anatomy.model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} has no data here (device meta, or offloaded): load the model into memory first"
            )


def _warnings(
    calibration: Calibration, cut: Cut, target: float, changes: Sequence[BlockChange]
) -> tuple[str, ...]:
    texts = list(calibration.warnings)
    texts += [
        f"step {number}: the perplexity without {path} is NaN or infinite; it was not chosen"
        for number, step in enumerate(cut.steps, start=1)
        for path in step.broken
    ]
    size = sum(one.parameters_before for one in changes)
    achieved = 1 - sum(one.parameters for one in changes) / size
    if abs(achieved - target) > 0.005:
        texts.append(f"{achieved:.2%} of the blocks' parameters went, {target:.2%} were asked for")
    return tuple(texts)


def structure_after(anatomy: Anatomy, cut: Cut, before: Sequence[BlockChange]) -> Structure | None:
    """Return how the model differs from its config now, or None when it does not."""
    seats = [cut.seats[index] for index in cut.attentions]
    removed = {
        block.attention[0]: next(name for name, _ in block.attention[1].named_parameters())
        for block in (anatomy.blocks[index] for index in cut.attentions)
    }
    shapes = {
        path: shape_of(module)
        for block, width, one in zip(anatomy.blocks, cut.widths, before, strict=True)
        if width != one.width_before
        for path, module in (*block.ffn.readers, block.ffn.writer)
    }
    idle = tuple(path for seat in seats for path in seat.idle)
    return Structure(removed, idle, cut.slots, shapes, seats[0].outputs if seats else 2) or None


def describe_method(method: StructuralMethod) -> dict[str, Any]:
    """Return a method as {"type": class name, field: value, ...}."""
    fields: dict[str, Any] = to_jsonable(method) if dataclasses.is_dataclass(method) else {}
    return {"type": type(method).__name__, **fields}
