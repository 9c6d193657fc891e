"""n:m patterns whose n differs from layer to layer, so that an allocation and n:m go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pysparse import ops
from pysparse.pruning.counts import fit_counts
from pysparse.pruning.layout import PrunableLayer
from pysparse.pruning.recipe import MaskStructure
from pysparse.pruning.structure import NM, Unstructured


@dataclass(frozen=True, slots=True)
class MixedNM:
    """Each layer keeps its own number of every ``m`` inputs; over all layers ``n`` of ``m`` are KEPT, exactly.

    The allocation's sparsity of a layer is rounded to a multiple of 1/m (0 leaves the layer dense), such that
    all layers together have as many zeros as plain ``n:m`` would give them. Hardware that runs one pattern
    (2:4) cannot run such a model; kernels that read a bitmap can.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        NM(self.n, self.m)  # the same bounds

    @property
    def fixed_sparsity(self) -> float | None:
        """1 - n/m, of all layers together."""
        return 1.0 - self.n / self.m

    def of(self, sparsity: float) -> NM | Unstructured:
        """Return the pattern of a layer with ``sparsity``, a multiple of 1/m; ValueError for another one."""
        zeros = round(sparsity * self.m)
        if abs(zeros - sparsity * self.m) > 1e-6 or not 0 <= zeros < self.m:
            raise ValueError(f"sparsity={sparsity:g} is not one of 0/{self.m} .. {self.m - 1}/{self.m}")
        return NM(self.m - zeros, self.m) if zeros else Unstructured()

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Keep the best of each group of m, as many as ``sparsity`` leaves; see :meth:`NM.keep`."""
        return self.of(sparsity).keep(scores, sparsity)

    def select(self, weight: Tensor, scale: Tensor, sparsity: float) -> tuple[Tensor, Tensor] | None:
        """Return mask and pruned weight by a compiled kernel."""
        return self.of(sparsity).select(weight, scale, sparsity)

    def pruned_count(self, rows: int, cols: int, sparsity: float) -> int:
        """Return how many weights of a [rows, cols] matrix are pruned."""
        return self.of(sparsity).pruned_count(rows, cols, sparsity)

    def dense_columns(self, cols: int) -> int:
        """Return the width of the short group at the end of a row."""
        return cols % self.m

    def step(self, block_size: int) -> int:
        """Return how many columns at a time are masked, as for ``n:m``."""
        return NM(self.n, self.m).step(block_size)

    def keep_columns(self, scores: Tensor, sparsity: float, start: int) -> Tensor:
        """Return the mask of the columns from ``start`` on alone; see :meth:`NM.keep_columns`."""
        return self.of(sparsity).keep_columns(scores, sparsity, start)

    def sweep_pattern(
        self, shape: tuple[int, int], sparsity: float, block_size: int
    ) -> ops.SweepPattern | None:
        """Return what the layer's own pattern is to the compiled sweep."""
        return self.of(sparsity).sweep_pattern(shape, sparsity, block_size)

    def round(self, layers: Sequence[PrunableLayer], sparsities: Sequence[float]) -> list[float]:
        """Return multiples of 1/m near ``sparsities`` with exactly the zeros of ``n:m`` in all layers together.

        Layers of one block with one wish get one answer where that can be exact. The squared distance to the
        wishes, weighted by size, is least for layers of like sizes. Raises ValueError when no rounding fits.
        """
        groups = [layer.shape[0] * (layer.shape[1] // self.m) for layer in layers]
        total = (self.m - self.n) * sum(groups)
        by_block: Counter[tuple[int, float]] = Counter()
        keys = [(layer.block, wish) for layer, wish in zip(layers, sparsities, strict=True)]
        for key, count in zip(keys, groups, strict=True):
            by_block[key] += count
        zeros = self._fit([wish for _, wish in by_block], list(by_block.values()), total)
        if zeros is not None:
            found: Mapping[tuple[int, float], int] = dict(zip(by_block, zeros, strict=True))
            return [found[key] / self.m for key in keys]
        zeros = self._fit(sparsities, groups, total)
        if zeros is None:
            raise ValueError(
                f"this allocation cannot be rounded to n:{self.m} with the zeros of {self.n}:{self.m} in all "
                "layers together: their sizes have too little in common; use the uniform allocation, or no "
                "n:m pattern"
            )
        return [count / self.m for count in zeros]

    def _fit(self, wishes: Sequence[float], groups: Sequence[int], total: int) -> list[int] | None:
        """Return the zeros in a group of m for each wish; a layer keeps one weight of a group at least."""
        limits = [(0, self.m - 1)] * len(groups)
        return fit_counts([wish * self.m for wish in wishes], groups, total, limits)

    def __str__(self) -> str:
        return f"{self.n}:{self.m} on average"


def pattern_of(structure: MaskStructure, sparsity: float) -> MaskStructure:
    """Return the pattern of one layer: of a mixed structure its own n:m, any other as it is."""
    return structure.of(sparsity) if isinstance(structure, MixedNM) else structure


def mixed_note(structure: MaskStructure, sparsities: Sequence[float]) -> str | None:
    """Say which patterns a mixed structure came to, None for any other structure."""
    if not isinstance(structure, MixedNM) or not sparsities:
        return None
    counts = sorted(Counter(round(structure.m * (1 - one)) for one in sparsities).items())
    if len(counts) == 1:
        return (
            f"the allocation differs too little between layers to move any from {structure.n}:{structure.m}: "
            "its range is less than one weight of a group"
        )
    parts = ", ".join(f"{count} layers {kept}:{structure.m}" for kept, count in counts)
    return f"n:m differs by layer ({parts}): hardware for one pattern needs allocation='uniform'"
