"""Magnitude pruning: the smallest weights go; no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.pruning import Stats


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Score |w|."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing: no calibration, no forward pass."""
        return ()

    def column_scale(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return ones: every input counts the same."""
        return torch.ones(weight.shape[1], device=weight.device)

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return |w|, float32 [out_features, in_features]."""
        return weight.abs().float()
