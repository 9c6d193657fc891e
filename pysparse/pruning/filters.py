"""Whole filters (output channels, rows of the weight) as the unit that goes or stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.pruning.structure import count_of


@dataclass(frozen=True, slots=True)
class Filters:
    """Rows of the weight go or stay as a whole: those with the least sum of scores go.

    The rows stay in place as zeros, as a mask; to make the model smaller is 2SSP's business. With Magnitude
    the sum is the L1 norm of a filter, with SquaredMagnitude its squared L2 norm.
    """

    @property
    def fixed_sparsity(self) -> float | None:
        """None: any number of rows can go."""
        return None

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Prune exactly floor(sparsity * rows) rows of ``scores`` [R, C]; of equal ones the lower index goes.

        Returns bool [R, C]. Raises ValueError when a score is NaN.
        """
        totals = scores.double().sum(dim=1)
        if bool(totals.isnan().any()):
            raise ValueError(f"{int(totals.isnan().sum())} of {len(totals)} rows have a score that is NaN")
        keep = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        keep[totals.argsort(stable=True)[: count_of(len(scores), sparsity)]] = False
        return keep[:, None].expand(scores.shape).contiguous()

    def pruned_count(self, rows: int, cols: int, sparsity: float) -> int:
        """Return how many weights of a [rows, cols] matrix are pruned."""
        return count_of(rows, sparsity) * cols

    def dense_columns(self, cols: int) -> int:
        """Return 0: every column can be pruned."""
        return 0

    def step(self, block_size: int) -> int:
        """Raise ValueError: a row is chosen by all of its columns, not by blocks of them."""
        raise ValueError(
            "filters are pruned as whole rows: a reconstruction by column blocks cannot choose them"
        )

    def keep_columns(self, scores: Tensor, sparsity: float, start: int) -> Tensor:
        """Raise ValueError, as :meth:`step`."""
        raise ValueError(
            "filters are pruned as whole rows: a reconstruction by column blocks cannot choose them"
        )

    def __str__(self) -> str:
        return "filters"
