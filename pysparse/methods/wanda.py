"""Wanda (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models")."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pysparse.pruning import Stats


@dataclass(frozen=True, slots=True)
class Wanda:
    """Score |w_ij| * a_j, where a_j is the L2 norm of input channel j over the calibration data."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The squared norms of the input channels."""
        return ("squared_norm",)

    def column_scale(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return the norms a, float32 [in_features]."""
        return stats["squared_norm"].sqrt()

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return |w| * sqrt(q), float32 [out_features, in_features], for ``stats["squared_norm"]`` [in_features]."""
        return weight.abs().float().mul_(self.column_scale(weight, stats))  # abs() has made the copy
