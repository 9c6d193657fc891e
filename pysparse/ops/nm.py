"""``y = x W^T + b`` where each row keeps n of every m inputs, in float or int8 values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.nm import NMInt8, NMTensor
from pysparse.ops.int8 import _array, check_quantized_call, multiply_unpacked
from pysparse.ops.linear import (
    _DTYPE_CODES,
    DECODE_TOKENS,
    _check_dtypes,
    needs_dispatcher,
)

_library = torch.library.Library("pysparse", "FRAGMENT")
_library.define(
    "nm_linear(Tensor x, Tensor values, Tensor indices, Tensor? bias, int out_features, int n, int m) -> Tensor"
)
_library.define(
    "nm_int8_linear(Tensor x, Tensor values, Tensor indices, Tensor scales, Tensor row_sums, Tensor? bias, "
    "int out_features, int n, int m, int group_size, int activation_bits) -> Tensor"
)


def nm_linear(x: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for an n:m ``weight`` of shape (N, K).

    ``x`` is [..., K] and ``bias`` [N], both of the weight's dtype (float32 or bfloat16); the result is
    [..., N] in that dtype, accumulated in float32. Non-finite inputs spread as in the dense product (by a slow
    kernel). 2:4, 4:8, 1:4, 2:8, 1:8 and 2:16 have vector kernels; other patterns run the generic one, where
    a bitmap is faster. Raises ValueError for other shapes or dtypes.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")
    return call_nm_linear(x, weight.values, weight.indices, bias, weight.shape[0], weight.n, weight.m)


def call_nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int, n: int, m: int
) -> Tensor:
    """Run the product on the arrays of an :class:`NMTensor`; the caller has checked the feature count."""
    if needs_dispatcher(x, bias):
        result: Tensor = torch.ops.pysparse.nm_linear.default(x, values, indices, bias, out_features, n, m)
        return result
    return _nm_linear_cpu(x, values, indices, bias, out_features, n, m)


def nm_int8_linear(x: Tensor, weight: NMInt8, bias: Tensor | None = None, activation_bits: int = 8) -> Tensor:
    """Return ``x @ W.T + bias`` for an n:m ``weight`` of int8 values; ``x`` is quantised as by int8_linear."""
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")
    arrays = weight.matrix.values, weight.matrix.indices, weight.scales, weight.row_sums
    pattern = weight.matrix.n, weight.matrix.m
    return call_nm_int8_linear(x, arrays, bias, weight.shape[0], pattern, weight.group_size, activation_bits)


def call_nm_int8_linear(
    x: Tensor,
    arrays: tuple[Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out_features: int,
    pattern: tuple[int, int],
    group_size: int,
    activation_bits: int,
) -> Tensor:
    """Run the product on the arrays of an :class:`NMInt8`; the caller has checked the feature count."""
    if needs_dispatcher(x, bias):
        result: Tensor = torch.ops.pysparse.nm_int8_linear.default(
            x, *arrays, bias, out_features, *pattern, group_size, activation_bits
        )
        return result
    return _nm_int8_linear_cpu(x, *arrays, bias, out_features, *pattern, group_size, activation_bits)


def _nm_linear_cpu(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int, n: int, m: int
) -> Tensor:
    multiply = nm_unpacked if x.numel() > DECODE_TOKENS * x.shape[-1] else nm_decode
    return multiply(x, (values, indices), bias, out_features, (n, m))


def nm_decode(
    x: Tensor, arrays: tuple[Tensor, ...], bias: Tensor | None, out_features: int, pattern: tuple[int, int]
) -> Tensor:
    """Multiply by the kernel for few tokens, however many there are, on values and indices."""
    values, indices = arrays
    code = _code(x, values, bias)
    *batch, cols = x.shape
    tokens = x.numel() // cols if cols else math.prod(batch)
    x = x.contiguous()
    y = torch.empty(*batch, out_features, dtype=x.dtype)
    backend.core().nm_linear(
        code, x.data_ptr(), tokens, cols, _array(values), _array(indices), *pattern,
        0 if bias is None else bias.data_ptr(), y.data_ptr(), out_features,
    )  # fmt: skip
    return y


def nm_unpacked(
    x: Tensor, arrays: tuple[Tensor, ...], bias: Tensor | None, out_features: int, pattern: tuple[int, int]
) -> Tensor:
    """Unpack some rows into the cache, multiply them by torch's product, go on with the next ones."""
    values, indices = arrays
    code, cols, packed = _code(x, values, bias), x.shape[-1], (_array(values), _array(indices), *pattern)
    return multiply_unpacked(
        x, bias, out_features,
        lambda first, rows, block: backend.core().nm_unpack(
            code, *packed, out_features, cols, first // 16, rows, block
        ),
    )  # fmt: skip


def _code(x: Tensor, values: Tensor, bias: Tensor | None) -> int:
    """Return the dtype's code; ValueError where x, values and bias differ or have no kernel."""
    code = _DTYPE_CODES.get(values.dtype)
    if code is None or x.dtype is not values.dtype or (bias is not None and bias.dtype is not values.dtype):
        _check_dtypes(x, values, bias)
    return _DTYPE_CODES[values.dtype]


def _nm_int8_linear_cpu(
    x: Tensor, values: Tensor, indices: Tensor, scales: Tensor, row_sums: Tensor, bias: Tensor | None,
    out_features: int, n: int, m: int, group_size: int, activation_bits: int,
) -> Tensor:  # fmt: skip
    check_quantized_call(x, bias, activation_bits)
    arrays = values, indices, scales, row_sums
    if x.numel() > DECODE_TOKENS * x.shape[-1]:
        return nm_int8_unpacked(x, arrays, bias, out_features, (n, m), group_size)
    return nm_int8_decode(x, arrays, bias, out_features, (n, m), group_size, activation_bits)


def nm_int8_decode(
    x: Tensor, arrays: tuple[Tensor, ...], bias: Tensor | None, out_features: int, pattern: tuple[int, int],
    group_size: int, activation_bits: int,
) -> Tensor:  # fmt: skip
    """As :func:`nm_decode`, on values, indices, scales and row sums."""
    code = check_quantized_call(x, bias, activation_bits)
    *batch, cols = x.shape
    tokens = x.numel() // cols if cols else math.prod(batch)
    x = x.contiguous()
    y = torch.empty(*batch, out_features, dtype=x.dtype)
    backend.core().nm_int8_linear(
        code, x.data_ptr(), tokens, cols, activation_bits // 8, *_nm_int8_pointers(arrays, pattern), group_size,
        0 if bias is None else bias.data_ptr(), y.data_ptr(), out_features,
    )  # fmt: skip
    return y


def nm_int8_unpacked(
    x: Tensor, arrays: tuple[Tensor, ...], bias: Tensor | None, out_features: int, pattern: tuple[int, int],
    group_size: int,
) -> Tensor:  # fmt: skip
    """As :func:`nm_unpacked`, on values, indices, scales and row sums; ``x`` is not quantised."""
    code, cols, packed = check_quantized_call(x, bias, 8), x.shape[-1], _nm_int8_pointers(arrays, pattern)
    return multiply_unpacked(
        x, bias, out_features,
        lambda first, rows, block: backend.core().nm_int8_unpack(
            code, *packed, group_size, out_features, cols, first // 16, rows, block
        ),
    )  # fmt: skip


def _nm_int8_pointers(arrays: tuple[Tensor, ...], pattern: tuple[int, int]) -> tuple[Any, ...]:
    values, indices, scales, row_sums = map(_array, arrays)
    return values, indices, *pattern, scales, row_sums


def nm_unpack(weight: NMTensor) -> Tensor:
    """Return the dense matrix [N, K] of a float32 or bfloat16 n:m weight, exactly."""
    dense = torch.empty(weight.shape, dtype=weight.dtype)
    backend.core().nm_unpack(
        _DTYPE_CODES[weight.dtype], _array(weight.values), _array(weight.indices), weight.n, weight.m,
        *weight.shape, 0, weight.shape[0], dense.data_ptr(),
    )  # fmt: skip
    return dense


def nm_int8_unpack(weight: NMInt8, dtype: torch.dtype) -> Tensor:
    """Return the dequantised matrix [N, K] in float32 or bfloat16."""
    dense, matrix = torch.empty(weight.shape, dtype=dtype), weight.matrix
    backend.core().nm_int8_unpack(
        _DTYPE_CODES[dtype], _array(matrix.values), _array(matrix.indices), matrix.n, matrix.m,
        _array(weight.scales), _array(weight.row_sums), weight.group_size, *weight.shape, 0, weight.shape[0],
        dense.data_ptr(),
    )  # fmt: skip
    return dense


def _nm_linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[3]))


def _nm_int8_linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[5]))


def _nm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, _bias, out_features, n, m = inputs
    ctx.save_for_backward(values, indices)
    ctx.weight = (n, m, (out_features, x.shape[-1]))


def _nm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the input and the bias; the packed weight is frozen."""
    grad_x = grad @ nm_unpack(NMTensor(*ctx.saved_tensors, *ctx.weight)) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias, None, None, None


def _nm_int8_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *arrays, _bias, out_features, n, m, group_size, _bits = inputs
    ctx.save_for_backward(*arrays)
    ctx.weight = (n, m, (out_features, x.shape[-1]))
    ctx.group_size = group_size


def _nm_int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding: the gradient of the product with the dequantised weight."""
    values, indices, scales, row_sums = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = NMInt8(NMTensor(values, indices, *ctx.weight), scales, row_sums, ctx.group_size)
        grad_x = grad @ nm_int8_unpack(weight, grad.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x, None, None, None, None, grad_bias, None, None, None, None, None


_library.impl("nm_linear", _nm_linear_cpu, "CPU")
_library.impl("nm_int8_linear", _nm_int8_linear_cpu, "CPU")
torch.library.register_fake("pysparse::nm_linear", _nm_linear_fake, lib=_library)
torch.library.register_fake("pysparse::nm_int8_linear", _nm_int8_linear_fake, lib=_library)
torch.library.register_autograd("pysparse::nm_linear", _nm_backward, setup_context=_nm_save, lib=_library)
torch.library.register_autograd(
    "pysparse::nm_int8_linear", _nm_int8_backward, setup_context=_nm_int8_save, lib=_library
)
