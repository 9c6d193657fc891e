"""How many (query row, key) pairs a selection computes: closed forms, so that no mask is ever made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pysparse.formats.stripe import BlockIndex, StripeIndex
from pysparse.ops.attention import AnchorRegion


class Bounds(NamedTuple):
    """Where one sequence lies: its first valid key, and its rows [first, end) counted from there."""

    start: int
    first: int
    end: int

    def rows_of(self, group: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return the first and one past the last row that this call has in each ``group`` of ``size`` positions."""
        first = (group * size).clamp(min=self.first, max=self.end)
        return first, torch.maximum(((group + 1) * size).clamp(max=self.end), first)


def causal_pairs(bounds: Bounds) -> int:
    """Return the pairs of exact causal attention for one head."""
    return _triangle(bounds.end) - _triangle(bounds.first)


def region_pairs(region: AnchorRegion, bounds: Bounds) -> int:
    """Return the pairs of one head that lie in the anchor region: causal pairs less the candidates."""
    size = region.group_size
    group = torch.arange(bounds.first // size, -(-bounds.end // size))
    first, end = bounds.rows_of(group, size)
    candidates = (group * size - region.local - region.init).clamp(min=0)
    return causal_pairs(bounds) - int((candidates * (end - first)).sum())


def stripe_pairs(index: StripeIndex, bounds: list[Bounds]) -> int:
    """Return the pairs of all lists: a stripe lies before its group, so each row of the group sees all of it."""
    total = 0
    group = torch.arange(index.shape[2])
    for counts, one in zip(index.counts, bounds, strict=True):
        first, end = one.rows_of(group, index.group_size)
        total += int((counts.cpu() * (end - first)).sum())
    return total


def block_pairs(index: BlockIndex, bounds: list[Bounds]) -> int:
    """Return the causal pairs of all lists."""
    total, lists = 0, index.shape[1] * index.shape[2]
    for b, one in enumerate(bounds):
        offsets = index.offsets[b * lists : (b + 1) * lists + 1].cpu()
        blocks = index.blocks[int(offsets[0]) : int(offsets[-1])].cpu().long()
        row_block = torch.arange(lists).remainder(max(1, index.shape[2])).repeat_interleave(offsets.diff())
        first, end = one.rows_of(row_block, index.block_q)
        column = blocks * index.block_k
        width = (one.end - column).clamp(min=0, max=index.block_k)
        total += int((_ramp(end - column, width) - _ramp(first - column, width)).sum())
    return total


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _ramp(rows: Tensor, width: Tensor) -> Tensor:
    """Return the sum of min(t, width) for t = 1..rows; 0 where rows is not positive."""
    short = rows.clamp(min=0).minimum(width)
    return short * (short + 1) // 2 + (rows - width).clamp(min=0) * width
