"""A planner after FlexPrefill (Lai et al. 2025, arXiv 2502.20766): a pattern for each head, a budget by mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.attention import AttentionInput, AttentionPlan
from pysparse.attention.checks import check_block, check_count
from pysparse.attention.probe import Probe
from pysparse.attention.selection import (
    as_index,
    block_means,
    block_sums,
    causal_blocks,
    diagonal_blocks,
    top_mass,
)


@dataclass(frozen=True, slots=True)
class FlexPrefill:
    """Take for each head the pattern that its last rows suggest, and the fewest blocks that hold ``gamma`` of it.

    Where means of blocks predict the last row block's distribution (square root of the Jensen-Shannon divergence
    below ``tau``), a row block keeps the blocks that the means rank highest; otherwise the head keeps columns and
    diagonals of blocks by the mass that the last rows give them. At least ``minimum`` tokens a row block.

    Differs from the paper: the mean-ranked blocks are chosen for each row block, not over the whole map at once.
    """

    gamma: float = 0.95
    tau: float = 0.1
    minimum: int = 1024
    block: int = 128

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be positive: it is a share of the attention mass")
        if not self.tau >= 0:
            raise ValueError(f"tau={self.tau} must not be negative: it bounds the root of a divergence")
        check_count("minimum", self.minimum)
        check_block(self.block)

    @property
    def crossover(self) -> int:
        """Twice the minimum budget."""
        return 2 * self.minimum

    def plan(self, given: AttentionInput) -> AttentionPlan:
        """Return the blocks of each head and block of rows."""
        masks = [self._blocks(*sequence, given.scale) for sequence in given.sequences()]
        return AttentionPlan(blocks=as_index(given, masks, self.block))

    def _blocks(self, query: Tensor, key: Tensor, first: int, scale: float) -> Tensor:
        begin = first // self.block
        rows = -(-(first + query.shape[1]) // self.block) - begin
        causal = causal_blocks(begin, rows, -(-key.shape[1] // self.block))
        probe = Probe.of(query, key, scale, self.block)
        estimate = self._pooled(query, key, first, scale).masked_fill(~causal, -torch.inf).softmax(-1)
        seen = block_sums(probe.weights.mean(1), self.block)
        aware = (divergence(seen, estimate[:, -1]).sqrt() < self.tau).view(-1, 1, 1)
        least = -(-self.minimum // self.block)
        by_means = top_mass(estimate, self.gamma, least)
        keep = torch.where(aware, by_means, self._columns_and_diagonals(probe, begin, rows, least))
        keep |= diagonal_blocks(begin, *causal.shape)
        keep[:, :, 0] = True
        return keep & causal

    def _pooled(self, query: Tensor, key: Tensor, first: int, scale: float) -> Tensor:
        rows = block_means(query, self.block, first % self.block).unflatten(0, (key.shape[0], -1))
        columns = block_means(key, self.block).unsqueeze(1)
        logits: Tensor = scale * (rows @ columns.transpose(2, 3)).flatten(0, 1)
        return logits

    def _columns_and_diagonals(self, probe: Probe, begin: int, rows: int, least: int) -> Tensor:
        columns = top_mass(block_sums(probe.verticals(), self.block), self.gamma, least)
        diagonals = top_mass(block_sums(probe.slashes(), self.block), self.gamma, least)
        # distances of one block of diagonals reach into the key block before as well
        diagonals = diagonals | torch.nn.functional.pad(diagonals, (1, 0))[:, :-1]
        row = torch.arange(begin, begin + rows).unsqueeze(1)
        back = (row - torch.arange(columns.shape[1])).clamp(min=0, max=diagonals.shape[1] - 1)
        return columns.unsqueeze(1) | diagonals[:, back]


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence (nats) of distributions over the last dimension; 0 log 0 is 0."""
    middle = (one + other) / 2
    terms: Tensor = (
        torch.special.xlogy(one, one)
        + torch.special.xlogy(other, other)
        - 2 * torch.special.xlogy(middle, middle)
    )
    return terms.sum(-1).clamp(min=0) / 2
