"""What becomes of the weights that survive."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pysparse.pruning.recipe import (
    Importance,
    MaskStructure,
    Pruned,
    Selecting,
    Stats,
    column_scale,
)


@dataclass(frozen=True, slots=True)
class Keep:
    """Survivors keep their value: mask once by score, change nothing else (magnitude, Wanda)."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing of its own."""
        return ()

    def solve(
        self, weight: Tensor, stats: Stats, importance: Importance, structure: MaskStructure, sparsity: float
    ) -> Pruned:
        """Zero the weights of ``weight`` [out_features, in_features] that the structure does not keep."""
        scale = column_scale(importance, weight, stats)
        if scale is not None and isinstance(structure, Selecting):
            selected = structure.select(weight, scale, sparsity)
            if selected is not None:
                return Pruned(selected[1], selected[0])
        keep = structure.keep(importance(weight, stats), sparsity)
        return Pruned(weight.masked_fill(~keep, 0), keep)
