"""The one layer loop: calibrate a block, prune its layers, lead the batches through, next block."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from pysparse.calib import Calibration, Collector, Replay
from pysparse.calib.statistics import Watched
from pysparse.measure.quality import evaluating
from pysparse.pruning.allocation import allocate
from pysparse.pruning.layout import BlockLayout, PrunableLayer
from pysparse.pruning.mixed import mixed_note, pattern_of
from pysparse.pruning.recipe import Evidence, Pruned, Recipe, Stats
from pysparse.pruning.report import PrunedLayer, PruneReport, describe_recipe, structure_warning
from pysparse.pruning.target import resolve_sparsity

_LOGGER = logging.getLogger("pysparse")

Propagate = Literal["pruned", "dense"]


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """A block is done."""

    index: int  # from 0
    total: int
    path: str
    layers: tuple[PrunedLayer, ...]
    seconds: float  # calibration and pruning of this block


@dataclass(slots=True)
class _Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def run(
    layout: BlockLayout,
    recipe: Recipe,
    sparsity: float | None = None,
    calibration: Calibration | None = None,
    *,
    propagate: Propagate = "pruned",
    seed: int = 0,
    callbacks: Sequence[Callable[[BlockEvent], None]] = (),
) -> PruneReport:
    """Prune the layers of ``layout`` IN PLACE by ``recipe`` and return what was done.

    Blocks are processed in order. The calibration batches run through a block to collect the statistics that
    the recipe needs, its layers are pruned, and the batches run again through the pruned block, so that the
    next block is calibrated on what it will really see (``propagate="dense"`` takes the first run's outputs
    instead, and saves the second). Statistics are held for one block at a time. A recipe without needs runs
    nothing at all. Modes, dtypes, devices, ``requires_grad``, ties and ``use_cache`` stay as they were.

    Masks are a function of weights and statistics, ties included. The statistics come from the model's own
    forward pass, whose last bits may depend on the number of threads and on the split into batches: a mask
    may then differ where two scores are equal to these last bits.

    ``sparsity`` may be None for 0.5, or what an n:m pattern implies. ``seed`` is only noted. Raises
    ValueError before anything is changed for a wrong sparsity or missing calibration; for activations that
    are not finite when the block is reached (earlier blocks are pruned by then, as a note on the error says).
    """
    target = resolve_sparsity(recipe.structure, sparsity)
    _check(layout, recipe, calibration, propagate)
    job = _Job(layout, recipe, calibration, propagate)
    start = time.perf_counter()
    with evaluating(layout.model), _without_cache(layout.model):
        budgets = dict(zip(layout.layers, allocate(recipe, job.evidence(), target), strict=True))
        layers: list[PrunedLayer] = []
        begin = time.perf_counter()
        for index, stats in job.walk(recipe.needs, propagate):
            done = job.prune_block(index, stats, budgets)
            layers += done
            now = time.perf_counter()
            event = BlockEvent(index, len(layout.blocks), layout.blocks[index][0], done, now - begin)
            begin = now
            for callback in callbacks:
                callback(event)
    job.clock.seconds["total"] = time.perf_counter() - start
    return job.report(target, layers, seed)


def gather_evidence(
    layout: BlockLayout, recipe: Recipe, calibration: Calibration | None = None
) -> list[Evidence]:
    """Return what the allocation of ``recipe`` looks at, as :func:`run` does: a pass over the dense model.

    Changes nothing. Raises ValueError as :func:`run` does for missing calibration or activations.
    """
    _check(layout, recipe, calibration, "dense")
    with evaluating(layout.model), _without_cache(layout.model):
        return _Job(layout, recipe, calibration, "dense").evidence()


def _check(layout: BlockLayout, recipe: Recipe, calibration: Calibration | None, propagate: str) -> None:
    if propagate not in ("pruned", "dense"):
        raise ValueError(f"propagate is 'pruned' or 'dense', got {propagate!r}")
    if recipe.needs_calibration and (calibration is None or not calibration.batches):
        needs = ", ".join((*recipe.needs, *recipe.allocation.needs))
        raise ValueError(f"this recipe needs statistics of activations ({needs}): pass calibration data")
    for layer in layout.layers:
        if layer.weight.is_meta:
            raise ValueError(
                f"{layer.path} has no data (device meta): load or un-offload the model before pruning"
            )


@dataclass(slots=True)
class _Job:
    layout: BlockLayout
    recipe: Recipe
    calibration: Calibration | None
    propagate: str
    clock: _Clock = field(default_factory=_Clock)
    warnings: dict[str, str] = field(default_factory=dict)  # layer path -> warning
    remarks: list[str] = field(default_factory=list)  # of reconstructions, with the layer's path

    def evidence(self) -> list[Evidence]:
        """Return what the allocation asked for: its statistics take a pass over the dense model."""
        if not self.recipe.allocation.needs:
            return [Evidence(layer, {}) for layer in self.layout.layers]
        found = {
            layer: Evidence(layer, layer_stats)
            for _, stats in self.walk(self.recipe.allocation.needs, "dense")
            for layer, layer_stats in stats.items()
        }
        return [found[layer] for layer in self.layout.layers]

    def walk(
        self, needs: Sequence[str], propagate: str
    ) -> Iterator[tuple[int, Mapping[PrunableLayer, Stats]]]:
        """Yield each block's index and statistics; the caller may prune it before asking for the next."""
        blocks = self.layout.blocks
        replay: Replay | None = None
        if needs and self.calibration is not None:
            with self.clock.timing("capture"):
                replay = Replay(self.layout.model, blocks, self.calibration.batches)
        for index in range(len(blocks)):
            layers = self.layout.layers_of(index)
            stats: dict[PrunableLayer, Stats] = {layer: {} for layer in layers}
            if replay is not None:
                with self.clock.timing("statistics"):
                    stats = self._collect(replay, index, layers, needs, propagate == "dense")
            yield index, stats
            if replay is not None and propagate == "pruned" and index + 1 < len(blocks):
                with self.clock.timing("propagate"):
                    replay.forward(index, advance=True)

    def _collect(
        self, replay: Replay, index: int, layers: Sequence[PrunableLayer], needs: Sequence[str], advance: bool
    ) -> dict[PrunableLayer, Stats]:
        watched = {one.path: Watched(one.module, one.shape[1], one.weight.device) for one in layers}
        collector = Collector(watched, needs)
        with collector.watching():
            replay.forward(index, advance=advance and index + 1 < len(self.layout.blocks))
        sequences = self.calibration.sequences if self.calibration else 0
        for layer in layers:
            if not collector.tokens(layer.path):
                self.warnings[layer.path] = "saw no calibration token: its inputs count as equally strong"
        try:
            return {layer: collector.values(layer.path, sequences) for layer in layers}
        except ValueError as error:
            error.add_note(f"{index} of {len(self.layout.blocks)} blocks had been processed")
            raise

    def prune_block(
        self, index: int, stats: Mapping[PrunableLayer, Stats], budgets: Mapping[PrunableLayer, float]
    ) -> tuple[PrunedLayer, ...]:
        """Prune the layers of one block in place."""
        with self.clock.timing("prune"):
            return tuple(self._prune(one, stats[one], budgets[one]) for one in self.layout.layers_of(index))

    def _prune(self, layer: PrunableLayer, stats: Stats, sparsity: float) -> PrunedLayer:
        start = time.perf_counter()
        recipe, weight = self.recipe, layer.weight.contiguous()
        structure = pattern_of(recipe.structure, sparsity)
        try:
            pruned = recipe.reconstruction.solve(weight, stats, recipe.importance, structure, sparsity)
            _check_pruned(pruned, layer)
        except ValueError as error:
            raise ValueError(f"{layer.path}: {error}") from error
        layer.write(pruned.weight)
        self.remarks += [f"{layer.path}: {text}" for text in pruned.warnings]
        zeros = layer.size - int(torch.count_nonzero(layer.weight))
        removed = layer.size - int(torch.count_nonzero(pruned.keep))
        warnings = tuple(filter(None, (self.warnings.get(layer.path), *pruned.warnings)))
        return PrunedLayer(
            layer.path, layer.block, layer.shape, str(structure), sparsity, removed, zeros,
            time.perf_counter() - start, warnings,
        )  # fmt: skip

    def report(self, target: float, layers: Sequence[PrunedLayer], seed: int) -> PruneReport:
        """Return the report, after logging each kind of warning once."""
        given = self.calibration if self.recipe.needs_calibration else None
        warnings = [*self.layout.warnings, *(given.warnings if given else ())]
        ragged = structure_warning(self.recipe.structure, self.layout.layers)
        unseen = (
            f"{len(self.warnings)} layers saw no calibration token, {next(iter(self.warnings))} first: their inputs "
            "count as equally strong"
        ) if self.warnings else None  # fmt: skip
        mixed = mixed_note(self.recipe.structure, [layer.requested for layer in layers])
        for text in filter(None, (ragged, unseen, mixed, *self.remarks)):
            _LOGGER.warning(text)
            warnings.append(text)
        return PruneReport(
            target, describe_recipe(self.recipe), tuple(layers), self.layout.skipped, self.layout.model_size,
            given.describe() if given else None, self.propagate, seed, dict(self.clock.seconds),
            torch.get_num_threads(), tuple(warnings),
        )  # fmt: skip


def _check_pruned(pruned: Pruned, layer: PrunableLayer) -> None:
    for name, tensor in (("weight", pruned.weight), ("keep", pruned.keep)):
        if tuple(tensor.shape) != layer.shape:
            raise ValueError(
                f"the reconstruction returned {name} of shape {tuple(tensor.shape)}, not {layer.shape}"
            )


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
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
