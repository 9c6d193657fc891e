"""Raw sparsities moved onto the budget: one shift for all, clipped, with the exact weighted mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

_SAME = 1e-12  # of the weighted mean: a vector that is feasible to this is returned as it came
_HALVINGS = 200  # more than a float64 interval can be halved


def project(
    raw: Sequence[float], sizes: Sequence[int], target: float, low: float = 0.0, high: float = 1.0
) -> list[float]:
    """Return clip(raw + mu, low, high) with the mu that makes the ``sizes``-weighted mean equal ``target``.

    What already lies within the bounds and has that mean comes back unchanged. Published code replaces a
    sparsity below 0 by 0.01 instead and leaves the mean wherever it lands. Raises ValueError for bounds
    that do not hold the target, and for raw values that are not finite.
    """
    if not low <= target <= high:
        raise ValueError(f"no sparsities between {low:g} and {high:g} have the mean {target:g}")
    for index, value in enumerate(raw):
        if not math.isfinite(value):
            raise ValueError(f"raw sparsity {index} is {value}")

    def shifted(mu: float) -> list[float]:
        return [min(max(value + mu, low), high) for value in raw]

    if abs(weighted_mean(shifted(0.0), sizes) - target) <= _SAME:
        return shifted(0.0)
    below, above = low - max(raw), high - min(raw)  # every value at its lower, at its upper bound
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        if not below < middle < above:
            break
        if weighted_mean(shifted(middle), sizes) < target:
            below = middle
        else:
            above = middle
    return shifted(above)


def weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the mean of ``values`` weighted by ``sizes``, summed without rounding on the way; 0 of nothing."""
    total = sum(sizes)
    return math.fsum(n * value for n, value in zip(sizes, values, strict=True)) / total if total else 0.0
