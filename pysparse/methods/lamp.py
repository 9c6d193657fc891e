"""LAMP (Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning"): one threshold, scaled scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.pruning import Evidence
from pysparse.pruning.allocation import require_weights
from pysparse.pruning.structure import count_of


@dataclass(frozen=True, slots=True)
class LAMP:
    """Score of weight u in its layer = w_u^2 / sum of w_v^2 over all v with w_v^2 >= w_u^2; one global threshold.

    Within a layer the order is that of |w|, so the rates suffice: with Magnitude and Unstructured("matrix") the
    weights of the least scores go. The largest weight of a layer scores 1: no layer loses all of its weights.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """No activations; the weights themselves are looked at."""
        return ()

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return the sparsity of each layer; ValueError for weights that are not finite."""
        require_weights("LAMP", layers)
        scores = [lamp_scores(evidence.layer.weight, evidence.layer.path) for evidence in layers]
        sizes = [len(score) for score in scores]
        count = count_of(sum(sizes), target)
        if count == 0:
            return [target] * len(layers)
        owner = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
        order = torch.cat(scores).argsort(stable=True)[:count]
        pruned = torch.bincount(owner[order], minlength=len(layers)).tolist()
        rest = target * sum(sizes) - count  # the fraction of a weight that is left, kept for an exact mean
        return [(n + (rest if i == 0 else 0.0)) / sizes[i] for i, n in enumerate(pruned)]


def lamp_scores(weight: Tensor, path: str = "the weight") -> Tensor:
    """Return the LAMP scores of ``weight`` in ascending order of w^2, float64 [weight.numel()]."""
    squares = weight.double().square().flatten().sort().values
    if not bool(torch.isfinite(squares.sum())):
        raise ValueError(f"{path}: the weights hold NaN or infinity")
    from_here = squares.flip(0).cumsum(0).flip(0)
    # Of equal weights all count the whole tie: take the sum where their run begins.
    first = torch.searchsorted(squares, squares)
    return squares / from_here[first].clamp_min(torch.finfo(torch.float64).tiny)
