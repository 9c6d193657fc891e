"""Whole numbers of weights near what an allocation wishes, with an exact sum over all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pysparse.pruning.layout import PrunableLayer
from pysparse.pruning.structure import Unstructured, count_of

_STATES = 20_000  # partial sums kept a step: exact for like layers, a bound on time for very unlike ones
_STEPS = (-1, 0, 1, 2)  # beside the floor of a wish
Limits = tuple[int, int]  # the least and the largest count, both allowed


def exact_sparsities(
    layers: Sequence[PrunableLayer],
    structure: Unstructured,
    wishes: Sequence[float],
    target: float,
    lowest: Sequence[int] | None = None,
) -> list[float]:
    """Return sparsities near ``wishes`` that zero as many weights in all layers as ``target`` in each would.

    A row loses a whole number of weights, so a sparsity of its own for each layer loses up to one weight a row to
    the rounding, each layer another part of it: two allocations with one mean would not be of one size. Here each
    layer's count is rounded such that the sum is met; where whole rows of unlike lengths cannot meet it, by the
    least that is missing. No layer gets fewer zeros than ``lowest`` (weights), where it has some already.
    """
    by_row = structure.group == "row"
    weights = [layer.shape[0] if by_row else 1 for layer in layers]  # zeros that one count stands for
    sizes = [layer.size // weight for layer, weight in zip(layers, weights, strict=True)]
    total = sum(structure.pruned_count(*layer.shape, target) for layer in layers)
    floors = [0] * len(layers) if lowest is None else lowest
    limits = [
        (min(-(-zeros // weight), size - 1), size - 1)
        for zeros, weight, size in zip(floors, weights, sizes, strict=True)
    ]
    found = None
    goals = [wish * size for wish, size in zip(wishes, sizes, strict=True)]
    for goal in range(total, -1, -math.gcd(*weights)):
        found = fit_counts(goals, weights, goal, limits)
        if found is not None:
            break
    if found is None:
        raise ValueError(
            f"no whole numbers of zeros near {wishes} have the mean {target:g} over these layers"
        )
    return [_fraction(count, size) for count, size in zip(found, sizes, strict=True)]


def _fraction(count: int, size: int) -> float:
    """Return the least sparsity of which :func:`count_of` makes ``count`` of ``size``."""
    fraction = count / size
    while count_of(size, fraction) < count:  # lengths above a million: the quotient's rounding shows
        fraction = math.nextafter(fraction, 1.0)
    return fraction


def fit_counts(
    wishes: Sequence[float], weights: Sequence[int], total: int, limits: Sequence[Limits]
) -> list[int] | None:
    """Return whole numbers near ``wishes`` whose ``weights``-weighted sum is ``total``, or None.

    They are at most 1 below and 2 above the floor of their wish, and within their ``limits``: a wish outside of
    these counts as the nearer one. Dynamic programming over the partial sums, one number after the other; the
    cost is the weighted squared distance. Sums are counted from the floors in units of the weights' common
    divisor, which keeps them few.
    """
    unit = math.gcd(*weights) or 1
    shares = [weight // unit for weight in weights]
    floors = [
        min(max(math.floor(wish + 1e-9), low), high) for wish, (low, high) in zip(wishes, limits, strict=True)
    ]
    gap = total // unit - sum(share * floor for share, floor in zip(shares, floors, strict=True))
    steps = [
        [k for k in _STEPS if low <= floor + k <= high]
        for floor, (low, high) in zip(floors, limits, strict=True)
    ]
    rest = [(0, 0)]  # what the later units can still add, at least and at most
    for share, options in zip(reversed(shares), reversed(steps), strict=True):
        rest.append((rest[-1][0] + share * options[0], rest[-1][1] + share * options[-1]))
    states: dict[int, float] = {0: 0.0}  # sum so far -> least cost
    trail: list[dict[int, int]] = []  # of each unit: sum after it -> step taken
    for index, (share, options) in enumerate(zip(shares, steps, strict=True)):
        low, high = rest[len(shares) - index - 1]
        states, chosen = _extend(states, share, options, floors[index] - wishes[index], gap - high, gap - low)
        trail.append(chosen)
    return _walk_back(trail, shares, floors, gap) if gap in states else None


def _extend(
    states: Mapping[int, float], share: int, options: Sequence[int], offset: float, low: int, high: int
) -> tuple[dict[int, float], dict[int, int]]:
    """Add one unit to every partial sum; only sums from which the goal can be reached stay."""
    costs: dict[int, float] = {}
    chosen: dict[int, int] = {}
    for before, cost in states.items():
        for step in options:
            after = before + share * step
            price = cost + share * (offset + step) ** 2
            if low <= after <= high and price < costs.get(after, math.inf):
                costs[after], chosen[after] = price, step
    if len(costs) > _STATES:
        costs = dict(sorted(costs.items(), key=lambda item: (item[1], item[0]))[:_STATES])
    return costs, chosen


def _walk_back(
    trail: Sequence[Mapping[int, int]], shares: Sequence[int], floors: Sequence[int], gap: int
) -> list[int]:
    zeros = []
    for chosen, share, floor in zip(reversed(trail), reversed(shares), reversed(floors), strict=True):
        step = chosen[gap]
        zeros.append(floor + step)
        gap -= share * step
    return zeros[::-1]
