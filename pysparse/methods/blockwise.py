"""What allocations by block share: the blocks, their Wanda scores, and the band around the target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.methods.wanda import Wanda
from pysparse.pruning import Evidence, project
from pysparse.pruning.allocation import require_weights

HIGHEST = 0.99  # sparsity that no layer passes unless told to: a layer without weights cuts the model


@dataclass(frozen=True, slots=True)
class ScoredBlock:
    """The layers of one block with their statistics; scores are made layer by layer, whenever they are read."""

    layers: tuple[Evidence, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(evidence.layer.size for evidence in self.layers)

    def scores(self) -> Iterator[Tensor]:
        """Yield Wanda's scores |w| * a of each layer, float32 [out_features, in_features]."""
        for evidence in self.layers:
            scores = Wanda()(evidence.layer.weight, evidence.stats)
            if not torch.isfinite(scores.sum(dtype=torch.float64)):
                raise ValueError(f"{evidence.layer.path}: the scores hold NaN or infinity")
            yield scores


def by_block(name: str, layers: Sequence[Evidence]) -> dict[int, ScoredBlock]:
    """Return the blocks that have prunable layers, by index; WeightsUnknownError on the meta device."""
    require_weights(name, layers)
    groups: dict[int, list[Evidence]] = {}
    for evidence in layers:
        groups.setdefault(evidence.layer.block, []).append(evidence)
    return {block: ScoredBlock(tuple(group)) for block, group in groups.items()}


def band(
    values: Sequence[float], sizes: Sequence[int], target: float, half_width: float, highest: float = HIGHEST
) -> list[float]:
    """Map ``values``, one a block, to sparsities: larger ones higher, in a band 2 * ``half_width`` wide.

    s_i = target + 2 * half_width * (v_i - mean(v)) / (max(v) - min(v)), then projected: the mean weighted by
    ``sizes`` is the target, and no sparsity leaves [0, max(highest, target)]. Equal values give the target.
    """
    low, high = min(values), max(values)
    if high == low:
        return [target] * len(values)
    unit = [(value - low) / (high - low) for value in values]  # first, for a mean of tiny values loses digits
    mean = sum(unit) / len(unit)
    raw = [target + 2 * half_width * (value - mean) for value in unit]
    return project(raw, sizes, target, 0.0, max(highest, target))


def check_half_width(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is in [0, 0.5]."""
    if not 0.0 <= value <= 0.5:
        raise ValueError(f"{name} is half the width of the band of sparsities, in [0, 0.5], got {value!r}")


def to_layers(layers: Sequence[Evidence], by_index: dict[int, float]) -> list[float]:
    """Return for each layer the value of its block."""
    return [by_index[evidence.layer.block] for evidence in layers]
