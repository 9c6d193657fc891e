"""ProxyAttn (arXiv 2509.24745, ICLR 2026): blocks ranked by a few mean heads, as many as each head needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pysparse.attention import AttentionInput, AttentionPlan
from pysparse.attention.checks import check_block, check_count
from pysparse.attention.selection import cumulative_budget, rank_descending
from pysparse.formats.stripe import BlockIndex
from pysparse.ops.attention import ProxyGrid, block_mass, proxy_scores


@dataclass(frozen=True, slots=True)
class ProxyAttention:
    """Rank key blocks by ``proxies`` mean heads, scored at every ``stride``-th token; budget each head by a probe.

    A head's budget is the fewest blocks that hold ``gamma`` of what its last block of rows attends to, at least
    ``minimum`` tokens. With ``budget="total"`` (the paper's) every row block may use that many; "causal" scales it
    with the keys that a row block sees. The first block and the row's own are always computed.

    Selection looks at the last rows of the call, so with chunked prefill it follows the chunk, and the output of
    early rows depends on how the prompt goes on. ``gamma`` >= 1 computes everything.
    """

    gamma: float = 0.95
    proxies: int = 1
    stride: int = 4
    block: int = 128
    minimum: int = 2048  # tokens of a row's budget
    budget: Literal["total", "causal"] = "total"

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be positive: it is a share of the attention mass")
        check_count("minimum", self.minimum)
        check_count("proxies", self.proxies, least=1)
        check_count("stride", self.stride, least=1)
        check_block(self.block)
        if self.budget not in ("total", "causal"):
            raise ValueError(f"budget={self.budget!r} is neither 'total' nor 'causal'")
        _ = self.grid  # checks how they go together

    @property
    def grid(self) -> ProxyGrid:
        """What the scores are computed on."""
        return ProxyGrid(self.proxies, self.block, self.stride)

    @property
    def crossover(self) -> int:
        """Twice the minimum budget: before that nearly every block is kept."""
        return 2 * self.minimum

    def plan(self, given: AttentionInput) -> AttentionPlan:
        """Return the blocks of each head and block of rows."""
        q, k, scale, offset, valid = given.query, given.key, given.scale, given.q_offset, given.key_range
        scores = proxy_scores(q, k, self.grid, scale=scale, q_offset=offset, key_range=valid)
        mass = block_mass(q, k, self.block, scale=scale, q_offset=offset, key_range=valid)
        heads = q.shape[1]
        rows, columns = scores.shape[2:]
        row = torch.arange(rows).unsqueeze(1)
        column = torch.arange(columns)
        causal = column <= row
        place = rank_descending(scores.masked_fill(~causal, -1.0)).repeat_interleave(
            heads // self.proxies, dim=1
        )
        keep = place < self._allowed(given, mass, row.squeeze(1)).unsqueeze(3)
        keep = (keep | (column == row) | (column == 0)) & causal
        return AttentionPlan(blocks=BlockIndex.from_mask(keep, self.block, self.block))

    def _allowed(self, given: AttentionInput, mass: Tensor, row: Tensor) -> Tensor:
        """Return how many blocks each row block may use: int64 [B, Hq, row blocks]."""
        needed = cumulative_budget(mass, self.gamma).unsqueeze(2)
        least = -(-self.minimum // self.block)
        if self.budget == "total":
            return needed.clamp(min=least).expand(-1, -1, len(row))
        blocks = (
            torch.tensor([-(-one.end // self.block) for one in given.bounds()]).clamp(min=1).view(-1, 1, 1)
        )
        return (needed * (row + 1)).div(blocks).ceil().long().clamp(min=least)
