"""XAttention (Xu et al. 2025, arXiv 2503.16428): blocks ranked by sums along their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pysparse.attention import AttentionInput, AttentionPlan
from pysparse.attention.checks import check_block, check_count
from pysparse.attention.selection import as_index, causal_blocks, diagonal_blocks, top_mass


@dataclass(frozen=True, slots=True)
class XAttention:
    """Keep for each block of rows the fewest key blocks that hold ``threshold`` of the strided antidiagonal mass.

    ``stride`` tokens of rows and keys become one long vector, the rows' in reverse: its product sums the logits
    along an antidiagonal. The first block and the row's own are always kept.
    """

    threshold: float = 0.9
    stride: int = 16
    block: int = 128

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold} must be positive: it is a share of the mass")
        check_count("stride", self.stride, least=1)
        check_block(self.block)
        if self.block % self.stride:
            raise ValueError(f"stride={self.stride} does not divide a block of {self.block} tokens")

    @property
    def crossover(self) -> int:
        """Sixteen blocks: with fewer the scores cost what the skipped blocks save."""
        return 16 * self.block

    def plan(self, given: AttentionInput) -> AttentionPlan:
        """Return the blocks of each head and block of rows."""
        masks = [self._blocks(*sequence, given.scale) for sequence in given.sequences()]
        return AttentionPlan(blocks=as_index(given, masks, self.block))

    def _blocks(self, query: Tensor, key: Tensor, first: int, scale: float) -> Tensor:
        begin = first // self.block
        grouped = query.unflatten(0, (key.shape[0], -1))
        mass = torch.cat(
            [self._mass(rows, keys, first, scale) for rows, keys in zip(grouped, key, strict=True)]
        )
        causal = causal_blocks(begin, *mass.shape[1:])
        keep = top_mass(mass, self.threshold) | diagonal_blocks(begin, *mass.shape[1:])
        keep[:, :, 0] = True
        return keep & causal

    def _mass(self, query: Tensor, key: Tensor, first: int, scale: float) -> Tensor:
        """Return the mass of each block [heads, row blocks, key blocks] for the heads of one key head."""
        lead = first % self.block
        rows = self._strided(query, lead).flip(2).flatten(2)
        columns = self._strided(key, 0).flatten(1)
        logits = (rows @ columns.T).float() * (scale / self.stride)
        row = torch.arange(rows.shape[1]).unsqueeze(1) + first // self.block * self.block // self.stride
        future = torch.arange(len(columns)) > row
        weights = logits.masked_fill_(future, -torch.inf).softmax(-1)
        weights[:, : lead // self.stride] = 0  # rows that are not part of this call
        per_block = self.block // self.stride
        per_column = weights.unflatten(2, (-1, per_block)).sum(3)
        mass: Tensor = per_column.unflatten(1, (-1, per_block)).sum(2)
        return mass

    def _strided(self, tokens: Tensor, lead: int) -> Tensor:
        """Return [..., strides, stride, D] of [..., n, D], zeros before and after filling whole blocks."""
        short = -(lead + tokens.shape[-2]) % self.block
        strides: Tensor = functional.pad(tokens, (0, 0, lead, short)).unflatten(-2, (-1, self.stride))
        return strides
