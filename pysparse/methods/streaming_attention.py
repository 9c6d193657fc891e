"""StreamingLLM's pattern (Xiao et al. 2023, arXiv 2309.17453) as a prefill planner: first keys and a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pysparse.attention import AttentionInput, AttentionPlan
from pysparse.attention.checks import check_block, check_count
from pysparse.attention.selection import as_index, causal_blocks


@dataclass(frozen=True, slots=True)
class StreamingAttention:
    """Compute the first ``sink`` keys and the last ``window`` before a row, in whole blocks; looks at no score."""

    sink: int = 128
    window: int = 1024
    block: int = 128

    def __post_init__(self) -> None:
        check_count("sink", self.sink)
        check_count("window", self.window)
        check_block(self.block)

    @property
    def crossover(self) -> int:
        """Twice the keys that are always computed."""
        return 2 * (self.sink + self.window)

    def plan(self, given: AttentionInput) -> AttentionPlan:
        """Return the same blocks for every head."""
        masks = []
        for query, key, first in given.sequences():
            begin = first // self.block
            size = (-(-(first + query.shape[1]) // self.block) - begin, -(-key.shape[1] // self.block))
            back = torch.arange(begin, begin + size[0]).unsqueeze(1) - torch.arange(size[1])
            keep = back <= min(-(-self.window // self.block), size[1])  # no row block sees more
            keep[:, : -(-self.sink // self.block)] = True
            masks.append((keep & causal_blocks(begin, *size)).unsqueeze(0))
        return AttentionPlan(blocks=as_index(given, masks, self.block))
