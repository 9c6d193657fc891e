"""The output error of every layer as it is pruned, for the benchmarks of quality."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pysparse.methods import Wanda
from pysparse.pruning import Importance, Keep, MaskStructure, Pruned, Reconstruction, Stats


@dataclass(frozen=True, slots=True)
class Audited:
    """A reconstruction that notes ||X (W - W')^T||^2 / ||X W^T||^2 of each layer, in the order of the layers.

    "updated" is the layer's own solution; with ``beside`` also "mask_only", its mask on the weights as they
    were, and "wanda", Wanda's mask on them. X is what the layer sees, the blocks before it being pruned.
    """

    inner: Reconstruction
    beside: bool = True
    errors: list[dict[str, float]] = field(default_factory=list)

    @property
    def needs(self) -> tuple[str, ...]:
        """The sum of X^T X, beside what the reconstruction needs."""
        return tuple(dict.fromkeys(("gram", *self.inner.needs)))

    def solve(
        self, weight: Tensor, stats: Stats, importance: Importance, structure: MaskStructure, sparsity: float
    ) -> Pruned:
        """Solve by ``inner``, and note what it cost."""
        pruned = self.inner.solve(weight, stats, importance, structure, sparsity)
        gram = stats["gram"].double()
        solutions = {"updated": pruned.weight}
        if self.beside:
            norms = {"squared_norm": stats["gram"].diagonal()}
            solutions["mask_only"] = weight * pruned.keep
            solutions["wanda"] = Keep().solve(weight, norms, Wanda(), structure, sparsity).weight
        scale = output_energy(weight.double(), gram)
        self.errors.append({
            name: output_energy(weight.double() - solution.double(), gram) / scale
            for name, solution in solutions.items()
        })  # fmt: skip
        return pruned


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """||X weight^T||^2 up to a constant, for ``gram`` = X^T X, float64."""
    return float((weight @ gram).mul_(weight).sum())
