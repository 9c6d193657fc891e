"""The one layer loop: calibrate a block, prune its layers, lead the batches through, next block."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from pysparse.calib import Calibration, Ranks, activations_in
from pysparse.calib.activations import Place
from pysparse.measure.memory import PeakMemory, peak_memory
from pysparse.measure.quality import evaluating
from pysparse.pruning.allocation import allocate
from pysparse.pruning.journal import Journal
from pysparse.pruning.layout import BlockLayout, PrunableLayer
from pysparse.pruning.mixed import mixed_note
from pysparse.pruning.placement import check_device
from pysparse.pruning.recipe import Evidence, Recipe, Stats
from pysparse.pruning.report import (
    PrunedLayer,
    PruneReport,
    describe_recipe,
    shortfall_warning,
    structure_warning,
)
from pysparse.pruning.solve import merged, prune_layers
from pysparse.pruning.target import resolve_sparsity
from pysparse.pruning.walk import LayerStats, Walk

_LOGGER = logging.getLogger("pysparse")

Propagate = Literal["pruned", "dense", "sequential"]


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """A block is done."""

    index: int  # from 0
    total: int
    path: str
    layers: tuple[PrunedLayer, ...]
    seconds: float  # calibration and pruning of this block


@dataclass(frozen=True, slots=True)
class Execution:
    """Where a run computes and what it keeps where."""

    device: torch.device | str | None = None  # blocks are pruned on it one by one; None: where the model is
    activations: Place = "memory"  # or on "disk", one batch in memory
    scratch: str | Path | None = None  # folder for activations on disk; None: the system's temporary folder
    journal: Journal | None = None  # keeps the progress, and brings that of an interrupted run


def run(
    layout: BlockLayout,
    recipe: Recipe,
    sparsity: float | None = None,
    calibration: Calibration | None = None,
    *,
    propagate: Propagate = "pruned",
    seed: int = 0,
    callbacks: Sequence[Callable[[BlockEvent], None]] = (),
    execution: Execution | None = None,
) -> PruneReport:
    """Prune the layers of ``layout`` IN PLACE by ``recipe`` and return what was done.

    Blocks are processed in order. The calibration batches run through a block to collect the statistics that
    the recipe needs, its layers are pruned, and the batches run again through the pruned block, so that the
    next block is calibrated on what it will really see (``propagate="dense"`` takes the first run's outputs
    instead, and saves the second; ``propagate="sequential"`` runs them through the block again whenever the
    layers that share an input are pruned, so that later layers of the block see earlier ones pruned).
    Statistics are held for one block at a time. A recipe without needs runs nothing at all. Modes, dtypes,
    devices, ``requires_grad``, ties and ``use_cache`` stay as they were.
    ``execution`` says where this is computed and kept: on which device, activations in memory or on disk.

    Masks are a function of weights and statistics, ties included. The statistics come from the model's own
    forward pass, whose last bits may depend on the number of threads and on the split into batches: a mask
    may then differ where two scores are equal to these last bits. They do not depend on the number of
    processes: inside torch.distributed each rank calibrates on every n-th batch and solves every n-th layer
    of a block, sums are formed in the order of the batches, and all end with the same weights.

    ``sparsity`` may be None for 0.5, or what an n:m pattern implies. ``seed`` is only noted. Raises
    ValueError before anything is changed for a wrong sparsity, missing calibration, or weights that are not
    finite; for activations that are not finite when the block is reached (earlier blocks are pruned by then,
    as a note on the error says).
    """
    target = resolve_sparsity(recipe.structure, sparsity)
    where = Execution() if execution is None else execution
    device = check_device(layout.model, where.device)
    _check(layout, recipe, calibration, propagate)
    start = time.perf_counter()
    with (
        evaluating(layout.model),
        without_cache(layout.model),
        peak_memory() as memory,
        activations_in(where.activations, where.scratch) as activations,
    ):
        walk = Walk(layout, calibration, activations, device, Ranks.present())
        job = _Job(layout, recipe, walk, propagate, where.journal)
        budgets = dict(zip(layout.layers, job.budgets(target), strict=True))
        new = [layer for event in job.events(budgets, callbacks) for layer in event.layers]
        layers = [*job.restored, *new]
    walk.clock.seconds["total"] = time.perf_counter() - start
    return job.report(target, layers, seed, memory)


def gather_evidence(
    layout: BlockLayout,
    recipe: Recipe,
    calibration: Calibration | None = None,
    execution: Execution | None = None,
) -> list[Evidence]:
    """Return what the allocation of ``recipe`` looks at, as :func:`run` does: a pass over the dense model.

    Changes nothing. Raises ValueError as :func:`run` does for missing calibration or activations.
    """
    where = Execution() if execution is None else execution
    device = check_device(layout.model, where.device)
    _check(layout, recipe, calibration, "dense")
    with (
        evaluating(layout.model),
        without_cache(layout.model),
        activations_in(where.activations, where.scratch) as activations,
    ):
        walk = Walk(layout, calibration, activations, device, Ranks.present())
        return _Job(layout, recipe, walk, "dense", None).evidence()


def _check(layout: BlockLayout, recipe: Recipe, calibration: Calibration | None, propagate: str) -> None:
    if propagate not in get_args(Propagate):
        raise ValueError(f"propagate is one of {', '.join(get_args(Propagate))}, got {propagate!r}")
    if recipe.needs_calibration and (calibration is None or not calibration.batches):
        needs = ", ".join((*recipe.needs, *recipe.allocation.needs))
        raise ValueError(f"this recipe needs statistics of activations ({needs}): pass calibration data")
    for layer in layout.layers:
        if layer.weight.is_meta:
            raise ValueError(
                f"{layer.path} has no data (device meta) and accelerate does not keep it either: load the model first"
            )
        _require_finite(layer)


def _require_finite(layer: PrunableLayer) -> None:
    weight = layer.stored
    if not weight.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        return
    count = weight.numel() - int(torch.isfinite(weight).sum())
    raise ValueError(
        f"{layer.path}: {count} of {layer.size} weights are NaN or infinite: the checkpoint is damaged, or was "
        "converted to a dtype that is too narrow; nothing was changed"
    )


@dataclass(slots=True)
class _Job:
    layout: BlockLayout
    recipe: Recipe
    walk: Walk
    propagate: str
    journal: Journal | None
    restored: list[PrunedLayer] = field(default_factory=list)  # by an earlier run

    def budgets(self, target: float) -> list[float]:
        """Return the sparsity of each layer, from the journal if finding it took a pass of its own."""
        if self.journal is None or not self.recipe.allocation.needs:
            return allocate(self.recipe, self.evidence(), target)
        return self.journal.remember("sparsities", lambda: allocate(self.recipe, self.evidence(), target))

    def evidence(self) -> list[Evidence]:
        """Return what the allocation asked for: its statistics take a pass over the dense model."""
        needs, journal = self.recipe.allocation.needs, self.journal
        if not needs:
            return [Evidence(layer, {}) for layer in self.layout.layers]
        found: dict[PrunableLayer, Stats] = {}

        def recall(index: int) -> None:
            tensors = journal.recall_pass(index) if journal is not None else {}
            for layer in self.layout.layers_of(index):
                found[layer] = {name: tensors[f"{layer.path}:{name}"] for name in needs}

        passed = 0 if journal is None else journal.passed
        for index, parts in self.walk.blocks(needs, "dense", passed, recall):
            stats = next(parts)
            seen = {layer: merged(layer, one) for layer, one in stats.items()}
            found.update(seen)
            if journal is not None:
                journal.record_pass(
                    index,
                    {
                        f"{layer.path}:{name}": one
                        for layer, all_ in seen.items()
                        for name, one in all_.items()
                    },
                )
        return [Evidence(layer, found[layer]) for layer in self.layout.layers]

    def events(
        self, budgets: Mapping[PrunableLayer, float], callbacks: Sequence[Callable[[BlockEvent], None]]
    ) -> Iterator[BlockEvent]:
        """Prune block by block."""
        begin = time.perf_counter()
        journal, blocks = self.journal, self.layout.blocks
        earlier = 0 if journal is None else journal.done
        for index, parts in self.walk.blocks(self.recipe.needs, self.propagate, earlier, self._restore):
            done = self.prune_block(index, parts, budgets)
            if journal is not None:
                journal.record_block(index, blocks[index][1], done, self._unseen(done))
            now = time.perf_counter()
            event = BlockEvent(index, len(blocks), blocks[index][0], done, now - begin)
            begin = now
            for callback in callbacks:
                callback(event)
            yield event

    def _restore(self, index: int) -> None:
        if self.journal is not None:
            layers, unseen = self.journal.restore_block(index, self.layout.blocks[index][1])
            self.restored += layers
            self.walk.warnings.update(unseen)

    def _unseen(self, layers: Sequence[PrunedLayer]) -> dict[str, str]:
        return {one.path: self.walk.warnings[one.path] for one in layers if one.path in self.walk.warnings}

    def prune_block(
        self, index: int, parts: Iterator[LayerStats], budgets: Mapping[PrunableLayer, float]
    ) -> tuple[PrunedLayer, ...]:
        """Prune the layers of one block in place, as their statistics come."""
        done: dict[str, PrunedLayer] = {}
        unseen = self.walk.warnings
        for stats in parts:
            with self.walk.clock.timing("prune"):
                for one in prune_layers(list(stats), stats, budgets, self.recipe, self.walk.ranks):
                    remarks = (unseen[one.path], *one.warnings) if one.path in unseen else one.warnings
                    done[one.path] = dataclasses.replace(one, warnings=remarks)
        return tuple(done[layer.path] for layer in self.layout.layers_of(index))

    def report(
        self, target: float, layers: Sequence[PrunedLayer], seed: int, memory: PeakMemory
    ) -> PruneReport:
        """Return the report, after logging each kind of warning once."""
        walk = self.walk
        given = walk.calibration if self.recipe.needs_calibration else None
        warnings = [*self.layout.warnings, *(given.warnings if given else ())]
        ragged = structure_warning(self.recipe.structure, self.layout.layers)
        unseen = (
            f"{len(walk.warnings)} layers saw no calibration token, {next(iter(walk.warnings))} first: their inputs "
            "count as equally strong"
        ) if walk.warnings else None  # fmt: skip
        short = shortfall_warning(self.recipe.structure, layers, target)
        mixed = mixed_note(self.recipe.structure, [layer.requested for layer in layers])
        remarks = (
            f"{layer.path}: {text}"
            for layer in layers
            for text in layer.warnings[layer.path in walk.warnings :]
        )
        for text in filter(None, (ragged, short, unseen, mixed, *remarks)):
            _LOGGER.warning(text)
            warnings.append(text)
        return PruneReport(
            target, describe_recipe(self.recipe), tuple(layers), self.layout.skipped, self.layout.model_size,
            given.describe() if given else None, self.propagate, seed, dict(walk.clock.seconds),
            torch.get_num_threads(), tuple(warnings), memory=_peaks(memory, walk.device),
        )  # fmt: skip


def _peaks(memory: PeakMemory, device: torch.device | None) -> dict[str, int | str]:
    """Return the largest resident set of the process, and what the compute device held at most, in bytes."""
    peaks: dict[str, int | str] = {
        "resident_before": memory.before,
        "resident_peak": memory.peak,
        "since": memory.since,
    }
    if device is not None and device.type == "cuda":
        peaks["device_peak"] = torch.cuda.max_memory_allocated(device)
    return peaks


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Switch ``use_cache`` off in every config of the model: a cache would grow with each replay of a block."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = list({id(config): config for config in found if getattr(config, "use_cache", None)}.values())
    for config in configs:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True  # type: ignore[union-attr]
