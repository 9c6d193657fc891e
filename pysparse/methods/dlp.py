"""DLP (Chen et al. 2025, "DLP: Dynamic Layerwise Pruning in Large Language Models"): by the median score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pysparse.methods.blockwise import (
    HIGHEST,
    ScoredBlock,
    band,
    by_block,
    check_half_width,
    to_layers,
)
from pysparse.pruning import Evidence
from pysparse.pruning.order_statistics import kth_smallest


@dataclass(frozen=True, slots=True)
class DLP:
    """A block whose typical Wanda score U is larger is pruned more.

    s_i = S + 2 * alpha * (U_i - mean U) / (max U - min U): the paper's normalization by the sum of U and its
    inversion to an importance drop out of the min-max step. U is a ``statistic`` of all scores of the block:
    "median" as in the paper (the lower of two middle ones), "mean" as the released code computes whatever it is
    asked for, or "max", "sum", "var", "std", which the paper tried and found worse.

    Differs from the paper: the mean is weighted by parameters, and rates that leave [0, ``highest``] are
    clipped with the rest moved to make up for it. With n:m the rates are rounded to an n for each layer, where
    the released code ignores them.
    """

    alpha: float = 0.15  # half the width of the band of sparsities
    statistic: str = "median"
    highest: float = HIGHEST  # sparsity that no block passes

    def __post_init__(self) -> None:
        check_half_width("alpha", self.alpha)
        if self.statistic not in BLOCK_STATISTICS:
            raise ValueError(f"statistic is one of {', '.join(BLOCK_STATISTICS)}, got {self.statistic!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The squared norms of the input channels of the dense model."""
        return ("squared_norm",)

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return the sparsity of each layer."""
        blocks = by_block("DLP", layers)
        unimportance = [BLOCK_STATISTICS[self.statistic](block) for block in blocks.values()]
        rates = self.rates(unimportance, [block.size for block in blocks.values()], target)
        return to_layers(layers, dict(zip(blocks, rates, strict=True)))

    def rates(self, unimportance: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """Return the sparsity of each block from its ``unimportance`` U and its number of weights."""
        return band(unimportance, sizes, target, self.alpha, self.highest)


def _sum(block: ScoredBlock) -> float:
    return sum(float(scores.sum(dtype=torch.float64)) for scores in block.scores())


def _mean(block: ScoredBlock) -> float:
    return _sum(block) / block.size


def _median(block: ScoredBlock) -> float:
    return kth_smallest(block.scores, (block.size + 1) // 2)


def _max(block: ScoredBlock) -> float:
    return max(float(scores.max()) for scores in block.scores())


def _variance(block: ScoredBlock) -> float:
    """Unbiased, from squared distances to the mean: a second pass, and no cancellation."""
    mean = _mean(block)
    squares = sum(float((scores.double() - mean).square_().sum()) for scores in block.scores())
    return squares / max(1, block.size - 1)


def _deviation(block: ScoredBlock) -> float:
    return math.sqrt(_variance(block))


BLOCK_STATISTICS: dict[str, Callable[[ScoredBlock], float]] = {
    "median": _median, "mean": _mean, "max": _max, "sum": _sum, "var": _variance, "std": _deviation,
}  # fmt: skip
