"""Wanda's variant: rows lose the same share of their total score, and so different numbers of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.pruning.structure import Unstructured, count_of

_BY_COLUMNS = "the share of a row's total score is known for whole rows alone, not for blocks of columns"


@dataclass(frozen=True, slots=True)
class RowMass:
    """Each row loses its least scores up to one share alpha of its total; alpha is what the sparsity asks for.

    The variant of Wanda's released code (Sun et al. 2023). Differs from it: the code bisects alpha within
    [0, 0.8] until the sparsity is right to 0.001, and fails where a row has nothing below its share. Here every
    weight gets the share of its row's total that is pruned by the time it goes, and the floor(S * n) weights of
    the matrix with the least shares go: exact, any sparsity below 1, and the same masks where alpha is exact.
    """

    @property
    def fixed_sparsity(self) -> float | None:
        """None: any sparsity is possible."""
        return None

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Prune exactly floor(sparsity * R * C) of ``scores`` [R, C], which are not negative; returns bool [R, C].

        Of equal shares the lower index goes first. Raises ValueError when a score is NaN or negative.
        """
        wrong = ~(scores >= 0)
        if bool(wrong.any()):
            raise ValueError(f"{int(wrong.sum())} of {scores.numel()} scores are NaN or negative")
        return Unstructured("matrix").keep(_shares(scores), sparsity)

    def pruned_count(self, rows: int, cols: int, sparsity: float) -> int:
        """Return how many weights of a [rows, cols] matrix are pruned."""
        return count_of(rows * cols, sparsity)

    def dense_columns(self, cols: int) -> int:
        """Return 0: every column can be pruned."""
        return 0

    def step(self, block_size: int) -> int:
        """Raise ValueError: a reconstruction by blocks of columns cannot know a row's total."""
        raise ValueError(_BY_COLUMNS)

    def keep_columns(self, scores: Tensor, sparsity: float, start: int) -> Tensor:
        """Raise ValueError, as :meth:`step`."""
        raise ValueError(_BY_COLUMNS)

    def __str__(self) -> str:
        return "unstructured, by share of a row's score"


def _shares(scores: Tensor) -> Tensor:
    """Return for each score the sum of its row's scores up to it, in ascending order, over the row's total.

    Float64 [R, C]; in a row of zeros all shares are 0.
    """
    ordered, order = scores.double().sort(dim=1, stable=True)
    mass = ordered.cumsum(dim=1)
    shares = mass / mass[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    return torch.zeros_like(shares).scatter_(1, order, shares)
