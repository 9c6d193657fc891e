"""Marginals of embedding entries under deep heads: DeepFM, DCN-v2 and DCN-Mix, by compiled walks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pysparse import backend
from pysparse.ops.shapley_entries import (
    EntryDraw,
    EntrySamples,
    EntryTotals,
    Floats,
    check_array,
    check_totals,
)

_KINDS = {"full": 1, "mixture": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """Hidden layers max(0, W x + b), then a final row of weights; batch normalisation is folded in by the caller."""

    weights: tuple[Floats, ...]  # hidden layers, [out, in] each
    biases: tuple[Floats, ...]  # [out] each
    final: Floats  # [last width]
    final_bias: float = 0.0

    def flat(self, inputs: int) -> tuple[Floats, NDArray[np.int64]]:
        """Return all parameters in one array, and the widths; ValueError when shapes do not fit ``inputs``."""
        if len(self.weights) != len(self.biases):
            raise ValueError(f"{len(self.weights)} weights and {len(self.biases)} biases")
        parts, width = [], inputs
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            check_array(f"weight {layer}", weight, np.float32, (len(bias), width))
            check_array(f"bias {layer}", bias, np.float32, (len(bias),))
            parts += [weight.ravel(), bias]
            width = len(bias)
        check_array("final", self.final, np.float32, (width,))
        tail = np.array([self.final_bias], np.float32)
        widths = np.array([len(bias) for bias in self.biases], np.int64)
        return np.concatenate([*parts, self.final, tail]), widths


@dataclass(frozen=True, slots=True, eq=False)
class Crosses:
    """Cross layers. "full", DCN-v2: x' = x + x0 * (W x + b). "mixture", DCN-Mix (Wang et al. 2021): x' = x + sum_i
    <gate_i, x> * x0 * (U_i tanh(C_i tanh(V_i^T x)) + b), with the gates shared by the layers.
    """

    kind: Literal["full", "mixture"]
    bias: Floats  # [layers, D]
    weight: Floats | None = None  # full: [layers, D, D]
    u: Floats | None = None  # mixture: [layers, experts, D, rank]
    c: Floats | None = None  # [layers, experts, rank, rank]
    v: Floats | None = None  # [layers, experts, D, rank]
    gates: Floats | None = None  # [experts, D]
    out: Floats | None = None  # [D], of x_L in the logit beside the MLP; None: the MLP reads x_L

    def flat(self) -> tuple[Floats, int, int]:
        """Return the weights in one array, layer by layer, and the numbers of experts and ranks."""
        if self.kind == "full":
            if self.weight is None:
                raise ValueError("full cross layers need a weight")
            return np.ascontiguousarray(self.weight.reshape(-1)), 0, 0
        if self.kind != "mixture" or self.u is None or self.c is None or self.v is None or self.gates is None:
            raise ValueError(
                f"cross layers are 'full', or a 'mixture' with u, c, v and gates; got {self.kind!r}"
            )
        layers, experts, inputs, rank = self.u.shape
        check_array("c", self.c, np.float32, (layers, experts, rank, rank))
        check_array("v", self.v, np.float32, (layers, experts, inputs, rank))
        parts = [one[layer].ravel() for layer in range(layers) for one in (self.u, self.c, self.v)]
        return np.concatenate(parts), experts, rank


@dataclass(frozen=True, slots=True, eq=False)
class DeepHead:
    """logit = offset + pairs + MLP + crosses, each of them if it is there. DeepFM is ``DeepHead(mlp, pairs=True)``."""

    mlp: Mlp | None
    pairs: bool = False  # the factorisation machine's term
    crosses: Crosses | None = None

    def arguments(self, inputs: int) -> _HeadArguments:
        """Return the parameters as the compiled functions take them, with the arrays that they point into."""
        empty = np.zeros(0, np.float32)
        mlp, widths = (empty, np.zeros(0, np.int64)) if self.mlp is None else self.mlp.flat(inputs)
        if self.crosses is None:
            arrays, shape = (mlp, empty, empty, empty, empty), (self.pairs, 0, 0, 0, 0)
        else:
            x = self.crosses
            weight, experts, rank = x.flat()
            gates, out = (empty if one is None else one for one in (x.gates, x.out))
            arrays = (mlp, weight, x.bias, gates, out)
            shape = (self.pairs, _KINDS[x.kind], len(x.bias), experts, rank)
        for name, array in zip(("mlp", "cross weight", "cross bias", "gates", "out"), arrays, strict=True):
            check_array(name, array, np.float32, array.shape)
            if not np.isfinite(array).all():
                raise ValueError(f"{int((~np.isfinite(array)).sum())} numbers of {name} are not finite")
        return _HeadArguments(shape, widths, arrays)


@dataclass(frozen=True, slots=True, eq=False)
class _HeadArguments:
    shape: tuple[bool, int, int, int, int]
    widths: NDArray[np.int64]
    arrays: tuple[Floats, ...]

    def all(self) -> tuple[tuple[bool, int, int, int, int], tuple[int, int], list[tuple[int, int]]]:
        addresses = [(array.ctypes.data, array.size) for array in self.arrays]
        return self.shape, (self.widths.ctypes.data, len(self.widths)), addresses


def head_shapley(samples: EntrySamples, draw: EntryDraw, head: DeepHead, totals: EntryTotals) -> None:
    """Add the marginals of ``samples`` under ``head`` to ``totals``, as :func:`pysparse.ops.fm_shapley`.

    The first layer moves by one column of its weight a removal; the other layers multiply 60 coalitions at a time.
    Raises ValueError for shapes that do not fit and numbers that are not finite, too.
    """
    check_totals(samples, draw, totals)
    arguments = head.arguments(samples.base.size)
    backend.core().shapley_head(*samples.arguments(), draw.arguments(), *arguments.all(), totals.arguments())


def head_marginals(
    samples: EntrySamples, draw: EntryDraw, head: DeepHead, orders: NDArray[np.int32] | None = None
) -> Floats:
    """Return each sample's marginals under ``head``, as :func:`pysparse.ops.fm_marginals`."""
    players = len(samples.base) * draw.per_field(samples.base.shape[1])
    if orders is not None:
        check_array("orders", orders, np.int32, (len(samples.ids), players))
    marginals, arguments = (
        np.empty((len(samples.ids), players), np.float32),
        head.arguments(samples.base.size),
    )
    backend.core().shapley_head_marginals(
        *samples.arguments(), draw.arguments(orders), *arguments.all(), marginals.ctypes.data
    )
    return marginals
