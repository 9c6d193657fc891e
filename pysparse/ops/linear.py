"""``y = x W^T + b`` for a bitmap-packed and for a dense weight.

Registered with the low-level ``torch.library.Library``: the ``custom_op`` decorator costs several
microseconds more per call, and a small model makes hundreds of calls per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pysparse import backend
from pysparse.formats.pairs import ColumnPairs
from pysparse.formats.tiled import TiledBitmap
from pysparse.ops.traced import is_traced

KERNEL_DTYPES = (torch.float32, torch.bfloat16)

# Up to here the weights are expanded in registers once for 16 tokens at a time; from here on the arithmetic
# is as much as the dense product's, so tiles are unpacked into a cache-sized block and torch's GEMM runs on it.
DECODE_TOKENS = 64
# The dense kernel streams the weight once for all its tokens; torch's GEMM packs better beyond.
DENSE_TOKENS = 16
_UNPACK_BYTES = 4 << 20  # size of the unpacked block: stays in the second-level caches of two cores

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

_library = torch.library.Library("pysparse", "DEF")
_library.define(
    "bitmap_linear(Tensor x, Tensor values, Tensor masks, Tensor tile_offsets, Tensor? bias, int out_features) "
    "-> Tensor"
)
_library.define(
    "bitmap_unpack(Tensor values, Tensor masks, Tensor tile_offsets, int rows, int cols, int first_tile) -> Tensor"
)
_library.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def is_kernel_dtype(dtype: torch.dtype) -> bool:
    """Tell whether compiled kernels exist for values of ``dtype``."""
    return dtype in KERNEL_DTYPES


def bitmap_linear(x: Tensor, weight: TiledBitmap, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for a tiled bitmap ``weight`` of shape (N, K).

    ``x`` is [..., K] and ``bias`` [N], both of the weight's dtype (float32 or bfloat16); the result is
    [..., N] in that dtype, accumulated in float32. Raises ValueError for other shapes or dtypes.
    Non-finite inputs spread as in the dense product; the bfloat16 dot instruction flushes denormals to zero.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")
    return call_bitmap_linear(x, weight.values, weight.masks, weight.tile_offsets, bias, weight.shape[0])


def call_bitmap_linear(
    x: Tensor, values: Tensor, masks: Tensor, tile_offsets: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Run the product on the arrays of a :class:`TiledBitmap`; the caller has checked the feature count."""
    if needs_dispatcher(x, bias):
        result: Tensor = torch.ops.pysparse.bitmap_linear.default(
            x, values, masks, tile_offsets, bias, out_features
        )
        return result
    return _bitmap_linear_cpu(x, values, masks, tile_offsets, bias, out_features)


def needs_dispatcher(x: Tensor, bias: Tensor | None) -> bool:
    """Tell whether autograd, a tracer or a tensor subclass must see the call on ``x``.

    Where none does, the dispatcher's three or four microseconds are saved.
    """
    if type(x) is not Tensor or not x.is_cpu or is_traced():
        return True
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def bitmap_linear_chunks(x: Tensor, weight: TiledBitmap, bias: Tensor | None = None) -> Tensor:
    """Return :func:`bitmap_linear`'s result by the decode kernel, 16 tokens at a time, however many there are."""
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")
    if x.dtype is not weight.values.dtype or (bias is not None and bias.dtype is not x.dtype):
        _check_dtypes(x, weight.values, bias)
    return _decode(x, weight.values, weight.masks, weight.tile_offsets, bias, weight.shape[0])


def unpacked_linear(x: Tensor, weight: TiledBitmap, bias: Tensor | None = None) -> Tensor:
    """Return :func:`bitmap_linear`'s result by torch's product on rows unpacked into the cache."""
    return _bitmap_linear_many(x, weight.values, weight.masks, weight.tile_offsets, bias, weight.shape[0])


def pairs_linear(x: Tensor, weight: ColumnPairs, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for a ``weight`` of shape (N, K) in pair blocks: the kernel for many tokens.

    Arguments, result and errors are those of :func:`bitmap_linear`; a token's result does not depend on the
    tokens beside it. Not differentiable: training goes through the bitmap.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")
    _check_dtypes(x, weight.values, bias)
    rows, cols = weight.shape
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    backend.core().pairs_linear(
        _DTYPE_CODES[x.dtype], x.data_ptr(), math.prod(x.shape[:-1]), cols, weight.values.data_ptr(),
        weight.values.shape[0], weight.indices.data_ptr(), weight.row_order.data_ptr(), weight.row_order.numel(),
        weight.counts.data_ptr(), weight.counts.numel(), weight.block_offsets.data_ptr(),
        weight.block_offsets.numel(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), rows,
    )  # fmt: skip
    return y


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` by the compiled dense kernel for few tokens, by torch's for many.

    ``x`` [..., K], ``weight`` [N, K], ``bias`` [N] share one dtype. The kernel reads the weight once at
    memory speed, which torch's own CPU path does not reach for a single token.
    """
    if needs_dispatcher(x, bias) or (torch.is_grad_enabled() and weight.requires_grad):
        result: Tensor = torch.ops.pysparse.dense_linear.default(x, weight, bias)
        return result
    return _dense_linear_cpu(x, weight, bias)


def bitmap_unpack(weight: TiledBitmap) -> Tensor:
    """Return the dense matrix [N, K] of a tiled bitmap, exactly (float32 or bfloat16, on the CPU)."""
    result: Tensor = torch.ops.pysparse.bitmap_unpack.default(
        weight.values, weight.masks, weight.tile_offsets, *weight.shape, 0
    )
    return result


def _bitmap_unpack_cpu(
    values: Tensor, masks: Tensor, tile_offsets: Tensor, rows: int, cols: int, first_tile: int
) -> Tensor:
    """Unpack ``rows`` rows that start at ``first_tile``."""
    _check_dtypes(values, values, None)
    dense = torch.empty(rows, cols, dtype=values.dtype)
    backend.core().bitmap_unpack(
        _DTYPE_CODES[values.dtype], values.data_ptr(), values.numel(), masks.data_ptr(), masks.shape[0],
        tile_offsets.data_ptr(), cols, first_tile, rows, dense.data_ptr(),
    )  # fmt: skip
    return dense


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise ValueError(
            f"x is {x.dtype}, the weight {weight.dtype}"
            + (f", the bias {bias.dtype}" if bias is not None else "")
            + ": they must be the same; convert the input or call model.to(dtype)"
        )
    if weight.dtype not in _DTYPE_CODES:
        raise ValueError(f"kernels take float32 and bfloat16 values, not {weight.dtype}")


def _bitmap_linear_cpu(
    x: Tensor, values: Tensor, masks: Tensor, tile_offsets: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    code = _DTYPE_CODES.get(values.dtype)
    if code is None or x.dtype is not values.dtype or (bias is not None and bias.dtype is not values.dtype):
        _check_dtypes(x, values, bias)
    *batch, cols = x.shape
    tokens = x.numel() // cols if cols else math.prod(batch)
    if tokens > DECODE_TOKENS:
        return _bitmap_linear_many(x, values, masks, tile_offsets, bias, out_features)
    return _decode(x, values, masks, tile_offsets, bias, out_features)


def _decode(
    x: Tensor, values: Tensor, masks: Tensor, tile_offsets: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    code = _DTYPE_CODES[values.dtype]
    *batch, cols = x.shape
    tokens = x.numel() // cols if cols else math.prod(batch)
    if not x.is_contiguous():
        x = x.contiguous()
    y = torch.empty(*batch, out_features, dtype=x.dtype)
    backend.core().bitmap_linear(
        code, x.data_ptr(), tokens, cols, values.data_ptr(), values.numel(), masks.data_ptr(), masks.numel(),
        tile_offsets.data_ptr(), tile_offsets.numel(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        out_features,
    )  # fmt: skip
    return y


def _bitmap_linear_many(
    x: Tensor, values: Tensor, masks: Tensor, tile_offsets: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Unpack some rows into a cache-sized block, multiply by torch's GEMM, go on with the next rows."""
    cols = x.shape[-1]
    block_tiles = max(1, _UNPACK_BYTES // max(1, cols * values.element_size()) // 16)
    y = x.new_empty((*x.shape[:-1], out_features))
    for first_tile in range(0, -(-out_features // 16), block_tiles):
        first_row = first_tile * 16
        end = min(out_features, first_row + block_tiles * 16)
        block = _bitmap_unpack_cpu(values, masks, tile_offsets, end - first_row, cols, first_tile)
        y[..., first_row:end] = functional.linear(x, block, None if bias is None else bias[first_row:end])
    return y


def _dense_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    code = _DTYPE_CODES.get(weight.dtype)
    out_features, cols = weight.shape
    tokens = x.numel() // cols if cols else DENSE_TOKENS + 1
    if code is None or tokens > DENSE_TOKENS or not weight.is_contiguous():
        return functional.linear(x, weight, bias)
    if x.dtype is not weight.dtype or (bias is not None and bias.dtype is not weight.dtype):
        _check_dtypes(x, weight, bias)
    if x.shape[-1] != cols:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {cols}")
    if not x.is_contiguous():
        x = x.contiguous()
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype)
    backend.core().dense_linear(
        code, x.data_ptr(), tokens, cols, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        out_features,
    )  # fmt: skip
    return y


def _bitmap_linear_fake(
    x: Tensor, values: Tensor, masks: Tensor, tile_offsets: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _bitmap_unpack_fake(
    values: Tensor, masks: Tensor, tile_offsets: Tensor, rows: int, cols: int, first_tile: int
) -> Tensor:
    return values.new_empty((rows, cols))


def _dense_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_library.impl("bitmap_linear", _bitmap_linear_cpu, "CPU")
_library.impl("bitmap_unpack", _bitmap_unpack_cpu, "CPU")
_library.impl("dense_linear", _dense_linear_cpu, "CPU")


def _bitmap_linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, masks, tile_offsets, _bias, out_features = inputs
    ctx.save_for_backward(values, masks, tile_offsets)
    ctx.shape = (out_features, x.shape[-1])


def _bitmap_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the input and the bias; the packed weight is frozen."""
    values, masks, tile_offsets = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ bitmap_unpack(TiledBitmap(values, masks, tile_offsets, ctx.shape))
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x, None, None, None, grad_bias, None


def _dense_linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _dense_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


torch.library.register_autograd(
    "pysparse::bitmap_linear", _bitmap_linear_backward, setup_context=_bitmap_linear_save, lib=_library
)
torch.library.register_autograd(
    "pysparse::dense_linear", _dense_linear_backward, setup_context=_dense_linear_save, lib=_library
)
torch.library.register_fake("pysparse::bitmap_linear", _bitmap_linear_fake, lib=_library)
torch.library.register_fake("pysparse::bitmap_unpack", _bitmap_unpack_fake, lib=_library)
torch.library.register_fake("pysparse::dense_linear", _dense_linear_fake, lib=_library)
