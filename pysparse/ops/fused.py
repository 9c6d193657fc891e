"""Products that share an input in one call: several weights, or a gate and an up weight with what follows them.

One call of the core packs the input once and shares the tiles of all weights out over the threads once; what is
saved are the microseconds of the other calls, and with a gate the passes over two intermediate tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pysparse import backend
from pysparse.formats.tiled import TiledBitmap
from pysparse.ops.linear import (
    _DTYPE_CODES,
    DECODE_TOKENS,
    _bitmap_linear_many,
    _check_dtypes,
    call_bitmap_linear,
    needs_dispatcher,
)


class Operand(NamedTuple):
    """The arrays of one :class:`TiledBitmap`, with its bias and its number of rows."""

    values: Tensor
    masks: Tensor
    tile_offsets: Tensor
    bias: Tensor | None
    rows: int

    def content(self) -> tuple[Tensor | None, ...]:
        """Return the tensors whose numbers a product depends on."""
        return self.values, self.bias


# Named as in transformers' ACT2FN; the position is the code that the core knows.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

_library = torch.library.Library("pysparse", "FRAGMENT")
_library.define(
    "bitmap_linear_group(Tensor x, Tensor[] values, Tensor[] masks, Tensor[] tile_offsets, Tensor?[] biases, "
    "int[] out_features) -> Tensor[]"
)
_library.define(
    "gated_linear(Tensor x, Tensor[] values, Tensor[] masks, Tensor[] tile_offsets, Tensor?[] biases, "
    "int out_features, str activation) -> Tensor"
)


def bitmap_linear_group(
    x: Tensor, weights: Sequence[TiledBitmap], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Return ``[x @ W.T + b for W, b in zip(weights, biases)]``, computed in one call.

    ``x`` is [..., K], each weight (N_i, K) and each bias [N_i] or None, all of one dtype (float32 or bfloat16).
    The results [..., N_i] have the bits of :func:`pysparse.ops.bitmap_linear`'s, for any number of threads. Above
    64 tokens, and where a gradient is wanted, the weights are multiplied one after the other. Raises ValueError
    for other shapes or dtypes, and for no weight at all.
    """
    biases = [None] * len(weights) if biases is None else biases
    if not weights or len(biases) != len(weights):
        raise ValueError(
            f"{len(weights)} weights and {len(biases)} biases: give at least one, and as many of each"
        )
    for weight in weights:
        _check_features(x, weight)
    return call_bitmap_linear_group(x, [_operand(w, b) for w, b in zip(weights, biases, strict=True)])


def gated_linear(
    x: Tensor,
    gate: TiledBitmap,
    up: TiledBitmap,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Return ``activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`` (SwiGLU: Shazeer 2020, arXiv 2002.05202).

    ``x`` is [..., K], ``gate`` and ``up`` are (N, K), the biases [N] or None, all of one dtype (float32 or
    bfloat16); the result is [..., N]. ``activation`` is a name of ``ACTIVATIONS``: "silu", "gelu" (by erf),
    "gelu_pytorch_tanh" or "relu".

    Values are rounded where the separate operations round them: both products to ``x``'s dtype, the activation's
    result again, then the product; the activation itself is computed in float32. So a bfloat16 result has the
    separate operations' bits but where float32 activations a few units apart lie on two sides of a rounding
    boundary, and there it is one step of the activation away. Above 64 tokens, and where a gradient is wanted,
    these are separate operations. Raises ValueError for other shapes, dtypes or names.
    """
    for weight in (gate, up):
        _check_features(x, weight)
    if gate.shape != up.shape:
        raise ValueError(f"gate is {gate.shape} and up {up.shape}: they are multiplied entry by entry")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}; got '{activation}'")
    return call_gated_linear(x, _operand(gate, gate_bias), _operand(up, up_bias), activation)


def call_bitmap_linear_group(x: Tensor, operands: Sequence[Operand]) -> list[Tensor]:
    """Multiply ``x`` by the weights of ``operands``; the caller has checked the feature counts."""
    if needs_gradient(x, operands):
        return [call_bitmap_linear(x, *operand) for operand in operands]
    if needs_dispatcher(x, None):
        values, masks, tile_offsets, biases, rows = (list(column) for column in zip(*operands, strict=True))
        result: list[Tensor] = torch.ops.pysparse.bitmap_linear_group.default(
            x, values, masks, tile_offsets, biases, rows
        )
        return result
    return _group(x, operands)


def call_gated_linear(x: Tensor, gate: Operand, up: Operand, activation: str) -> Tensor:
    """Run :func:`gated_linear` on the arrays of two weights; the caller has checked shapes and the name."""
    if needs_gradient(x, (gate, up)):
        return ACTIVATIONS[activation](call_bitmap_linear(x, *gate)) * call_bitmap_linear(x, *up)
    if needs_dispatcher(x, None):
        values, masks, tile_offsets, biases, rows = (list(column) for column in zip(gate, up, strict=True))
        result: Tensor = torch.ops.pysparse.gated_linear.default(
            x, values, masks, tile_offsets, biases, rows[0], activation
        )
        return result
    return _gated(x, gate, up, activation)


class Prepared:
    """Weights that are multiplied again and again: a call hands the core the addresses of input and outputs alone.

    The arrays are kept alive, but whoever calls must see that they are still the ones meant, and in the same
    place (:meth:`is_current`). A copy, and what is unpickled, is None: addresses hold in one process only.
    """

    __slots__ = ("_addresses", "_core", "cols", "dtype", "operands", "rows")

    operands: tuple[Any, ...]
    _addresses: tuple[Any, ...]
    _core: Any  # the core's object, which holds the addresses

    def __init__(self, operands: Sequence[Operand], cols: int) -> None:
        """Take operands of weights (N_i, ``cols``) of one dtype; ValueError for a dtype without a kernel."""
        self.operands, self.cols, self.dtype = tuple(operands), cols, operands[0].values.dtype
        self.rows = tuple(one.rows for one in operands)
        self._addresses = tuple(_addresses(self.dtype, one[0], one) for one in operands)
        self._core = backend.core().PreparedWeights(_DTYPE_CODES[self.dtype], cols, list(self._addresses))

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def is_current(self, index: int, buffers: Mapping[str, Tensor | None], bias: Tensor | None) -> bool:
        """Tell whether operand ``index`` is what a layer's ``buffers`` and ``bias`` hold now, where it was."""
        operand: Operand = self.operands[index]
        values, masks, tile_offsets, own_bias, _ = operand
        address = self._addresses[index]
        return (
            buffers["values"] is values
            and buffers["masks"] is masks
            and buffers["tile_offsets"] is tile_offsets
            and bias is own_bias
            and values.data_ptr() == address[0]
            and (bias is None or bias.data_ptr() == address[6])
        )

    def takes(self, x: Tensor) -> bool:
        """Tell whether ``x`` is one token that may go to the kernel past torch's dispatcher, as nothing is traced."""
        return (
            x.numel() == self.cols
            and x.dtype is self.dtype
            and x.size(-1) == self.cols
            and type(x) is Tensor
            and x.is_cpu
            and x.is_contiguous()
        )

    def linear(self, x: Tensor) -> Tensor:
        """Return the product with the only weight; ``x`` is one token that :meth:`takes` has allowed."""
        y = torch.empty((*_ones(x), self.rows[0]), dtype=self.dtype)
        self._core.linear(x.data_ptr(), 1, y.data_ptr())
        return y

    def group(self, x: Tensor) -> list[Tensor]:
        """Return the products with all weights; ``x`` as for :meth:`linear`."""
        batch, dtype = _ones(x), self.dtype
        outputs = [torch.empty((*batch, rows), dtype=dtype) for rows in self.rows]
        self._core.group(x.data_ptr(), 1, [y.data_ptr() for y in outputs])
        return outputs

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """Return :func:`gated_linear` of the two weights; ``x`` as for :meth:`linear`."""
        y = torch.empty((*_ones(x), self.rows[0]), dtype=self.dtype)
        self._core.gated(x.data_ptr(), 1, ACTIVATION_CODES[activation], y.data_ptr())
        return y


def _ones(x: Tensor) -> tuple[int, ...]:
    """Return the shape of the one token ``x`` but for its features: ones, found sooner than a torch.Size is sliced."""
    return (1,) * (x.dim() - 1)


def _nothing() -> None:
    return None


class _Biased(Protocol):
    @property
    def bias(self) -> Tensor | None: ...


def needs_gradient(x: Tensor, operands: Sequence[_Biased]) -> bool:
    """Tell whether autograd must see a product of ``x`` with ``operands``: packed weights are frozen, biases not."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(one.bias is not None and one.bias.requires_grad for one in operands)


def _operand(weight: TiledBitmap, bias: Tensor | None) -> Operand:
    return Operand(weight.values, weight.masks, weight.tile_offsets, bias, weight.shape[0])


def _check_features(x: Tensor, weight: TiledBitmap) -> None:
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")


def _addresses(dtype: torch.dtype, x: Tensor, operand: Operand) -> tuple[int, ...]:
    """Return an operand as the core takes it; ValueError when its dtype is not ``x``'s or has no kernel."""
    values, masks, tile_offsets, bias, rows = operand
    if (
        values.dtype is not dtype
        or (bias is not None and bias.dtype is not dtype)
        or dtype not in _DTYPE_CODES
    ):
        _check_dtypes(x, values, bias)
    return (
        values.data_ptr(), values.numel(), masks.data_ptr(), masks.numel(), tile_offsets.data_ptr(),
        tile_offsets.numel(), 0 if bias is None else bias.data_ptr(), rows,
    )  # fmt: skip


def _group(x: Tensor, operands: Sequence[Operand]) -> list[Tensor]:
    dtype = x.dtype
    arguments = [_addresses(dtype, x, operand) for operand in operands]
    *batch, cols = x.shape
    tokens = x.numel() // cols if cols else math.prod(batch)
    if tokens > DECODE_TOKENS:
        return [_bitmap_linear_many(x, *operand) for operand in operands]
    if not x.is_contiguous():
        x = x.contiguous()
    outputs = [torch.empty(*batch, operand[4], dtype=dtype) for operand in operands]
    backend.core().bitmap_linear_group(
        _DTYPE_CODES[dtype], x.data_ptr(), tokens, cols, arguments, [y.data_ptr() for y in outputs]
    )
    return outputs


def _gated(x: Tensor, gate: Operand, up: Operand, activation: str) -> Tensor:
    dtype = x.dtype
    arguments = _addresses(dtype, x, gate), _addresses(dtype, x, up)
    *batch, cols = x.shape
    tokens = x.numel() // cols if cols else math.prod(batch)
    if tokens > DECODE_TOKENS:
        return ACTIVATIONS[activation](_bitmap_linear_many(x, *gate)) * _bitmap_linear_many(x, *up)
    if not x.is_contiguous():
        x = x.contiguous()
    y = torch.empty(*batch, gate[4], dtype=dtype)
    backend.core().bitmap_gated_linear(
        _DTYPE_CODES[dtype],
        x.data_ptr(),
        tokens,
        cols,
        *arguments,
        ACTIVATION_CODES[activation],
        y.data_ptr(),
    )
    return y


def _group_cpu(
    x: Tensor,
    values: list[Tensor],
    masks: list[Tensor],
    tile_offsets: list[Tensor],
    biases: list[Tensor | None],
    out_features: list[int],
) -> list[Tensor]:
    columns = zip(values, masks, tile_offsets, biases, out_features, strict=True)
    return _group(x, [Operand(*column) for column in columns])


def _gated_cpu(
    x: Tensor,
    values: list[Tensor],
    masks: list[Tensor],
    tile_offsets: list[Tensor],
    biases: list[Tensor | None],
    out_features: int,
    activation: str,
) -> Tensor:
    columns = zip(values, masks, tile_offsets, biases, (out_features, out_features), strict=True)
    gate, up = (Operand(*column) for column in columns)
    return _gated(x, gate, up, activation)


def _group_fake(
    x: Tensor,
    values: list[Tensor],
    masks: list[Tensor],
    tile_offsets: list[Tensor],
    biases: list[Tensor | None],
    out_features: list[int],
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], rows)) for rows in out_features]


def _gated_fake(
    x: Tensor,
    values: list[Tensor],
    masks: list[Tensor],
    tile_offsets: list[Tensor],
    biases: list[Tensor | None],
    out_features: int,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("bitmap_linear_group", _group_cpu, "CPU")
_library.impl("gated_linear", _gated_cpu, "CPU")
torch.library.register_fake("pysparse::bitmap_linear_group", _group_fake, lib=_library)
torch.library.register_fake("pysparse::gated_linear", _gated_fake, lib=_library)
