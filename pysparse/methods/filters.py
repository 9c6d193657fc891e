"""Scores of whole filters (output channels, rows), for the structure :class:`pysparse.pruning.Filters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pysparse.pruning import Stats

_DISTANCES = ("l1", "l2", "cosine")
_ROWS = 256  # of the distance matrix at a time


@dataclass(frozen=True, slots=True)
class SquaredMagnitude:
    """Score w^2; the sum over a row is the squared L2 norm of a filter."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return w^2, float32 [out_features, in_features]."""
        return weight.float().square()


@dataclass(frozen=True, slots=True)
class FilterDistance:
    """FPGM (He et al. 2019, "Filter Pruning via Geometric Median"): filters near to all others are redundant.

    Score of a filter = mean distance to the other filters of its layer, spread evenly over its weights.
    """

    distance: Literal["l1", "l2", "cosine"] = "l2"

    def __post_init__(self) -> None:
        if self.distance not in _DISTANCES:
            raise ValueError(f"distance is one of {', '.join(_DISTANCES)}, got {self.distance!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return the scores, float32 [out_features, in_features], equal within a row."""
        wide = weight.float()
        total = torch.zeros(len(wide), device=wide.device)
        for start in range(0, len(wide), _ROWS):
            part = wide[start : start + _ROWS]
            total[start : start + _ROWS] = self._distances(part, wide).sum(dim=1)
        mean = total / max(1, len(wide) - 1)
        return (mean / wide.shape[1])[:, None].expand(wide.shape).contiguous()

    def _distances(self, part: Tensor, wide: Tensor) -> Tensor:
        if self.distance != "cosine":
            return torch.cdist(part, wide, p=1.0 if self.distance == "l1" else 2.0)
        unit, own = (torch.nn.functional.normalize(rows, dim=1) for rows in (wide, part))
        similarity: Tensor = own @ unit.T
        return 1.0 - similarity


@dataclass(frozen=True, slots=True)
class NuclearImpact:
    """Score of a filter = how much the layer's nuclear norm falls when its row becomes zero."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return the scores, float32 [out_features, in_features], equal within a row.

        One singular value decomposition a filter: for layers of some hundred filters.
        """
        wide = weight.double()
        whole = _nuclear(wide)
        impact = torch.empty(len(wide), dtype=torch.float64, device=wide.device)
        for row in range(len(wide)):
            impact[row] = whole - _nuclear(torch.cat([wide[:row], wide[row + 1 :]]))
        return (impact / wide.shape[1]).float()[:, None].expand(wide.shape).contiguous()


def _nuclear(matrix: Tensor) -> Tensor:
    if 0 in matrix.shape:
        return matrix.new_zeros(())
    total: Tensor = torch.linalg.svdvals(matrix).sum()
    return total
