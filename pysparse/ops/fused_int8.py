"""Products of int8 weights that share an input in one call: a token is quantised once for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.int8 import TiledInt8
from pysparse.ops.fused import ACTIVATION_CODES, ACTIVATIONS, Prepared, needs_gradient
from pysparse.ops.int8 import call_int8_linear, check_quantized_call
from pysparse.ops.linear import DECODE_TOKENS, needs_dispatcher


class Int8Operand(NamedTuple):
    """The arrays of one :class:`TiledInt8`, with its bias, its rows, and how tokens are quantised for it."""

    values: Tensor
    masks: Tensor
    tile_offsets: Tensor
    scales: Tensor
    row_sums: Tensor
    bias: Tensor | None
    rows: int
    group_size: int
    activation_bits: int

    def content(self) -> tuple[Tensor | None, ...]:
        """Return the tensors whose numbers a product depends on."""
        return self.values, self.scales, self.bias

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product with this weight alone."""
        return call_int8_linear(x, self[:5], self.bias, *self[6:])


class PreparedInt8(Prepared):
    """Int8 weights that are multiplied again and again; see :class:`pysparse.ops.Prepared`."""

    __slots__ = ()

    def __init__(self, operands: Sequence[Int8Operand], cols: int, dtype: torch.dtype) -> None:
        """Take operands of weights (N_i, ``cols``) for inputs of ``dtype``.

        ValueError for a dtype without a kernel, of a bias too, and for operands that want tokens quantised to
        different numbers of bits.
        """
        bits = operands[0].activation_bits
        if any(one.activation_bits != bits for one in operands):
            raise ValueError(
                f"activation_bits are {[one.activation_bits for one in operands]}: one is shared"
            )
        empty = torch.empty(0, dtype=dtype)
        (code,) = {check_quantized_call(empty, one.bias, bits) for one in operands}
        self.operands, self.cols, self.dtype = tuple(operands), cols, dtype
        self.rows = tuple(one.rows for one in operands)
        self._addresses = tuple(_addresses(one) for one in operands)
        self._core = backend.core().PreparedInt8(code, cols, bits // 8, list(self._addresses))

    def is_current(self, index: int, buffers: Mapping[str, Tensor | None], bias: Tensor | None) -> bool:
        """Tell whether operand ``index`` is what a layer's ``buffers`` and ``bias`` hold now, where it was."""
        operand: Int8Operand = self.operands[index]
        addresses = self._addresses[index]
        return (
            buffers["values"] is operand.values
            and buffers["masks"] is operand.masks
            and buffers["tile_offsets"] is operand.tile_offsets
            and buffers["scales"] is operand.scales
            and buffers["row_sums"] is operand.row_sums
            and bias is operand.bias
            and operand.values.data_ptr() == addresses[0][0]
            and operand.scales.data_ptr() == addresses[3][0]
            and (bias is None or bias.data_ptr() == addresses[6])
        )

    def group_of(self, x: Tensor) -> list[Tensor]:
        """Return the products of any number of tokens with all weights."""
        x, (batch, tokens) = x.contiguous(), _tokens(x)
        outputs = [torch.empty(*batch, rows, dtype=self.dtype) for rows in self.rows]
        self._core.group(x.data_ptr(), tokens, [y.data_ptr() for y in outputs])
        return outputs

    def gated_of(self, x: Tensor, activation: str) -> Tensor:
        """Return the gated product of any number of tokens with the two weights."""
        x, (batch, tokens) = x.contiguous(), _tokens(x)
        y = torch.empty(*batch, self.rows[0], dtype=self.dtype)
        self._core.gated(x.data_ptr(), tokens, ACTIVATION_CODES[activation], y.data_ptr())
        return y


def int8_linear_group(
    x: Tensor,
    weights: Sequence[TiledInt8],
    biases: Sequence[Tensor | None] | None = None,
    activation_bits: int = 8,
) -> list[Tensor]:
    """Return ``[x @ W.T + b for W, b in zip(weights, biases)]``, computed in one call.

    ``x`` is [..., K], each weight (N_i, K) and each bias [N_i] or None; ``x`` and biases are float32 or bfloat16, all
    the same. The results [..., N_i] have the bits of :func:`pysparse.ops.int8_linear`'s, for any number of threads.
    Above 64 tokens, and where a gradient is wanted or a graph traced, the weights are multiplied one after the other.
    Raises ValueError for other shapes, dtypes or bits, and for no weight at all.
    """
    biases = [None] * len(weights) if biases is None else biases
    if not weights or len(biases) != len(weights):
        raise ValueError(
            f"{len(weights)} weights and {len(biases)} biases: give at least one, and as many of each"
        )
    return call_int8_linear_group(
        x, [_operand(x, w, b, activation_bits) for w, b in zip(weights, biases, strict=True)]
    )


def int8_gated_linear(
    x: Tensor, gate: TiledInt8, up: TiledInt8, activation: str, gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None, activation_bits: int = 8,
) -> Tensor:  # fmt: skip
    """Return ``activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`` for int8 weights.

    Arguments, rounding and errors are those of :func:`pysparse.ops.gated_linear`; tokens are quantised to
    ``activation_bits`` as :func:`pysparse.ops.int8_linear` does.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate is {gate.shape} and up {up.shape}: they are multiplied entry by entry")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}; got '{activation}'")
    both = [_operand(x, w, b, activation_bits) for w, b in ((gate, gate_bias), (up, up_bias))]
    return call_int8_gated_linear(x, both[0], both[1], activation)


def call_int8_linear_group(x: Tensor, operands: Sequence[Int8Operand]) -> list[Tensor]:
    """Multiply ``x`` by the weights of ``operands``; the caller has checked the feature counts."""
    if _goes_alone(x, operands):
        return [one.multiply(x) for one in operands]
    return PreparedInt8(operands, x.shape[-1], x.dtype).group_of(x)


def call_int8_gated_linear(x: Tensor, gate: Int8Operand, up: Int8Operand, activation: str) -> Tensor:
    """Run :func:`int8_gated_linear` on the arrays of two weights; the caller has checked shapes and the name."""
    if _goes_alone(x, (gate, up)):
        return ACTIVATIONS[activation](gate.multiply(x)) * up.multiply(x)
    return PreparedInt8((gate, up), x.shape[-1], x.dtype).gated_of(x, activation)


def _goes_alone(x: Tensor, operands: Sequence[Int8Operand]) -> bool:
    return x.numel() > DECODE_TOKENS * x.shape[-1] or needs_gradient(x, operands) or needs_dispatcher(x, None)


def _operand(x: Tensor, weight: TiledInt8, bias: Tensor | None, activation_bits: int) -> Int8Operand:
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")
    arrays = weight.values, weight.masks, weight.tile_offsets, weight.scales, weight.row_sums
    return Int8Operand(*arrays, bias, weight.shape[0], weight.group_size, activation_bits)


def _addresses(operand: Int8Operand) -> tuple[Any, ...]:
    """Return an operand as the core takes it."""
    arrays = ((array.data_ptr(), array.numel()) for array in operand[:5])
    bias = operand.bias
    return *arrays, operand.group_size, 0 if bias is None else bias.data_ptr(), operand.rows


def _tokens(x: Tensor) -> tuple[torch.Size, int]:
    batch, cols = x.shape[:-1], x.shape[-1]
    return batch, x.numel() // cols if cols else math.prod(batch)
