"""``y = x W^T + b`` for any compact weight (int8 values, n:m, both) by a way that the caller has chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse.formats import NMInt8, NMTensor, TiledInt8
from pysparse.ops import int8, nm

Compact = TiledInt8 | NMTensor | NMInt8  # as the kernels read it


def compact_linear_chunks(
    x: Tensor, weight: Compact, bias: Tensor | None = None, activation_bits: int = 8
) -> Tensor:
    """Return ``x @ W.T + bias`` by the kernel for few tokens, some at a time, however many there are.

    Arguments, result and errors are those of :func:`pysparse.ops.int8_linear`, :func:`pysparse.ops.nm_linear` or
    :func:`pysparse.ops.nm_int8_linear`, by the type of ``weight``. Not differentiable.
    """
    _check_features(x, weight)
    rows = weight.shape[0]
    if isinstance(weight, TiledInt8):
        return int8.int8_decode(x, _int8_arrays(weight), bias, rows, weight.group_size, activation_bits)
    if isinstance(weight, NMTensor):
        return nm.nm_decode(x, (weight.values, weight.indices), bias, rows, (weight.n, weight.m))
    pattern = weight.matrix.n, weight.matrix.m
    return nm.nm_int8_decode(
        x, _nm_int8_arrays(weight), bias, rows, pattern, weight.group_size, activation_bits
    )


def compact_unpacked_linear(x: Tensor, weight: Compact, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` by torch's product on rows unpacked into the cache; ``x`` is not quantised.

    Shapes, dtypes and errors as :func:`compact_linear_chunks`. Not differentiable.
    """
    _check_features(x, weight)
    rows = weight.shape[0]
    if isinstance(weight, TiledInt8):
        return int8.int8_unpacked(x, _int8_arrays(weight), bias, rows, weight.group_size)
    if isinstance(weight, NMTensor):
        return nm.nm_unpacked(x, (weight.values, weight.indices), bias, rows, (weight.n, weight.m))
    pattern = weight.matrix.n, weight.matrix.m
    return nm.nm_int8_unpacked(x, _nm_int8_arrays(weight), bias, rows, pattern, weight.group_size)


def compact_unpack(weight: Compact, dtype: torch.dtype) -> Tensor:
    """Return the dense, dequantised matrix [N, K] in float32 or bfloat16, the weight's own dtype without scales.

    Raises ValueError for another dtype of a weight that has no scales.
    """
    if isinstance(weight, TiledInt8):
        return int8.int8_unpack(weight, dtype)
    if isinstance(weight, NMInt8):
        return nm.nm_int8_unpack(weight, dtype)
    if dtype is not weight.dtype:
        raise ValueError(f"the weight is {weight.dtype}, {dtype} is asked for: only int8 values have a scale")
    return nm.nm_unpack(weight)


def _check_features(x: Tensor, weight: Compact) -> None:
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")


def _int8_arrays(weight: TiledInt8) -> tuple[Tensor, ...]:
    return weight.values, weight.masks, weight.tile_offsets, weight.scales, weight.row_sums


def _nm_int8_arrays(weight: NMInt8) -> tuple[Tensor, ...]:
    return weight.matrix.values, weight.matrix.indices, weight.scales, weight.row_sums
