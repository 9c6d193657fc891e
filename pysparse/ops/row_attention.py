"""Attention of one query row a sequence over all its keys: what a decoding step asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend
from pysparse.ops.linear import _DTYPE_CODES
from pysparse.ops.traced import is_traced


def row_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(scale query key^T) value as [B, 1, Hq, Dv], in one call of the core.

    ``query`` [B, Hq, 1, D], ``key`` [B, Hk, M, D] and ``value`` [B, Hk, M, Dv] of float32 or bfloat16 on the CPU, with
    M, D and Dv at least 1; query head h reads key head h // (Hq / Hk). Logits, weights and sums are float32, the
    result is rounded once. A head's result does not depend on the others nor on the threads. Not differentiable.
    Raises ValueError for other shapes, dtypes or devices.
    """
    if not _fits(query, key, value):
        shapes = ", ".join(str(tuple(part.shape)) for part in (query, key, value))
        raise ValueError(
            f"query, key and value are {shapes}: they are [B, Hq, 1, D], [B, Hk, M, D] and [B, Hk, M, Dv], Hk divides "
            "Hq and no other size is 0"
        )
    if not (query.dtype is key.dtype is value.dtype and query.dtype in _DTYPE_CODES):
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: all float32 or all bfloat16"
        )
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        raise ValueError(
            f"query is on {query.device}, key on {key.device}, value on {value.device}: CPU only"
        )
    query, key, value = (p if p.stride(3) == 1 else p.contiguous() for p in (query, key, value))
    return call_row_attention(query, key, value, scale)


def call_row_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Run :func:`row_attention` on what :func:`can_row_attend` has allowed."""
    batch, heads, _, dim = query.shape
    key_heads, keys, width = value.shape[1:]
    out = torch.empty(batch, 1, heads, width, dtype=query.dtype)
    backend.core().row_attention(
        (query.data_ptr(), *query.stride()[:3]), (key.data_ptr(), *key.stride()[:3]),
        (value.data_ptr(), *value.stride()[:3]),
        (_DTYPE_CODES[query.dtype], batch, heads, key_heads, keys, dim, width), scale, out.data_ptr(),
    )  # fmt: skip
    return out


def can_row_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the compiled kernels take these as they are: no copy, no gradient, no tracer."""
    if is_traced() or not (type(query) is type(key) is type(value) is Tensor):
        return False
    if not (query.is_cpu and query.dtype in _DTYPE_CODES and query.dtype is key.dtype is value.dtype):
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    return (
        _fits(query, key, value)
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and backend.available()
    )


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    batch, heads, rows, dim = query.shape
    key_batch, key_heads, keys, key_dim = key.shape
    return (
        (batch, dim) == (key_batch, key_dim)
        and value.shape[:3] == key.shape[:3]
        and rows == 1
        and min(heads, key_heads, keys, dim, value.shape[3]) > 0
        and heads % key_heads == 0
    )
