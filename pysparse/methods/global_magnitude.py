"""One threshold for the whole model: the smallest weights of all layers together go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pysparse.nn.match import matches
from pysparse.pruning import Evidence
from pysparse.pruning.allocation import require_weights
from pysparse.pruning.order_statistics import kth_smallest
from pysparse.pruning.structure import count_of

_NORMS = ("none", "l1", "l2")


@dataclass(frozen=True, slots=True)
class GlobalMagnitude:
    """Weights of all layers compete by |w|, or by |w| / ||W||_p of their matrix with ``norm`` "l1" or "l2".

    As an allocation: each layer gets the share of its weights that are among the floor(S * N) smallest of all
    N. With Magnitude and Unstructured("matrix") exactly these go; of weights equal to the threshold those of
    earlier layers first. Without a norm, layers of small weights may lose nearly all: ValueError when all.

    A layer that would pass ``max_sparsity`` is held there, and layers that ``spare`` names (comma-separated class
    names, paths or "re:" expressions) stay dense; the threshold for the others moves up until the total is met
    (PTSBench's L2Norm v2).
    """

    norm: Literal["none", "l1", "l2"] = "none"
    max_sparsity: float = 1.0
    spare: str = ""

    def __post_init__(self) -> None:
        if self.norm not in _NORMS:
            raise ValueError(f"norm is one of {', '.join(_NORMS)}, got {self.norm!r}")
        if not 0.0 < self.max_sparsity <= 1.0:
            raise ValueError(f"max_sparsity is a fraction in (0, 1], got {self.max_sparsity!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """No activations; the weights themselves are looked at."""
        return ()

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return the sparsity of each layer."""
        require_weights("GlobalMagnitude", layers)
        sizes = [evidence.layer.size for evidence in layers]
        count = count_of(sum(sizes), target)
        if count == 0:
            return [target] * len(layers)
        pruned = {index: 0 for index, one in enumerate(layers) if self._spared(one)}
        while True:
            free = [index for index in range(len(layers)) if index not in pruned]
            left = count - sum(pruned.values())
            if left > sum(sizes[index] for index in free):
                raise ValueError(
                    f"sparsity {target:g} cannot be met: {len(pruned)} of {len(layers)} layers are spared or held at "
                    f"max_sparsity={self.max_sparsity:g}"
                )
            found = dict(zip(free, self._counts([layers[index] for index in free], left), strict=True))
            limits = {index: count_of(sizes[index], self.max_sparsity) for index in free}
            over = {index: limits[index] for index in free if found[index] > limits[index]}
            if not over:
                pruned |= found
                return _sparsities(
                    layers, [pruned[i] for i in range(len(layers))], target * sum(sizes) - count
                )
            pruned |= over

    def _spared(self, evidence: Evidence) -> bool:
        patterns = [name.strip() for name in self.spare.split(",") if name.strip()]
        return matches(evidence.layer.module, evidence.layer.path, patterns)

    def _counts(self, layers: Sequence[Evidence], count: int) -> list[int]:
        """Return how many weights of each layer are among the ``count`` smallest of all."""
        if count <= 0 or not layers:
            return [0] * len(layers)
        threshold = kth_smallest(lambda: self._scores(layers), count)
        below = [int((scores < threshold).sum()) for scores in self._scores(layers)]
        ties, left = [int((scores == threshold).sum()) for scores in self._scores(layers)], count - sum(below)
        pruned = []
        for smaller, equal in zip(below, ties, strict=True):
            taken = min(equal, left)
            left -= taken
            pruned.append(smaller + taken)
        return pruned

    def _scores(self, layers: Sequence[Evidence]) -> Iterator[Tensor]:
        for evidence in layers:
            scores = evidence.layer.weight.abs().float()
            if not torch.isfinite(scores.sum(dtype=torch.float64)):
                raise ValueError(f"{evidence.layer.path}: the weights hold NaN or infinity")
            yield scores / self._scale(scores)

    def _scale(self, scores: Tensor) -> float:
        if self.norm == "none":
            return 1.0
        total = scores.double()
        norm = float(total.sum()) if self.norm == "l1" else math.sqrt(float(total.square().sum()))
        return norm or 1.0  # a matrix of zeros


def _sparsities(layers: Sequence[Evidence], pruned: Sequence[int], rest: float) -> list[float]:
    """Return counts as fractions that round back to them.

    ``rest``, the fraction of one weight by which the target exceeds their sum, is given to the first layer,
    whose floor removes it again.
    """
    found: list[float] = []
    for evidence, count in zip(layers, pruned, strict=True):
        size = evidence.layer.size
        if count >= size:
            raise ValueError(
                f"one threshold for all layers would prune {evidence.layer.path} entirely: use a smaller "
                "sparsity, norm='l2', or an allocation by layer"
            )
        share = (count + (0.0 if found else min(max(rest, 0.0), 1.0 - 1e-7))) / size
        found.append(math.nextafter(math.nextafter(share, 1.0), 1.0))  # count / size * size may round down
    return found
