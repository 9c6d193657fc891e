"""A pruning method as a value: which score, how much where, in which pattern, and what becomes of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from pysparse.formats import Int8Grid
from pysparse.ops import SweepPattern
from pysparse.pruning.layout import PrunableLayer

Stats = Mapping[str, Tensor]  # by the name of the statistic, as in pysparse.calib.STATISTICS


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an allocation may look at: a layer of the dense model and the statistics it asked for."""

    layer: PrunableLayer
    stats: Stats


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """One pruned weight."""

    weight: Tensor  # [out_features, in_features], zero where not kept
    keep: Tensor  # bool, same shape; True survives
    warnings: tuple[str, ...] = ()  # what went otherwise than the recipe says; the loop adds the layer's name
    bias_shift: Tensor | None = None  # [out_features], to add to the layer's bias if it has one
    grid: Int8Grid | None = None  # what the kept weights were rounded to, if they were


class Importance(Protocol):
    """How much each weight matters."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that the score needs; empty for none, and then nothing is calibrated."""

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return float32 scores of the shape of ``weight`` [out_features, in_features]; the least go first."""


@runtime_checkable
class ColumnScaled(Protocol):
    """An importance that ranks the weights of a layer as |w_ij| * a_j does; compiled kernels select by that."""

    def column_scale(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return a_j >= 0, float32 [in_features], for ``weight`` [out_features, in_features]."""


def column_scale(importance: Importance, weight: Tensor, stats: Stats) -> Tensor | None:
    """Return the factors a_j by which ``importance`` ranks |w_ij| * a_j, or None when it ranks otherwise."""
    return importance.column_scale(weight, stats) if isinstance(importance, ColumnScaled) else None


class Allocation(Protocol):
    """How the target sparsity is spread over the layers.

    One whose setting is still to be searched says so by an attribute ``searched`` that is True.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics of the dense model that the allocation needs: they cost a pass of their own."""

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return one sparsity in [0, 1) a layer; weighted by parameters their mean is ``target`` to 1e-6."""


class MaskStructure(Protocol):
    """Which patterns of zeros are allowed, and within which group weights compete."""

    @property
    def fixed_sparsity(self) -> float | None:
        """The only sparsity that the structure can have, or None when it is free."""

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return a bool mask of the shape of ``scores`` [out_features, in_features]; True survives."""

    def pruned_count(self, rows: int, cols: int, sparsity: float) -> int:
        """Return how many weights of a [rows, cols] matrix :meth:`keep` prunes."""

    def dense_columns(self, cols: int) -> int:
        """Return how many columns at the end of a row the pattern cannot reach and leaves dense."""

    def step(self, block_size: int) -> int:
        """Return how many columns at a time are masked by who goes along them in blocks of ``block_size``.

        Raises ValueError when a block has no room for a group of the pattern.
        """

    def keep_columns(self, scores: Tensor, sparsity: float, start: int) -> Tensor:
        """Return the mask of the columns from ``start`` on alone, of the shape of their ``scores`` [R, c].

        ``start`` and c are multiples of :meth:`step`, but for the last columns of a matrix. Over a whole
        matrix exactly :meth:`pruned_count` weights are pruned.
        """


@runtime_checkable
class Selecting(Protocol):
    """A structure with compiled kernels that score, select and prune in one pass."""

    def select(self, weight: Tensor, scale: Tensor, sparsity: float) -> tuple[Tensor, Tensor] | None:
        """Return mask and pruned weight for the scores |w_ij| * a_j, or None when no kernel takes ``weight``.

        ``scale`` is a, float32 [in_features] and not negative. The mask is that of ``keep`` on these scores.
        """


@runtime_checkable
class Sweeping(Protocol):
    """A structure that the compiled sweep knows."""

    def sweep_pattern(self, shape: tuple[int, int], sparsity: float, block_size: int) -> SweepPattern | None:
        """Return what ``keep_columns`` does to a weight of ``shape`` in blocks of ``block_size`` columns."""


class Reconstruction(Protocol):
    """Makes the pruned weight. It drives: a method that updates weights may score and mask piece by piece."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that the reconstruction itself needs."""

    def solve(
        self, weight: Tensor, stats: Stats, importance: Importance, structure: MaskStructure, sparsity: float
    ) -> Pruned:
        """Prune ``weight`` [out_features, in_features], which must not be changed in place."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A pruning method: four parts that combine freely and run in one loop (:func:`pysparse.pruning.run`)."""

    importance: Importance
    allocation: Allocation
    structure: MaskStructure
    reconstruction: Reconstruction

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that pruning a block needs, without those of the allocation's own pass."""
        return tuple(dict.fromkeys((*self.importance.needs, *self.reconstruction.needs)))

    @property
    def needs_calibration(self) -> bool:
        """Tell whether any part looks at activations."""
        return bool(self.needs or self.allocation.needs)
