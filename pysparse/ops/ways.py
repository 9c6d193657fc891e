"""The ways to compute a linear layer whose weight may be packed, and how the time of each depends on tokens.

A way reads one *packing* of the weight. "bitmap" (the decode kernel, 16 tokens at a time) and "unpack" (rows
unpacked into the cache, then torch's product) read the tiled bitmap that a sparse layer holds anyway; "pairs"
(arithmetic on stored weights only) reads pair blocks; "kernel" (ours, for few tokens) and "torch" read the
plain dense weight. A new way is one entry of ``WAYS``: costs, cache file and ``pysparse tune`` follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional

from pysparse.formats import ColumnPairs, TiledBitmap
from pysparse.ops import linear

HELD = "bitmap"  # the packing that a sparse layer always has
DENSE = "dense"
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Way:
    """How a product is computed; the times between measured numbers of tokens follow from ``step`` and ``grain``."""

    packing: str  # what it reads of the weight: "bitmap" | "pairs" | "dense"
    tokens: tuple[int, ...]  # numbers at which it is measured, ascending
    prepare: Callable[[Tensor, TiledBitmap], Run]  # the same weight, dense and tiled -> what is timed
    step: int = 1  # tokens after which its work repeats; a measured number unless 1
    grain: int = 1  # tokens that it rounds up to within a step
    most_tokens: int | None = None  # that it takes at all
    task: tuple[int, int] | None = None  # rows and tokens that one thread computes at a time
    by_density: bool = True  # its time depends on the number of zeros

    def takes(self, tokens: int) -> bool:
        """Tell whether the way can be used for ``tokens`` rows."""
        return self.most_tokens is None or tokens <= self.most_tokens


def _pairs(dense: Tensor, tiled: TiledBitmap) -> Run:
    return partial(linear.pairs_linear, weight=ColumnPairs.from_tiled(tiled))


WAYS: dict[str, Way] = {
    "bitmap": Way(
        HELD, (1, 2, 4, 8, 12, 16, 32, 64, 256),
        lambda dense, tiled: partial(linear.bitmap_linear_chunks, weight=tiled), step=16,
    ),
    "unpack": Way(HELD, (16, 64, 256), lambda dense, tiled: partial(linear.unpacked_linear, weight=tiled)),
    "pairs": Way("pairs", (16, 32, 48, 64, 128, 256), _pairs, step=64, grain=16, task=(256, 64)),
    # Two dense ways are timed on copies of their own: the second would find the weight in the cache.
    "kernel": Way(
        DENSE, (1, 2, 4, 8, 12, 16), lambda dense, tiled: partial(linear.dense_linear, weight=dense.clone()),
        most_tokens=linear.DENSE_TOKENS, by_density=False,
    ),
    "torch": Way(
        DENSE, (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
        lambda dense, tiled: partial(functional.linear, weight=dense.clone()), by_density=False,
    ),
}  # fmt: skip


def ways_of(packing: str, tokens: int) -> tuple[str, ...]:
    """Return the names of the ways that read ``packing`` and take ``tokens`` rows."""
    return tuple(name for name, way in WAYS.items() if way.packing == packing and way.takes(tokens))
