"""``y = x W^T + b`` for a bitmap-packed and for a dense weight.

Registered with the low-level ``torch.library.Library``: the ``custom_op`` decorator costs several
microseconds more per call, and a small model makes hundreds of calls per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from pysparse import backend
from pysparse.formats.tiled import TiledBitmap

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
    "bitmap_linear(Tensor x, Tensor values, Tensor masks, Tensor tile_offsets, Tensor? bias, int out_features) -> Tensor"
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
    op = torch.ops.pysparse.bitmap_linear.default
    result: Tensor = op(x, weight.values, weight.masks, weight.tile_offsets, bias, weight.shape[0])
    return result


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` by the compiled dense kernel for few tokens, by torch's for many.

    ``x`` [..., K], ``weight`` [N, K], ``bias`` [N] share one dtype. The kernel reads the weight once at
    memory speed, which torch's own CPU path does not reach for a single token.
    """
    result: Tensor = torch.ops.pysparse.dense_linear.default(x, weight, bias)
    return result


def bitmap_unpack(weight: TiledBitmap) -> Tensor:
    """Return the dense matrix [N, K] of a tiled bitmap, exactly."""
    return _unpack(weight.values, weight.masks, weight.tile_offsets, *weight.shape, first_tile=0)


def _unpack(
    values: Tensor, masks: Tensor, tile_offsets: Tensor, rows: int, cols: int, first_tile: int
) -> Tensor:
    """Unpack ``rows`` rows that start at ``first_tile``."""
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
    cols = x.shape[-1]
    tokens = x.numel() // cols if cols else math.prod(x.shape[:-1])
    if tokens > DECODE_TOKENS:
        return _bitmap_linear_many(x, values, masks, tile_offsets, bias, out_features)
    if not x.is_contiguous():
        x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
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
        block = _unpack(values, masks, tile_offsets, end - first_row, cols, first_tile)
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
    y = x.new_empty((*x.shape[:-1], out_features))
    backend.core().dense_linear(
        code, x.data_ptr(), tokens, cols, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        out_features,
    )  # fmt: skip
    return y


def _bitmap_linear_fake(
    x: Tensor, values: Tensor, masks: Tensor, tile_offsets: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _dense_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_library.impl("bitmap_linear", _bitmap_linear_cpu, "CPU")
_library.impl("dense_linear", _dense_linear_cpu, "CPU")
torch.library.register_fake("pysparse::bitmap_linear", _bitmap_linear_fake, lib=_library)
torch.library.register_fake("pysparse::dense_linear", _dense_linear_fake, lib=_library)
