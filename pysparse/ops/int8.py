"""``y = x W^T + b`` for int8 weights under a bitmap, with activations quantised token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pysparse import backend
from pysparse.formats.int8 import TiledInt8
from pysparse.ops.linear import _DTYPE_CODES, _UNPACK_BYTES, DECODE_TOKENS, needs_dispatcher

ACTIVATION_BITS = (8, 16)

_library = torch.library.Library("pysparse", "FRAGMENT")
_library.define(
    "int8_linear(Tensor x, Tensor values, Tensor masks, Tensor tile_offsets, Tensor scales, Tensor row_sums, "
    "Tensor? bias, int out_features, int group_size, int activation_bits) -> Tensor"
)


def int8_linear(x: Tensor, weight: TiledInt8, bias: Tensor | None = None, activation_bits: int = 8) -> Tensor:
    """Return ``x @ W.T + bias`` for a tiled int8 ``weight`` of shape (N, K).

    ``x`` is [..., K] and ``bias`` [N], both float32 or both bfloat16; the result is [..., N] in that dtype.
    Each token is quantised with one scale of its own, largest magnitude / 127 (or / 32512 with
    ``activation_bits=16``, two bytes a value, for activations with outliers); the sums are of whole numbers
    and exact. A token that holds a NaN or an infinity gives NaN in all its outputs. Above 64 tokens weights
    are dequantised block by block and torch multiplies them by the unquantised ``x``.
    Raises ValueError for other shapes, dtypes or bits.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")
    arrays = weight.values, weight.masks, weight.tile_offsets, weight.scales, weight.row_sums
    return call_int8_linear(x, arrays, bias, weight.shape[0], weight.group_size, activation_bits)


def call_int8_linear(
    x: Tensor,
    arrays: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    activation_bits: int,
) -> Tensor:
    """Run the product on the arrays of a :class:`TiledInt8`; the caller has checked the feature count."""
    if needs_dispatcher(x, bias):
        result: Tensor = torch.ops.pysparse.int8_linear.default(
            x, *arrays, bias, out_features, group_size, activation_bits
        )
        return result
    return _int8_linear_cpu(x, *arrays, bias, out_features, group_size, activation_bits)


def check_quantized_call(x: Tensor, bias: Tensor | None, activation_bits: int) -> int:
    """Return the dtype code of ``x``; ValueError for a dtype or number of bits without a kernel."""
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"activation_bits is 8 or 16, got {activation_bits}")
    code = _DTYPE_CODES.get(x.dtype)
    if code is None or (bias is not None and bias.dtype is not x.dtype):
        raise ValueError(
            f"x is {x.dtype}" + (f", the bias {bias.dtype}" if bias is not None else "")
            + ": int8 weights take float32 or bfloat16, the same for both"
        )  # fmt: skip
    return code


def _array(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _int8_linear_cpu(
    x: Tensor, values: Tensor, masks: Tensor, tile_offsets: Tensor, scales: Tensor, row_sums: Tensor,
    bias: Tensor | None, out_features: int, group_size: int, activation_bits: int,
) -> Tensor:  # fmt: skip
    check_quantized_call(x, bias, activation_bits)
    arrays = values, masks, tile_offsets, scales, row_sums
    if x.numel() > DECODE_TOKENS * x.shape[-1]:
        return int8_unpacked(x, arrays, bias, out_features, group_size)
    return int8_decode(x, arrays, bias, out_features, group_size, activation_bits)


def int8_decode(
    x: Tensor, arrays: tuple[Tensor, ...], bias: Tensor | None, out_features: int, group_size: int,
    activation_bits: int,
) -> Tensor:  # fmt: skip
    """Multiply by the kernel for few tokens, however many there are; arguments as :func:`call_int8_linear`'s."""
    code = check_quantized_call(x, bias, activation_bits)
    *batch, cols = x.shape
    tokens = x.numel() // cols if cols else math.prod(batch)
    x = x.contiguous()
    y = torch.empty(*batch, out_features, dtype=x.dtype)
    backend.core().int8_linear(
        code, x.data_ptr(), tokens, cols, activation_bits // 8, *map(_array, arrays), group_size,
        0 if bias is None else bias.data_ptr(), y.data_ptr(), out_features,
    )  # fmt: skip
    return y


def int8_unpacked(
    x: Tensor, arrays: tuple[Tensor, ...], bias: Tensor | None, out_features: int, group_size: int
) -> Tensor:
    """Dequantise some rows into the cache, multiply them by torch's product, go on with the next ones."""
    code, cols, pointers = check_quantized_call(x, bias, 8), x.shape[-1], tuple(map(_array, arrays))
    return multiply_unpacked(
        x, bias, out_features,
        lambda first, rows, block: backend.core().int8_unpack(
            code, *pointers, group_size, out_features, cols, first // 16, rows, block
        ),
    )  # fmt: skip


def multiply_unpacked(
    x: Tensor, bias: Tensor | None, out_features: int, unpack: Callable[[int, int, int], None]
) -> Tensor:
    """Unpack some rows into a cache-sized block, multiply by torch's GEMM, go on with the next rows.

    ``unpack(first_row, rows, address)`` writes rows of the dense weight.
    """
    cols = x.shape[-1]
    block_rows = max(1, _UNPACK_BYTES // max(1, cols * x.element_size()) // 16) * 16
    y = x.new_empty((*x.shape[:-1], out_features))
    for first in range(0, out_features, block_rows):
        rows = min(out_features - first, block_rows)
        block = torch.empty(rows, cols, dtype=x.dtype)
        unpack(first, rows, block.data_ptr())
        y[..., first : first + rows] = functional.linear(
            x, block, None if bias is None else bias[first : first + rows]
        )
    return y


def int8_unpack(weight: TiledInt8, dtype: torch.dtype) -> Tensor:
    """Return the dequantised matrix [N, K] in float32 or bfloat16."""
    dense = torch.empty(weight.shape, dtype=dtype)
    arrays = weight.values, weight.masks, weight.tile_offsets, weight.scales, weight.row_sums
    backend.core().int8_unpack(
        _DTYPE_CODES[dtype], *map(_array, arrays), weight.group_size, *weight.shape, 0, weight.shape[0],
        dense.data_ptr(),
    )  # fmt: skip
    return dense


def _int8_linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[6]))


def _int8_linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *arrays, _bias, out_features, group_size, _bits = inputs
    ctx.save_for_backward(*arrays)
    ctx.weight = (group_size, (out_features, x.shape[-1]))


def _int8_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding: the gradient of the product with the dequantised weight."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        values, masks, tile_offsets, scales, row_sums = ctx.saved_tensors
        weight = TiledInt8(values, masks, tile_offsets, scales, row_sums, *ctx.weight)
        grad_x = grad @ int8_unpack(weight, grad.dtype)
    if ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x, None, None, None, None, None, grad_bias, None, None, None


_library.impl("int8_linear", _int8_linear_cpu, "CPU")
torch.library.register_fake("pysparse::int8_linear", _int8_linear_fake, lib=_library)
torch.library.register_autograd(
    "pysparse::int8_linear", _int8_linear_backward, setup_context=_int8_linear_save, lib=_library
)
