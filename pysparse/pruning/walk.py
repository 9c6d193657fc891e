"""The way through the blocks: each on the compute device in turn, with the statistics of its layers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from pysparse.calib import Calibration, Collector, Ranks, Replay, Watched
from pysparse.calib.activations import Activations
from pysparse.calib.order import CallOrder
from pysparse.pruning.layout import BlockLayout, PrunableLayer
from pysparse.pruning.placement import on_device
from pysparse.pruning.recipe import Stats

LayerStats = Mapping[PrunableLayer, Sequence[Stats]]  # one mapping for each group of a layer's rows


@dataclass(slots=True)
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Add the time inside the block to ``phase``."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


@dataclass(slots=True)
class Walk:
    """Leads the calibration batches through the blocks of a model, as often as asked."""

    layout: BlockLayout
    calibration: Calibration | None
    activations: Activations
    device: torch.device | None
    ranks: Ranks
    clock: Clock = field(default_factory=Clock)
    warnings: dict[str, str] = field(default_factory=dict)  # layer path -> warning

    def blocks(
        self,
        needs: Sequence[str],
        propagate: str,
        done: int = 0,
        restore: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Iterator[LayerStats]]]:
        """Yield the index of each block and the statistics of its layers, which the caller may prune as they come.

        With ``propagate`` "pruned" the batches go on through the block as the caller left it, with "dense" as
        it was. "sequential" is "pruned" within the block too: its statistics come in parts, one for each group
        of layers that share an input, and those of a group see what the caller made of the groups before.

        The first ``done`` blocks are not yielded: ``restore`` makes of each what it became in an earlier run,
        and the batches go through it as they did then.
        """
        replay = self._replay(needs) if done < len(self.layout.blocks) else None
        last = len(self.layout.blocks) - 1
        for index, (_, block) in enumerate(self.layout.blocks):
            with on_device(block, self.device):
                if index < done:
                    self._repeat(replay if index < last else None, index, propagate, restore)
                    continue
                yield index, self._parts(replay, index, needs, propagate)
                if replay is not None and propagate != "dense" and index < last:
                    with self.clock.timing("propagate"):
                        replay.forward(index, advance=True, device=self.device)

    def _replay(self, needs: Sequence[str]) -> Replay | None:
        if not needs or self.calibration is None:
            return None
        with self.clock.timing("capture"):
            return Replay(
                self.layout.model, self.layout.blocks, self.calibration.batches, self.activations, self.ranks
            )

    def _repeat(
        self, replay: Replay | None, index: int, propagate: str, restore: Callable[[int], None] | None
    ) -> None:
        with self.clock.timing("resume"):
            if propagate != "dense" and restore is not None:
                restore(index)
            if replay is not None:
                replay.forward(index, advance=True, device=self.device)
            if propagate == "dense" and restore is not None:
                restore(index)

    def _parts(
        self, replay: Replay | None, index: int, needs: Sequence[str], propagate: str
    ) -> Iterator[LayerStats]:
        layers = self.layout.layers_of(index)
        if replay is None:
            yield {layer: ({},) * layer.groups for layer in layers}
            return
        advance = propagate == "dense" and index < len(self.layout.blocks) - 1
        order = CallOrder(_watched(layers)) if propagate == "sequential" else None
        stats = self._collect(replay, index, layers, needs, advance, order)
        if order is None:
            yield stats
            return
        by_path = {layer.path: layer for layer in layers}
        for number, paths in enumerate(self.ranks.gather(order.groups())[0]):
            group = [by_path[path] for path in paths]
            if number:
                stats = self._collect(replay, index, group, needs, advance)
            yield {layer: stats[layer] for layer in group}

    def _collect(
        self, replay: Replay, index: int, layers: Sequence[PrunableLayer], needs: Sequence[str], advance: bool,
        order: CallOrder | None = None,
    ) -> LayerStats:  # fmt: skip
        collector = Collector(_watched(layers), needs, self.ranks)
        ordering = nullcontext() if order is None else order.watching()
        with self.clock.timing("statistics"), collector.watching(), ordering:
            replay.forward(index, advance=advance, device=self.device, after_batch=collector.finish_batch)
        sequences = self.calibration.sequences if self.calibration else 0
        for layer in layers:
            if not collector.tokens(layer.path):
                self.warnings[layer.path] = "saw no calibration token: its inputs count as equally strong"
        try:
            return {layer: collector.values(layer.path, sequences) for layer in layers}
        except ValueError as error:
            error.add_note(f"{index} of {len(self.layout.blocks)} blocks had been processed")
            raise


def _watched(layers: Sequence[PrunableLayer]) -> dict[str, Watched]:
    return {one.path: Watched(one.module, one.shape[1], one.device, one.slots, one.routed) for one in layers}
