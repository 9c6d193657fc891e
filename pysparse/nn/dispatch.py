"""Which way a layer computes a call, the packings that some ways need, and which layers are packed at all.

Every decision follows from the measured costs of this machine (``pysparse.ops.costs``) and is the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pysparse import backend, ops
from pysparse.formats import ColumnPairs, TiledBitmap
from pysparse.ops import cost_cache
from pysparse.ops.costs import Choice, Costs, choose
from pysparse.ops.ways import BITMAP, DENSE, PAIRS, WAYS, ways_of

PREFILL = ("auto", "packed", "unpack")
SMALL_WEIGHT = 1 << 18  # entries up to which a layer is not worth measuring, nor a second packing
# How much faster than the layer's own packing alone a second packing must be to be worth its memory.
_MARGIN = {"auto": 1.1, "packed": 1.02, "unpack": 1.0}
_PAIR_BYTES = {torch.bfloat16: 3.2, torch.float32: 5.3}  # a kept weight in pair blocks, at the most


def bucket(tokens: int) -> int:
    """Return the number of tokens that stands for ``tokens`` in decisions: exact to 64, then in steps of 16."""
    return tokens if tokens <= 64 else -(-tokens // 16) * 16


def bitmap_bytes(entries: int, nnz: int, dtype: torch.dtype) -> float:
    """Return the bytes of a tiled bitmap, offsets and padding aside."""
    return nnz * dtype.itemsize + entries / 8


def pairs_stay_small(entries: int, nnz: int, dtype: torch.dtype) -> bool:
    """Tell whether the bitmap and pair blocks together take fewer bytes than the dense weight.

    A pruned model must not outgrow its dense self by default: that is from 64 % zeros on in bf16, 58 % in fp32.
    """
    pairs = nnz * _PAIR_BYTES.get(dtype, float("inf"))
    return bitmap_bytes(entries, nnz, dtype) + pairs <= entries * dtype.itemsize


def sparse_ways(prefill: str, entries: int, nnz: int, dtype: torch.dtype, tokens: int) -> tuple[str, ...]:
    """Return the ways that ``prefill`` allows a layer with a bitmap, by what they hold beside it."""
    ways = ways_of(BITMAP, tokens)
    if prefill == "packed" or (prefill == "auto" and pairs_stay_small(entries, nnz, dtype)):
        ways += ways_of(PAIRS, tokens)
    return ways + ways_of(DENSE, tokens) if prefill == "packed" else ways


def is_measured(entries: int) -> bool:
    """Tell whether costs decide for a weight of so many entries: not for a tiny one, nor for generic kernels."""
    return entries > SMALL_WEIGHT and backend.available() and backend.isa() != "generic"


@dataclass(slots=True)
class Dispatch:
    """A sparse layer's decisions, by number of tokens, and its other packings, made when a call wants them.

    ``prefill`` "auto" makes pair blocks of a bitmap where costs say that they are faster by a tenth and both
    packings together stay below the dense weight; "packed" makes whatever is faster, pair blocks, a dense copy or
    both; "unpack" makes none. Int8 and n:m packings have no pair blocks: there "auto" makes none either.
    """

    prefill: str = "auto"
    packing: str = BITMAP  # that the layer holds: "bitmap" | "int8" | "nm" | "nm-int8"
    activation_bits: int | None = None  # where the values are int8
    vectorised: bool = True  # False where the packing's kernel is a generic one, which nothing is measured of
    pairs: ColumnPairs | None = None
    dense: Tensor | None = None  # the plain weight
    unasked: int = field(init=False, default=1)  # tokens up to which the kernel is taken without a question
    kernel: str = field(init=False)  # the way of few tokens
    unpacking: str = field(init=False)
    _ways: dict[tuple[int, int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prefill not in PREFILL:
            raise ValueError(f"prefill is one of {', '.join(PREFILL)}; got '{self.prefill}'")
        self.unasked = 0 if self.prefill == "packed" else 1
        self.kernel, self.unpacking = ways_of(self.packing, 1, self.activation_bits)

    def clear(self) -> None:
        """Drop the other packings and the decisions: the weight or its place has changed."""
        self.pairs = self.dense = None
        self._ways.clear()

    def decided(self, tokens: int) -> str | None:
        """Return how ``tokens`` rows are computed if that has been decided for the present threads and level."""
        return self._ways.get((bucket(tokens), torch.get_num_threads(), backend.isa_epoch()))

    def way(self, shape: tuple[int, int], nnz: int, dtype: torch.dtype, tokens: int) -> str:
        """Return how ``tokens`` rows are computed; measures the machine's costs if they are not known."""
        found = self.decided(tokens)
        if found is None:
            found = self.choice(shape, nnz, dtype, tokens, may_measure=True).way
            self._ways[bucket(tokens), torch.get_num_threads(), backend.isa_epoch()] = found
        return found

    def choice(
        self, shape: tuple[int, int], nnz: int, dtype: torch.dtype, tokens: int, may_measure: bool
    ) -> Choice:
        """Return the decision for ``tokens`` rows with its reason and the expected times."""
        entries = shape[0] * shape[1]
        if tokens <= self.unasked:
            return Choice(self.kernel, {}, "for one token the smallest weight is read")
        fixed = self.kernel if tokens <= ops.DECODE_TOKENS else self.unpacking
        if not is_measured(entries) or not self.vectorised:
            cause = "generic kernels are" if entries > SMALL_WEIGHT else f"a weight of {entries} entries is"
            return Choice(fixed, {}, f"{cause} not measured")
        costs = cost_cache.costs_for(dtype) if may_measure else cost_cache.known_costs(dtype)
        if costs is None:
            return Choice(
                fixed, {}, "costs not measured yet: they are at the first such call, or by pysparse tune"
            )
        ways = self._allowed(entries, nnz, dtype, bucket(tokens))
        return choose(costs, shape, nnz / entries, bucket(tokens), ways, _MARGIN[self.prefill])

    def _allowed(self, entries: int, nnz: int, dtype: torch.dtype, tokens: int) -> tuple[str, ...]:
        if self.packing == BITMAP:
            return sparse_ways(self.prefill, entries, nnz, dtype, tokens)
        dense = ways_of(DENSE, tokens) if self.prefill == "packed" else ()
        return ways_of(self.packing, tokens, self.activation_bits) + dense

    def run(self, way: str, x: Tensor, weight: TiledBitmap | ops.Compact, bias: Tensor | None) -> Tensor:
        """Compute ``x @ W.T + bias`` by ``way``, packing first where that has not happened yet."""
        if way == "pairs":
            assert isinstance(weight, TiledBitmap)
            if self.pairs is None:
                self.pairs = ColumnPairs.from_tiled(weight)
            return ops.pairs_linear(x, self.pairs, bias)
        if WAYS[way].packing == DENSE:
            if self.dense is None:
                self.dense = dense_copy(weight, x.dtype)
            multiply = ops.dense_linear if way == "kernel" else functional.linear
            return multiply(x, self.dense, bias)
        if isinstance(weight, TiledBitmap):
            return (ops.bitmap_linear_chunks if way == self.kernel else ops.unpacked_linear)(x, weight, bias)
        if way == self.kernel:
            return ops.compact_linear_chunks(x, weight, bias, self.activation_bits or 8)
        return ops.compact_unpacked_linear(x, weight, bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the packings beside the layer's own."""
        return sum(int(packing.nbytes) for packing in (self.pairs, self.dense) if packing is not None)

    def __str__(self) -> str:
        held = {"pairs": self.pairs, "dense": self.dense}
        names = [name for name, packing in held.items() if packing is not None]
        return f"prefill={self.prefill}, second_packing={'+'.join(names) or 'none'}"


def dense_copy(weight: TiledBitmap | ops.Compact, dtype: torch.dtype) -> Tensor:
    """Return the plain matrix of a packed weight; ``dtype`` is that of int8 values written out."""
    return ops.bitmap_unpack(weight) if isinstance(weight, TiledBitmap) else ops.compact_unpack(weight, dtype)


def dense_kernel_tokens(shape: tuple[int, int], dtype: torch.dtype) -> frozenset[int]:
    """Return the numbers of tokens that a dense weight multiplies faster by our kernel than by torch.

    Where nothing has been measured (this measures nothing), all that the kernel is made for.
    """
    counts = range(1, ops.DENSE_TOKENS + 1)
    costs = cost_cache.known_costs(dtype) if is_measured(shape[0] * shape[1]) else None
    if costs is None:
        return frozenset(counts)
    return frozenset(
        n for n in counts if costs.predict("kernel", shape, 1.0, n) <= costs.predict("torch", shape, 1.0, n)
    )


OPTIMIZE = {"speed": "packed", "balanced": "auto", "memory": "unpack"}  # what a layer may hold: see Dispatch
MIN_SPARSITY = 0.3  # from here on a weight is packed where nothing is measured
_GAIN = 1.03  # that packing must promise at some number of tokens
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a weight is to be packed, and why."""

    packs: bool
    reason: str


def judge(
    shape: tuple[int, int], sparsity: float, dtype: torch.dtype, optimize: str = "balanced", tokens: int = 1
) -> Verdict:
    """Decide whether a weight [out, in] = ``shape`` with a fraction ``sparsity`` of zeros is packed.

    "memory": where the bitmap is smaller. "balanced": where moreover it is expected to be faster, by 3 % at
    least, for ``tokens`` rows. "speed": where it is for any number of rows. Costs are measured now if they are
    not known; tiny weights and generic kernels are not measured but packed from ``MIN_SPARSITY`` on.
    """
    entries = shape[0] * shape[1]
    nnz = round(entries * (1.0 - sparsity))
    saved = 1.0 - bitmap_bytes(entries, nnz, dtype) / max(1, entries * dtype.itemsize)
    if optimize == "memory":
        return Verdict(saved > 0, f"{sparsity:.0%} sparse: packing saves {saved:.0%} of the bytes")
    if not (is_measured(entries) and ops.is_kernel_dtype(dtype)):
        word = "below" if sparsity < MIN_SPARSITY else "at least"
        return Verdict(sparsity >= MIN_SPARSITY, f"{sparsity:.0%} sparse, {word} {MIN_SPARSITY:.0%}")
    if optimize == "balanced" and saved <= 0:
        return Verdict(False, f"{sparsity:.0%} sparse: packed it would be larger")
    costs, prefill = cost_cache.costs_for(dtype), OPTIMIZE[optimize]
    counts = _COUNTS if optimize == "speed" else (tokens,)
    gains = {}
    for count in counts:
        ways = sparse_ways(prefill, entries, nnz, dtype, count)
        sparse = fastest(costs, [way for way in ways if WAYS[way].packing != DENSE], shape, sparsity, count)
        gains[count] = fastest(costs, ways_of(DENSE, count), shape, sparsity, count) / sparse
    best = max(counts, key=gains.__getitem__)
    return Verdict(
        gains[best] >= _GAIN, f"{sparsity:.0%} sparse: expected {gains[best]:.2f}x dense at {best} tokens"
    )


def fastest(costs: Costs, ways: Sequence[str], shape: tuple[int, int], sparsity: float, tokens: int) -> float:
    """Return the seconds that the fastest of ``ways`` is expected to take."""
    return min(costs.predict(way, shape, 1.0 - sparsity, tokens) for way in ways)
