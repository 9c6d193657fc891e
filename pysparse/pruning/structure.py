"""Patterns of zeros with exact counts: unstructured by row or matrix, and n of m."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pysparse import ops

_CHUNK = 1 << 22  # scores selected from at a time; the selection copies them with int64 indices


def count_of(size: int, sparsity: float) -> int:
    """Return floor(sparsity * size), the exact number of weights to prune of ``size``.

    The 1e-9 keeps 0.7 * 10 = 6.999999999999999 at 7.
    """
    return math.floor(sparsity * size + 1e-9)


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Any weight may go; weights compete within their output row or within the whole matrix."""

    group: Literal["row", "matrix"] = "row"

    def __post_init__(self) -> None:
        if self.group not in ("row", "matrix"):
            raise ValueError(f"group is 'row' or 'matrix', got {self.group!r}")

    @property
    def fixed_sparsity(self) -> float | None:
        """None: any sparsity is possible."""
        return None

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Prune exactly floor(sparsity * n) of each group of n; of equal scores the lower index goes first.

        ``scores`` is [R, C]; returns bool [R, C]. Raises ValueError when a score is NaN.
        """
        _check_scores(scores)
        rows, cols = scores.shape
        return self._keep(scores, self._count(rows, cols, sparsity))

    def select(self, weight: Tensor, scale: Tensor, sparsity: float) -> tuple[Tensor, Tensor] | None:
        """Return mask and pruned weight by a compiled kernel; it knows rows only."""
        if self.group != "row" or not ops.can_select(weight):
            return None
        return ops.select_rows(weight, scale, count_of(weight.shape[1], sparsity))

    def _keep(self, scores: Tensor, count: int) -> Tensor:
        if self.group == "row" and ops.can_select(scores):
            return ops.row_mask(scores, count)
        groups = scores if self.group == "row" else scores.reshape(1, -1)
        keep = torch.ones(groups.shape, dtype=torch.bool, device=scores.device)
        if count:
            rows = max(1, _CHUNK // groups.shape[1])
            for part, mask in zip(torch.split(groups, rows), torch.split(keep, rows), strict=True):
                mask.copy_(~_smallest(part, count))
        return keep.view(scores.shape)

    def pruned_count(self, rows: int, cols: int, sparsity: float) -> int:
        """Return how many weights of a [rows, cols] matrix are pruned."""
        return self._count(rows, cols, sparsity) * (rows if self.group == "row" else 1)

    def _count(self, rows: int, cols: int, sparsity: float) -> int:
        return count_of(cols if self.group == "row" else rows * cols, sparsity)

    def dense_columns(self, cols: int) -> int:
        """Return 0: every column can be pruned."""
        return 0

    def step(self, block_size: int) -> int:
        """Return ``block_size``: the weights of a block compete."""
        return block_size

    def keep_columns(self, scores: Tensor, sparsity: float, start: int) -> Tensor:
        """Keep the best of these columns, each row or all rows together.

        What has been pruned up to a column is floor(sparsity * weights so far), so the counts of the blocks,
        none off by more than one, add up to that of the matrix.
        """
        _check_scores(scores)
        rows, cols = scores.shape
        return self._keep(scores, self._count_between(rows, start, start + cols, sparsity))

    def sweep_pattern(
        self, shape: tuple[int, int], sparsity: float, block_size: int
    ) -> ops.SweepPattern | None:
        """Return the count of every block, of a row or of all rows together."""
        rows, cols = shape
        starts = range(0, cols, block_size)
        counts = [self._count_between(rows, i, min(i + block_size, cols), sparsity) for i in starts]
        return ops.SweepPattern(block_size, tuple(counts), self.group == "matrix")

    def _count_between(self, rows: int, start: int, end: int, sparsity: float) -> int:
        return self._count(rows, end, sparsity) - self._count(rows, start, sparsity)

    def __str__(self) -> str:
        return f"unstructured, by {self.group}"


@dataclass(frozen=True, slots=True)
class NM:
    """At most ``n`` weights are KEPT of every ``m`` consecutive inputs of a row, as hardware counts them.

    Groups start at multiples of m; a shorter group at the end of a row stays dense. (Some tools write the
    pair as n zeroed of m, which is the same only for 2:4, 4:8 and their kind.)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if type(value) is not int:
                raise TypeError(f"{name} of an n:m pattern is a whole number, got {value!r}")
        if not 0 < self.n < self.m <= 64:
            raise ValueError(f"an n:m pattern keeps 0 < n < m <= 64 weights, got {self.n}:{self.m}")

    @property
    def fixed_sparsity(self) -> float | None:
        """1 - n/m: the pattern leaves no choice."""
        return 1.0 - self.n / self.m

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Keep the ``n`` best of each group; of equal scores the lower index is pruned first.

        ``scores`` is [R, C]; returns bool [R, C]. Raises ValueError when a score is NaN, and when
        ``sparsity`` is not the pattern's 1 - n/m.
        """
        _check_scores(scores)
        self._check_sparsity(sparsity)
        if ops.can_select(scores):
            return ops.nm_mask(scores, self.n, self.m)
        keep = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
        whole = scores.shape[1] - self.dense_columns(scores.shape[1])
        groups = (
            scores[:, :whole].reshape(len(scores), -1, self.m).permute(2, 0, 1).contiguous()
        )  # [m, R, C/m]
        rank = torch.zeros(groups.shape, dtype=torch.int8, device=scores.device)
        for place in range(self.m):  # every weight counts who goes before it: no sort, and stable
            rank[: place + 1] += groups[place] < groups[: place + 1]
            rank[place + 1 :] += groups[place] <= groups[place + 1 :]
        keep[:, :whole] = (rank >= self.m - self.n).permute(1, 2, 0).reshape(len(scores), whole)
        return keep

    def select(self, weight: Tensor, scale: Tensor, sparsity: float) -> tuple[Tensor, Tensor] | None:
        """Return mask and pruned weight by a compiled kernel."""
        self._check_sparsity(sparsity)
        return ops.select_nm(weight, scale, self.n, self.m) if ops.can_select(weight) else None

    def _check_sparsity(self, sparsity: float) -> None:
        if abs(sparsity - (1.0 - self.n / self.m)) > 1e-6:
            raise ValueError(
                f"sparsity={sparsity} contradicts {self.n}:{self.m}, which is {1 - self.n / self.m:g}"
            )

    def pruned_count(self, rows: int, cols: int, sparsity: float) -> int:
        """Return how many weights of a [rows, cols] matrix are pruned."""
        return rows * (cols // self.m) * (self.m - self.n)

    def dense_columns(self, cols: int) -> int:
        """Return the width of the short group at the end of a row."""
        return cols % self.m

    def step(self, block_size: int) -> int:
        """Return m; ValueError when a group does not fit into a block."""
        if block_size < self.m:
            raise ValueError(f"block_size={block_size} has no room for a group of {self}")
        return self.m

    def keep_columns(self, scores: Tensor, sparsity: float, start: int) -> Tensor:
        """Keep n of every m of these columns; a group does not see the others."""
        return self.keep(scores, sparsity)

    def sweep_pattern(
        self, shape: tuple[int, int], sparsity: float, block_size: int
    ) -> ops.SweepPattern | None:
        """Return the pattern in blocks of whole groups."""
        self._check_sparsity(sparsity)
        return ops.SweepPattern(block_size // self.step(block_size) * self.m, n=self.n, m=self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores are a matrix, got shape {tuple(scores.shape)}")
    if scores.sum().isnan():  # a hint that costs one pass and no memory; infinities of both signs give it too
        count = int(scores.isnan().sum())
        if count:
            raise ValueError(f"{count} of {scores.numel()} scores are NaN: is the weight damaged?")


def _smallest(groups: Tensor, count: int) -> Tensor:
    """Mark exactly the ``count`` smallest of each row, of equal ones those with the lowest index."""
    threshold = _kth_smallest(groups, count)  # [G, 1]
    marked = groups <= threshold
    surplus = marked.sum(dim=1) - count  # [G]: ties with no place left, common in bfloat16
    rows = surplus.nonzero()[:, 0]
    if len(rows):
        tied, columns = (groups[rows] == threshold[rows]).nonzero(
            as_tuple=True
        )  # row by row, columns ascending
        counts = tied.bincount(minlength=len(rows))
        rank = torch.arange(len(tied), device=tied.device) - (counts.cumsum(0) - counts)[tied]
        late = rank >= (counts - surplus[rows])[tied]
        marked[rows[tied[late]], columns[late]] = False
    return marked


def _kth_smallest(groups: Tensor, count: int) -> Tensor:
    """Return the ``count``-th smallest of each row of ``groups`` [G, n] as [G, 1]."""
    bits = groups.view(torch.int32) if groups.dtype == torch.float32 and len(groups) == 1 else None
    if bits is None or groups.numel() < _CHUNK or bool(bits.min() < 0):
        return groups.kthvalue(count, dim=1, keepdim=True).values
    # One long row of floats without a sign: their bits are ordered as they are, so a histogram of the upper
    # halves finds the few that the answer is among, at a third of the time and memory of a selection.
    upper = bits[0] >> 16
    filled = upper.bincount().cumsum(0)
    place = int(torch.searchsorted(filled, count))
    before = int(filled[place - 1]) if place else 0
    return groups[0][upper == place].kthvalue(count - before).values.view(1, 1)
