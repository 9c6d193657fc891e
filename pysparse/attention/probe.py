"""What the last rows of a sequence attend to, summed along columns and along diagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Attention probabilities of a sequence's last rows: float32 [Hq, rows, keys]."""

    weights: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, scale: float, rows: int) -> Probe:
        """Probe the last ``rows`` (or as many as there are) of query [Hq, n, D] against key [Hk, m, D]."""
        rows = min(rows, query.shape[1])
        heads, keys = query.shape[0], key.shape[1]
        grouped = query[:, query.shape[1] - rows :].float().unflatten(0, (key.shape[0], -1))
        logits = scale * (grouped @ key.float().unsqueeze(1).transpose(2, 3)).flatten(0, 1)
        position = torch.arange(keys - rows, keys, device=key.device).unsqueeze(1)
        future = torch.arange(keys, device=key.device) > position
        return cls(logits.masked_fill_(future, -torch.inf).softmax(-1).view(heads, rows, keys))

    def verticals(self) -> Tensor:
        """Return the mass of each key, [Hq, keys], over all rows."""
        return self.weights.sum(1)

    def slashes(self) -> Tensor:
        """Return the mass at each distance between row and key, [Hq, keys]; entry 0 is the diagonal itself."""
        heads, rows, keys = self.weights.shape
        distance = torch.arange(keys - rows, keys).unsqueeze(1) - torch.arange(keys)
        place = distance.clamp(min=0).flatten().expand(heads, -1)  # future keys have weight 0
        return torch.zeros(heads, keys).scatter_add_(1, place, self.weights.flatten(1))
