"""What attention over part of the keys leaves behind, so that another part can be added to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionState:
    """Attention over part of the keys, to be continued or merged with that over other keys.

    ``out`` [B, Hq, Nq, D] float32 is the weighted mean so far, ``max`` [B, Hq, Nq] float32 the largest scaled
    logit of each row (natural units; -inf without keys), ``denominator`` the sum of exp(logit - max).
    """

    out: Tensor
    max: Tensor
    denominator: Tensor

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of the logits seen so far, float32 [B, Hq, Nq]; -inf for a row without keys."""
        return self.max + self.denominator.log()

    def merge(self, other: AttentionState) -> AttentionState:
        """Return attention over the keys of both; the key sets must be disjoint."""
        peak = torch.maximum(self.max, other.max)
        reference = torch.where(peak == -math.inf, 0.0, peak)  # exp(-inf - 0) = 0: an empty part adds nothing
        mine = self.denominator * torch.exp(self.max - reference)
        theirs = other.denominator * torch.exp(other.max - reference)
        total = mine + theirs
        share = torch.where(total == 0, 0.0, mine / total)[..., None]
        rest = torch.where(total == 0, 0.0, theirs / total)[..., None]
        return AttentionState(self.out * share + other.out * rest, peak, total)
