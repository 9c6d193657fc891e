"""The k-th smallest of scores that are spread over several tensors, exactly and without joining them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 22  # scores counted at a time; the count copies them as int64
_HALF = 1 << 16


def kth_smallest(parts: Callable[[], Iterable[Tensor]], count: int) -> float:
    """Return the ``count``-th smallest (from 1) of all scores that ``parts()`` yields, in two passes.

    The scores are float32 without a sign (absolute values and what is made of them), so their bits are ordered
    as they are: a histogram of the upper 16 bits finds the bin, one of the lower 16 bits the value in it.
    Memory: two histograms of 65536 entries and one part. Raises ValueError for NaN or negative scores, and
    for a ``count`` that is not among them.
    """
    upper = _histogram(parts, lambda bits: bits >> 16)
    total = int(upper.sum())
    if not 1 <= count <= total:
        raise ValueError(f"count={count} is not between 1 and the {total} scores")
    place, before = _bin_of(upper, count)
    lower = _histogram(parts, lambda bits: (bits & (_HALF - 1))[bits >> 16 == place])
    return float(
        torch.tensor((place << 16) | _bin_of(lower, count - before)[0], dtype=torch.int32).view(torch.float32)
    )


def _histogram(parts: Callable[[], Iterable[Tensor]], key: Callable[[Tensor], Tensor]) -> Tensor:
    counts = torch.zeros(_HALF, dtype=torch.int64)
    for part in parts():
        for chunk in torch.split(part.reshape(-1), _CHUNK):
            if chunk.dtype != torch.float32:
                raise TypeError(f"scores are float32, got {chunk.dtype}")
            bits = chunk.view(torch.int32)
            if bool(((bits < 0) | chunk.isnan()).any()):  # the sign bit, -0.0 included
                raise ValueError("scores hold NaN or negative values")
            counts += key(bits).bincount(minlength=_HALF).cpu()
    return counts


def _bin_of(counts: Tensor, count: int) -> tuple[int, int]:
    """Return the bin that holds the ``count``-th entry, and how many lie in the bins before it."""
    filled = counts.cumsum(0)
    place = int(torch.searchsorted(filled, count))
    return place, int(filled[place - 1]) if place else 0
