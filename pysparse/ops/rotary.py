"""Rotary position embedding of queries and keys in one call, with the bits of the eager code."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend
from pysparse.ops.linear import _DTYPE_CODES
from pysparse.ops.traced import is_traced


def rotary(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x * cosine + rotate_half(x) * sine`` for ``query`` and for ``key`` (RoFormer, arXiv 2104.09864).

    ``query`` [B, Hq, N, D], ``key`` [B, Hk, N, D], ``cosine`` and ``sine`` [B or 1, N, D] of one dtype, float32 or
    bfloat16, on the CPU; D is even, and dimension i turns with i + D/2. The two products and their sum are
    rounded to the dtype one by one, so the results have the bits of torch's separate operations; they are laid out
    as their inputs. Not differentiable. Raises ValueError for other shapes, dtypes or devices.
    """
    parts = (query, key, cosine, sine)
    if not _fits(*parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(
            f"query, key, cosine and sine are {shapes}: they are [B, Hq, N, D], [B, Hk, N, D] and twice "
            "[B or 1, N, D] with an even D"
        )
    if any(part.dtype is not query.dtype for part in parts) or query.dtype not in _DTYPE_CODES:
        raise ValueError(
            f"query, key, cosine and sine are {', '.join(str(part.dtype) for part in parts)}: all float32 or all "
            "bfloat16"
        )
    if not all(part.is_cpu for part in parts):
        raise ValueError(
            f"the kernels run on the CPU, not on {', '.join(str(part.device) for part in parts)}"
        )
    return call_rotary(*(part if part.stride(-1) == 1 else part.contiguous() for part in parts))


def call_rotary(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Run :func:`rotary` on what :func:`can_rotate` has allowed."""
    batch, _, rows, dim = query.shape
    results = _room(query), _room(key)
    backend.core().rotary(
        (_place(query), _place(results[0]), query.shape[1]), (_place(key), _place(results[1]), key.shape[1]),
        _angles(cosine), _angles(sine), (_DTYPE_CODES[query.dtype], batch, rows, dim),
    )  # fmt: skip
    return results


def can_rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """Tell whether the compiled kernels take these as they are: no copy, no gradient, no tracer."""
    if is_traced():
        return False
    dtype = query.dtype
    for part in (query, key, cosine, sine):
        if type(part) is not Tensor or not part.is_cpu or part.dtype is not dtype or part.stride(-1) != 1:
            return False
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or cosine.requires_grad or sine.requires_grad
    ):
        return False
    return dtype in _DTYPE_CODES and _fits(query, key, cosine, sine) and backend.available()


def _fits(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    if not (query.dim() == key.dim() == 4 and cosine.dim() == sine.dim() == 3):
        return False
    batch, heads, rows, dim = query.shape
    key_batch, key_heads, key_rows, key_dim = key.shape
    return (
        (batch, rows, dim) == (key_batch, key_rows, key_dim)
        and cosine.shape == sine.shape
        and cosine.shape[0] in (1, batch)
        and (rows, dim) == tuple(cosine.shape[1:])
        and heads > 0 < key_heads
        and dim > 0
        and dim % 2 == 0
    )


def _room(x: Tensor) -> Tensor:
    y = torch.empty_like(x)  # with the strides of x, where they leave no gaps
    return y if y.stride(3) == 1 else torch.empty(x.shape, dtype=x.dtype)


def _place(x: Tensor) -> tuple[int, int, int, int]:
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def _angles(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)
