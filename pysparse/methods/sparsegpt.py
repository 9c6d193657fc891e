"""SparseGPT (Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot")."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysparse import ops
from pysparse.formats import Int8Grid
from pysparse.methods.obs import Factor, NotPositiveDefiniteError, check_finite, inverse_factor, sweep
from pysparse.methods.wanda import Wanda
from pysparse.nn import Packing
from pysparse.pruning import (
    Importance,
    Keep,
    MaskStructure,
    Pruned,
    Stats,
    Sweeping,
    column_scale,
)

SCALE = "inverse_scale"  # 1 / d_j, where a reconstruction has factored the Hessian anyway


@dataclass(frozen=True, slots=True)
class InverseHessian:
    """Score w_ij^2 / d_j^2, d_j the diagonal of the upper Cholesky factor of the inverse Hessian.

    That is what removing the weight costs when the columns right of it may make it good. Inputs that were zero
    throughout the calibration score 0. Within ObsUpdate the factor, and so the damping, is that one's.
    """

    damping: float = 0.01  # of the mean diagonal of the Hessian

    def __post_init__(self) -> None:
        _check_damping(self.damping)

    @property
    def needs(self) -> tuple[str, ...]:
        """The second moments of the inputs."""
        return ("gram",)

    def column_scale(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return 1 / d_j, float32 [in_features]; ValueError when no damping makes the Hessian definite."""
        return stats[SCALE] if SCALE in stats else inverse_factor(stats["gram"], self.damping).scale

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return w^2 / d^2, float32 [out_features, in_features], for ``stats["gram"]`` [in_features, in_features]."""
        return weight.abs().float().mul_(self.column_scale(weight, stats)).square_()


@dataclass(frozen=True, slots=True)
class ObsUpdate:
    """Prune column by column; what a weight's removal does to the output is made good by the columns right of it.

    Masks are chosen per ``block_size`` columns (n:m: per group) by the importance of the weights as updated so
    far: with InverseHessian this is SparseGPT, with Wanda or Magnitude their score with its update. A block is
    shortened to a multiple of m. Where no damping makes the Hessian positive definite the layer is pruned by
    Wanda instead, and its warnings say so.

    Differs from the paper: counts are exact, floor(sparsity * weights) over the matrix with no surplus among
    ties; weights on inputs that were always zero go first, but no more of them than the count says.

    With ``values="int8"`` pruning and quantisation are one sweep (section 3.5 of the paper): a kept weight is rounded
    to int8 at its turn, and the columns right of it make that good too. The scales are the largest magnitude of
    a row (or of a row's ``group_size`` inputs) over 127 after a first sweep without rounding: updates outgrow the
    dense weight, whose scales would clip them. They are packed as they are.
    """

    damping: float = 0.01  # of the mean diagonal of the Hessian
    block_size: int = 128  # columns
    values: str | None = None  # "int8", or None: kept weights are not rounded
    group_size: int | None = None  # inputs that share a scale, a multiple of 4; None: a scale a row

    def __post_init__(self) -> None:
        _check_damping(self.damping)
        Packing(self.values, group_size=self.group_size)  # refuses what is no way to keep values
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"block_size is a whole number of columns from 1 on, got {self.block_size!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The second moments of the inputs."""
        return ("gram",)

    def solve(
        self, weight: Tensor, stats: Stats, importance: Importance, structure: MaskStructure, sparsity: float
    ) -> Pruned:
        """Prune ``weight`` [out_features, in_features] for ``stats["gram"]`` [in_features, in_features].

        Computed in float32, returned in the weight's dtype. Raises ValueError when the weight is not finite, or
        int8 has no scale for so many inputs.
        """
        check_finite(weight)
        rows, cols = weight.shape
        if not structure.pruned_count(rows, cols, sparsity):
            return Pruned(weight.clone(), torch.ones_like(weight, dtype=torch.bool))
        try:
            factor = inverse_factor(stats["gram"], self.damping)
        except NotPositiveDefiniteError as error:
            norms = {"squared_norm": stats["gram"].diagonal()}
            pruned = Keep().solve(weight, norms, Wanda(), structure, sparsity)
            return dataclasses.replace(pruned, warnings=(f"{error}: pruned by Wanda, without an update",))
        grid = None
        work, keep = self._sweep(weight, factor, stats, importance, structure, sparsity, grid)
        if self.values is not None:  # updates outgrow the dense weight's range: its scales would clip them
            grid = Int8Grid.of(work * keep, self.group_size)
            work, keep = self._sweep(weight, factor, stats, importance, structure, sparsity, grid)
        return Pruned(work.to(weight.dtype), keep, factor.warnings, grid=grid)

    def _sweep(
        self, weight: Tensor, factor: Factor, stats: Stats, importance: Importance, structure: MaskStructure,
        sparsity: float, grid: Int8Grid | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Run the compiled sweep where it knows score and structure, else the one in torch."""
        known = {**stats, SCALE: factor.scale}
        scale = column_scale(importance, weight, known)
        rows, cols = weight.shape
        compiled = ops.can_sweep(weight) and (grid is None or weight.is_cpu)  # no kernel rounds on a GPU yet
        if scale is not None and isinstance(structure, Sweeping) and compiled:
            pattern = structure.sweep_pattern((rows, cols), sparsity, self.block_size)
            if pattern is not None:
                return ops.obs_sweep(weight, factor.upper, scale, pattern, grid)

        def score(part: Tensor, columns: slice) -> Tensor:
            if scale is not None:
                return part.abs() * scale[columns]
            return importance(part, {name: _of_columns(value, columns) for name, value in known.items()})

        return sweep(weight, factor.upper, score, structure, sparsity, self.block_size, grid)


def _of_columns(value: Tensor, columns: slice) -> Tensor:
    return value[(columns,) * value.dim()]  # a vector's part, a matrix's principal block


def _check_damping(damping: Any) -> None:
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < float("inf"):
        raise ValueError(f"damping is a number from 0 on, got {damping!r}")
