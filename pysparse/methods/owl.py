"""OWL (Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL)", arXiv 2310.05175): outliers get density."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class OWL:
    """A block whose Wanda scores hold more outliers is pruned less.

    Outliers of a block are scores above ``m`` times its mean score; their share D in percent is mapped to a
    sparsity by s_i = S - (d_i - mean(d)) with d_i = 2 * lmbda * (D_i - min D) / (max D - min D). All linear
    layers of a block share its rate. The defaults are those of the paper's commands for 7B models.

    Differs from the paper: blocks of unequal size keep the mean weighted by parameters, and a rate that
    leaves [0, ``highest``] is clipped with the rest moved to make up for it (published code writes 0.01 and
    misses the target). With n:m the rates are rounded to an n for each layer (:class:`pysparse.pruning.MixedNM`);
    the paper's n:m form has a band of its own, in weights a group: lmbda = weights / (2 * m).
    """

    m: float = 5.0  # M of the paper: outliers are above m times the mean
    lmbda: float = 0.08  # half the width of the band of sparsities
    highest: float = HIGHEST  # sparsity that no block passes

    def __post_init__(self) -> None:
        if not (math.isfinite(self.m) and self.m > 0):
            raise ValueError(f"m, the outlier threshold in mean scores, must be above 0, got {self.m!r}")
        check_half_width("lmbda", self.lmbda)

    @property
    def needs(self) -> tuple[str, ...]:
        """The squared norms of the input channels of the dense model."""
        return ("squared_norm",)

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return the sparsity of each layer."""
        blocks = by_block("OWL", layers)
        shares = [outlier_percent(block, self.m) for block in blocks.values()]
        rates = self.rates(shares, [block.size for block in blocks.values()], target)
        return to_layers(layers, dict(zip(blocks, rates, strict=True)))

    def rates(self, outliers: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """Return the sparsity of each block from its share of ``outliers`` and its number of weights."""
        return band([-share for share in outliers], sizes, target, self.lmbda, self.highest)


def outlier_percent(block: ScoredBlock, m: float) -> float:
    """Return how many percent of a block's scores are above ``m`` times their mean."""
    mean = sum(float(scores.sum(dtype=torch.float64)) for scores in block.scores()) / block.size
    return 100.0 * sum(int((scores > m * mean).sum()) for scores in block.scores()) / block.size
