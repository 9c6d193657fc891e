"""Which way a sparse layer computes a call, and the second packing that some ways need."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pysparse import backend, ops
from pysparse.formats import ColumnPairs, TiledBitmap
from pysparse.ops import cost_cache
from pysparse.ops.costs import HELD, Choice, choose, second_packing

PREFILL = ("auto", "packed", "unpack")
DECODE_TOKENS = 8  # up to here reading the weight is what costs: the decode kernel is taken unmeasured
SMALL_WEIGHT = 1 << 18  # entries up to which a layer is not worth measuring, nor a second packing
_AUTO_MARGIN = 1.1  # how much faster a second packing must be to be worth its memory
_PAIR_BYTES = {torch.bfloat16: 3.2, torch.float32: 5.3}  # a kept weight in pair blocks, at the most


def bucket(tokens: int) -> int:
    """Return the number of tokens that stands for ``tokens`` in decisions: exact to 64, then in steps of 64."""
    return tokens if tokens <= 64 else -(-tokens // 64) * 64


def pairs_stay_small(entries: int, nnz: int, dtype: torch.dtype) -> bool:
    """Tell whether the bitmap and pair blocks together take fewer bytes than the dense weight.

    A pruned model must not outgrow its dense self by default: that is from 64 % zeros on in bf16, 58 % in fp32.
    """
    bitmap = nnz * dtype.itemsize + entries / 8
    return bitmap + nnz * _PAIR_BYTES.get(dtype, float("inf")) <= entries * dtype.itemsize


@dataclass(slots=True)
class Dispatch:
    """A layer's decisions, by number of tokens, and its second packing, made when the first one calls for it.

    ``prefill`` "auto" makes one where costs say it is faster by a tenth and both packings together stay
    below the dense weight, "packed" wherever it is faster at all, "unpack" never. One layer makes one second
    packing at most: pair blocks, or ("packed" only) a dense copy where the sparse arithmetic cannot win.
    """

    prefill: str = "auto"
    packing: ColumnPairs | Tensor | None = None
    _ways: dict[tuple[int, int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prefill not in PREFILL:
            raise ValueError(f"prefill is one of {', '.join(PREFILL)}; got '{self.prefill}'")

    def clear(self) -> None:
        """Drop the second packing and the decisions: the weight or its place has changed."""
        self.packing = None
        self._ways.clear()

    def way(self, shape: tuple[int, int], nnz: int, dtype: torch.dtype, tokens: int) -> str:
        """Return how ``tokens`` rows are computed; measures the machine's costs if they are not known."""
        place = (bucket(tokens), torch.get_num_threads(), backend.isa_epoch())
        found = self._ways.get(place)
        if found is None:
            choice = self.choice(shape, nnz, dtype, tokens, may_measure=True)
            found = self._ways[place] = choice.way
        return found

    def choice(
        self, shape: tuple[int, int], nnz: int, dtype: torch.dtype, tokens: int, may_measure: bool
    ) -> Choice:
        """Return the decision for ``tokens`` rows with its reason and the expected times."""
        entries = shape[0] * shape[1]
        if tokens <= DECODE_TOKENS:
            return Choice("bitmap", {}, f"up to {DECODE_TOKENS} tokens the weight is read once")
        fixed = "bitmap" if tokens <= ops.DECODE_TOKENS else "unpack"
        if entries <= SMALL_WEIGHT:
            return Choice(fixed, {}, f"{entries} entries are too few to measure")
        if backend.isa() == "generic":
            return Choice(fixed, {}, "generic kernels are not measured")
        costs = cost_cache.costs_for(dtype) if may_measure else cost_cache.known_costs(dtype)
        if costs is None:
            return Choice(
                fixed, {}, "costs not measured yet: they are at the first such call, or by pysparse tune"
            )
        density = nnz / entries
        ways: tuple[str, ...] = HELD
        if self.prefill == "packed":
            ways = (*HELD, second_packing(costs, shape, density))
            return choose(costs, shape, density, bucket(tokens), ways, 1.0)
        if self.prefill == "auto" and pairs_stay_small(entries, nnz, dtype):
            ways = (*HELD, "pairs")
        return choose(costs, shape, density, bucket(tokens), ways, _AUTO_MARGIN)

    def run(self, way: str, x: Tensor, weight: TiledBitmap, bias: Tensor | None) -> Tensor:
        """Compute ``x @ W.T + bias`` by ``way``, packing first where that has not happened yet."""
        if way == "bitmap":
            return ops.bitmap_linear_chunks(x, weight, bias)
        if way == "unpack":
            return ops.unpacked_linear(x, weight, bias)
        if way == "pairs":
            if not isinstance(self.packing, ColumnPairs):
                self.packing = ColumnPairs.from_tiled(weight)
            return ops.pairs_linear(x, self.packing, bias)
        if not isinstance(self.packing, Tensor):
            self.packing = ops.bitmap_unpack(weight)
        return ops.dense_linear(x, self.packing, bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the second packing."""
        return 0 if self.packing is None else int(self.packing.nbytes)

    def __str__(self) -> str:
        kind = (
            "none" if self.packing is None else "pairs" if isinstance(self.packing, ColumnPairs) else "dense"
        )
        return f"prefill={self.prefill}, second_packing={kind}"
