"""The ways to compute a linear layer whose weight may be packed, and how the time of each depends on tokens.

A way reads one *packing* of the weight. Each kind of sparse layer holds one: "bitmap" (a tiled bitmap of the
weight's own values), "int8" (int8 values under one), "nm" and "nm-int8" (n of every m inputs, own values or int8).
Each has a kernel for few tokens, which takes 16 at a time however many there are, and a way that unpacks rows into
the cache for torch's product. Two packings may be made beside it: "pairs" (pair blocks: arithmetic on stored weights
only) and "dense" (read by "kernel", ours for few tokens, and by "torch"). A new way is one entry of ``WAYS``: costs,
cache file and ``pysparse tune`` follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional

from pysparse.formats import BitmapTensor, ColumnPairs, Int8Bitmap, NMInt8, NMTensor, TiledBitmap, TiledInt8
from pysparse.ops import compact, linear

BITMAP, PAIRS, DENSE = "bitmap", "pairs", "dense"
SECOND = (PAIRS, DENSE)  # made beside the packing that a layer holds
DENSITIES = (0.05, 0.2, 0.4, 0.65, 1.0)
INT8_DENSITIES = (0.1, 0.3, 0.6)
PATTERNS = {1 / 8: (1, 8), 1 / 4: (1, 4), 1 / 2: (2, 4)}  # by density; 2:16 and 4:8 cost about what these do
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weight:
    """A weight [out, in] that ways are measured on, in the packings that they ask for, each made once."""

    dense: Tensor
    pattern: tuple[int, int] | None = None  # of its zeros, which else are anywhere

    @classmethod
    def zeroed(cls, values: Tensor, chance: Tensor, density: float, by_pattern: bool) -> Weight:
        """Keep a share ``density`` of ``values`` [out, in]: anywhere, or by the pattern that has this density.

        ``chance`` [out, in], uniform in [0, 1), says which.
        """
        if not by_pattern:
            return cls(values * (chance < density))
        n, m = PATTERNS[density]
        cols = values.shape[1] - values.shape[1] % m
        first = (chance[:, :cols:m] * m).long().unsqueeze(2)  # of n places, around the group's end
        keep = (torch.arange(m) - first) % m < n
        dense = values.clone()
        dense[:, :cols].unflatten(1, (-1, m)).mul_(keep)
        return cls(dense, (n, m))

    @cached_property
    def bitmap(self) -> BitmapTensor:
        """Row-major, its own values."""
        return BitmapTensor.from_dense(self.dense)

    @cached_property
    def tiled(self) -> TiledBitmap:
        """As a SparseLinear holds it."""
        return TiledBitmap.from_bitmap(self.bitmap)

    @cached_property
    def compact(self) -> dict[str, compact.Compact]:
        """As a CompactLinear holds it, by the name of the packing."""
        int8 = Int8Bitmap.from_bitmap(self.bitmap)
        if self.pattern is None:
            return {"int8": TiledInt8.from_int8(int8)}
        return {
            "nm": NMTensor.from_bitmap(self.bitmap, *self.pattern),
            "nm-int8": NMInt8.from_int8(int8, *self.pattern),
        }


@dataclass(frozen=True, slots=True)
class Way:
    """How a product is computed; the times between measured numbers of tokens follow from ``step`` and ``grain``."""

    packing: str  # what it reads of the weight
    tokens: tuple[int, ...]  # numbers at which it is measured, ascending
    prepare: Callable[[Weight], Run]  # a weight -> what is timed
    step: int = 1  # tokens after which its work repeats; a measured number unless 1
    grain: int = 1  # tokens that it rounds up to within a step
    most_tokens: int | None = None  # that it takes at all
    task: tuple[int, int] | None = None  # rows and tokens that one thread computes at a time
    densities: tuple[float, ...] = DENSITIES  # at which it is measured; one where zeros do not matter
    activation_bits: int | None = None  # of the int8 kernels: a way for each

    def takes(self, tokens: int) -> bool:
        """Tell whether the way can be used for ``tokens`` rows."""
        return self.most_tokens is None or tokens <= self.most_tokens

    @property
    def by_pattern(self) -> bool:
        """Tell whether it is measured on n:m weights."""
        return self.packing.startswith("nm")


def _pairs(weight: Weight) -> Run:
    return partial(linear.pairs_linear, weight=ColumnPairs.from_tiled(weight.tiled))


def _decode(packing: str, densities: tuple[float, ...], bits: int | None = None) -> Way:
    """Return the way of a compact packing's kernel; ``bits`` of an activation where its values are int8."""

    def prepare(weight: Weight) -> Run:
        return partial(
            compact.compact_linear_chunks, weight=weight.compact[packing], activation_bits=bits or 8
        )

    return Way(packing, (1, 4, 8, 16, 64), prepare, step=16, densities=densities, activation_bits=bits)


def _unpack(packing: str, densities: tuple[float, ...]) -> Way:
    def prepare(weight: Weight) -> Run:
        return partial(compact.compact_unpacked_linear, weight=weight.compact[packing])

    return Way(packing, (16, 64, 256), prepare, densities=densities)


NM_DENSITIES = tuple(PATTERNS)
_HALF = NM_DENSITIES[-1:]

WAYS: dict[str, Way] = {
    "bitmap": Way(
        BITMAP, (1, 2, 4, 8, 12, 16, 32, 64, 256),
        lambda weight: partial(linear.bitmap_linear_chunks, weight=weight.tiled), step=16,
    ),
    "unpack": Way(BITMAP, (16, 64, 256), lambda weight: partial(linear.unpacked_linear, weight=weight.tiled)),
    "pairs": Way(PAIRS, (16, 32, 48, 64, 128, 256), _pairs, step=64, grain=16, task=(256, 64)),
    # Two dense ways are timed on copies of their own: the second would find the weight in the cache.
    "kernel": Way(
        DENSE, (1, 2, 4, 8, 12, 16), lambda weight: partial(linear.dense_linear, weight=weight.dense.clone()),
        most_tokens=linear.DENSE_TOKENS, densities=(1.0,),
    ),
    "torch": Way(
        DENSE, (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
        lambda weight: partial(functional.linear, weight=weight.dense.clone()), densities=(1.0,),
    ),
    "int8": _decode("int8", INT8_DENSITIES, 8),
    # Two vectors a token where "int8" has one: arithmetic, the same whatever the zeros. At one token neither counts.
    "int8-a16": _decode("int8", INT8_DENSITIES[1:2], 16),
    "int8-unpack": _unpack("int8", INT8_DENSITIES[1:2]),  # the product takes the time
    "nm": _decode("nm", NM_DENSITIES),
    "nm-unpack": _unpack("nm", _HALF),
    "nm-int8": _decode("nm-int8", NM_DENSITIES, 8),
    "nm-int8-a16": _decode("nm-int8", NM_DENSITIES, 16),
    "nm-int8-unpack": _unpack("nm-int8", _HALF),
}  # fmt: skip


def ways_of(packing: str, tokens: int, activation_bits: int | None = None) -> tuple[str, ...]:
    """Return the names of the ways that read ``packing`` and take ``tokens`` rows, quantised to so many bits."""
    return tuple(
        name
        for name, way in WAYS.items()
        if way.packing == packing and way.takes(tokens) and way.activation_bits in (None, activation_bits)
    )
