"""The way through the blocks: each on the compute device in turn, with the statistics of its layers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pysparse.calib import Calibration, Collector, Ranks, Replay, Watched
from pysparse.calib.activations import Activations
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
    ) -> Iterator[tuple[int, LayerStats]]:
        """Yield the index and statistics of each block; the caller may prune it before asking for the next.

        With ``propagate`` "pruned" the batches go on through the block as the caller left it, with "dense" as
        it was. The first ``done`` blocks are not yielded: ``restore`` makes of each what it became in an
        earlier run, and the batches go through it as they did then.
        """
        replay = self._replay(needs) if done < len(self.layout.blocks) else None
        last = len(self.layout.blocks) - 1
        for index, (_, block) in enumerate(self.layout.blocks):
            with on_device(block, self.device):
                if index < done:
                    self._repeat(replay if index < last else None, index, propagate, restore)
                    continue
                layers = self.layout.layers_of(index)
                stats: LayerStats = {layer: ({},) * layer.groups for layer in layers}
                if replay is not None:
                    with self.clock.timing("statistics"):
                        stats = self._collect(
                            replay, index, layers, needs, propagate == "dense" and index < last
                        )
                yield index, stats
                if replay is not None and propagate == "pruned" and index < last:
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
            if propagate == "pruned" and restore is not None:
                restore(index)
            if replay is not None:
                replay.forward(index, advance=True, device=self.device)
            if propagate == "dense" and restore is not None:
                restore(index)

    def _collect(
        self, replay: Replay, index: int, layers: Sequence[PrunableLayer], needs: Sequence[str], advance: bool
    ) -> LayerStats:
        watched = {
            one.path: Watched(one.module, one.shape[1], one.device, one.slots, one.routed) for one in layers
        }
        collector = Collector(watched, needs, self.ranks)
        with collector.watching():
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
