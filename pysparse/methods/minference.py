"""MInference's vertical-slash pattern (Jiang et al. 2024, arXiv 2407.02490): heavy columns and heavy diagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.attention import AttentionInput, AttentionPlan
from pysparse.attention.checks import check_block, check_count
from pysparse.attention.probe import Probe
from pysparse.attention.selection import as_index, causal_blocks, diagonal_blocks
from pysparse.formats.stripe import StripeIndex


@dataclass(frozen=True, slots=True)
class VerticalSlash:
    """Compute ``vertical`` single keys and ``slash`` diagonals, chosen by the last ``probe`` rows of the call.

    Diagonals are computed as the blocks they cross; the first block and the row's own are always among them.
    Differs from the paper: the same sizes for every head, instead of a file of patterns made off line.
    """

    vertical: int = 1024
    slash: int = 2048
    probe: int = 64
    block: int = 128

    def __post_init__(self) -> None:
        check_count("vertical", self.vertical)
        check_count("slash", self.slash)
        check_count("probe", self.probe, least=1)
        check_block(self.block)

    @property
    def crossover(self) -> int:
        """Twice the keys of a row's budget."""
        return 2 * (self.vertical + self.slash)

    def plan(self, given: AttentionInput) -> AttentionPlan:
        """Return the blocks of the diagonals, and as stripes the columns that lie outside them."""
        masks, columns = [], []
        for query, key, first in given.sequences():
            probe = Probe.of(query, key, given.scale, self.probe)
            masks.append(self._diagonals(probe.slashes(), first, query.shape[1]))
            chosen = probe.verticals().topk(min(self.vertical, key.shape[1])).indices
            columns.append(chosen.sort(-1).values)
        blocks = as_index(given, masks, self.block)
        return AttentionPlan(blocks=blocks, stripes=self._stripes(given, blocks.to_mask(), columns))

    def _diagonals(self, mass: Tensor, first: int, rows: int) -> Tensor:
        heads, keys = mass.shape
        begin = first // self.block
        size = (-(-(first + rows) // self.block) - begin, -(-keys // self.block))
        crossed = torch.zeros(heads, size[1] + 1, dtype=torch.bool)
        distance = mass.topk(min(self.slash, keys)).indices
        for back in (distance // self.block, (distance + self.block - 1) // self.block):
            crossed.scatter_(1, back, True)  # a diagonal passes through two blocks of each row block
        row = torch.arange(begin, begin + size[0]).unsqueeze(1)
        back = (row - torch.arange(size[1])).clamp(min=0)
        keep = crossed[:, back] | diagonal_blocks(begin, *size)
        keep[:, :, 0] = True
        return keep & causal_blocks(begin, *size)

    def _stripes(self, given: AttentionInput, computed: Tensor, columns: list[Tensor]) -> StripeIndex:
        batch, heads, groups, key_blocks = computed.shape
        lists, counts = [], []
        start = (torch.arange(groups) * self.block).view(1, -1, 1)
        for mask, column, one in zip(computed, columns, given.bounds(), strict=True):
            wide = column.unsqueeze(1).expand(heads, groups, column.shape[1])
            inside = mask.gather(2, (wide // self.block).clamp(max=key_blocks - 1))
            here = torch.arange(groups).view(1, -1, 1)
            present = (here >= one.first // self.block) & (start < one.end)
            outside = (wide < start) & ~inside & present
            lists.append((wide + one.start)[outside])
            counts.append(outside.sum(2).flatten())
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
        keys = torch.cat(lists).to(torch.int32)
        return StripeIndex(offsets, keys, (batch, heads, groups), self.block, given.key.shape[2])
