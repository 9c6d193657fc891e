"""Masks as released code draws them where that differs from exact counts, to compare with its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pysparse.pruning.row_mass import RowMass
from pysparse.pruning.structure import Unstructured

_TOLERANCE = 1e-3  # of the sparsity, and of the bracket of alpha
_FIRST, _LARGEST = 0.4, 0.8  # alpha


@dataclass(frozen=True, slots=True)
class ReleasedThreshold(Unstructured):
    """Everything up to a threshold goes, all weights that equal it included.

    With ``counting`` "past" the threshold is the score at the 0-based place floor(S * n), one weight too many: so
    the released magnitude pruning (over a matrix) and SparseGPT (over each block of columns) count. With "up" it is
    the last of the n - floor((1 - S) * n) least: so PTSBench's masks count. Real counts are therefore at least
    :meth:`pruned_count`. Sparsity 0 prunes nothing here. No compiled kernel draws such masks.
    """

    group: Literal["row", "matrix"] = "matrix"
    counting: Literal["past", "up"] = "past"

    def __post_init__(self) -> None:
        Unstructured(self.group)  # the same choice
        if self.counting not in ("past", "up"):
            raise ValueError(f"counting is 'past' or 'up', got {self.counting!r}")

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return the mask of ``scores`` [R, C]; ValueError when one is NaN."""
        if bool(scores.isnan().any()):
            raise ValueError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN")
        groups = scores.reshape(1, -1) if self.group == "matrix" else scores
        size = groups.shape[1]
        count = int(size * sparsity) + 1 if self.counting == "past" else size - int((1.0 - sparsity) * size)
        if not sparsity or not count:
            return torch.ones_like(scores, dtype=torch.bool)
        threshold = groups.kthvalue(count, dim=1, keepdim=True).values
        return (groups > threshold).view(scores.shape)

    def keep_columns(self, scores: Tensor, sparsity: float, start: int) -> Tensor:
        """Return the mask of these columns, each block for itself."""
        return self.keep(scores, sparsity)

    def select(self, weight: Tensor, scale: Tensor, sparsity: float) -> None:
        """None: no compiled kernel."""

    def sweep_pattern(self, shape: tuple[int, int], sparsity: float, block_size: int) -> None:
        """None: no compiled sweep."""

    def __str__(self) -> str:
        return f"unstructured, by {self.group}, thresholds as released"


@dataclass(frozen=True, slots=True)
class ReleasedRowMass(RowMass):
    """Wanda's variant as released: alpha is bisected within [0, 0.8] until the sparsity is right to 0.001.

    A row loses what is up to the last value whose running sum is within alpha of the row's total, ties
    included, and nothing where its least value is more than that (the released code fails there). The
    sparsity is approximate, and sparsities that need an alpha above 0.8 are not reached.
    """

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return the mask of ``scores`` [R, C], which are not negative; ValueError when one is NaN or negative."""
        wrong = ~(scores >= 0)
        if bool(wrong.any()):
            raise ValueError(f"{int(wrong.sum())} of {scores.numel()} scores are NaN or negative")
        ordered = scores.sort(dim=1).values
        sums = ordered.cumsum(dim=1)
        low, high, alpha = 0.0, _LARGEST, _FIRST
        keep = _kept(scores, ordered, sums, alpha)
        while abs(_sparsity(keep) - sparsity) > _TOLERANCE and high - low >= _TOLERANCE:
            if _sparsity(keep) > sparsity:
                high, alpha = alpha, (alpha + low) / 2
            else:
                low, alpha = alpha, (alpha + high) / 2
            keep = _kept(scores, ordered, sums, alpha)
        return keep

    def __str__(self) -> str:
        return "unstructured, by share of a row's score, as released"


def _sparsity(keep: Tensor) -> float:
    return 1.0 - int(keep.count_nonzero()) / keep.numel()


def _kept(scores: Tensor, ordered: Tensor, sums: Tensor, alpha: float) -> Tensor:
    within = (sums <= alpha * sums[:, -1:]).sum(dim=1, keepdim=True)  # [R, 1] values within the share
    threshold = ordered.gather(1, (within - 1).clamp_min(0))
    return (scores > threshold) | (within == 0)
