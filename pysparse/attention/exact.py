"""Exact attention by torch, some rows at a time, for what the compiled kernels do not express.

Sliding windows, soft-capped logits, learned sinks, position biases, gradients, dropout, other dtypes and devices:
memory grows with the number of keys, and a windowed layer reads the keys of its window only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """What beside queries, keys and values decides the result."""

    scale: float
    q_offset: int = 0
    key_range: Tensor | None = None  # int64 [B, 2]
    window: int | None = None  # a row sees this many keys, its own included
    softcap: float | None = None
    sinks: Tensor | None = None  # [Hq]: a logit that takes its share and gives nothing
    dropout: float = 0.0
    bias: Tensor | None = None  # [B or 1, Hq or 1, N, M]: added to the scaled logits, as T5's
    mask: Tensor | None = (
        None  # [B or 1, Hq or 1, N, M], bool or additive; instead of all the rest about positions
    )


def one_row_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return [B, 1, Hq, Dv] for one query a sequence that sees every key: a decoding step, in two batched products.

    ``query`` [B, Hq, 1, D], ``key`` [B, Hk, M, D], ``value`` [B, Hk, M, Dv] of one dtype; the softmax is float32's.
    On a CPU torch's fused attention multiplies head by head there, and takes several times as long from some
    hundred keys on; keys that several heads share are not repeated either.
    """
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    weights = torch.softmax((rows @ key.transpose(2, 3)).float() * scale, dim=-1)
    return (weights.to(value.dtype) @ value).reshape(batch, 1, heads, value.shape[-1])


def exact_attention(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    """Return [B, Hq, N, Dv]; a row without a visible key gives 0.

    ``query`` [B, Hq, N, D], ``key`` [B, Hk, M, D], ``value`` [B, Hk, M, Dv], causal unless ``shape.mask`` says
    otherwise.
    """
    parts = []
    for begin in range(0, query.shape[2], ROWS_AT_ONCE):
        end = min(query.shape[2], begin + ROWS_AT_ONCE)
        low, high, mask = _seen(shape, begin, end, key)
        rows = query[:, :, begin:end]
        if shape.bias is not None:
            mask = _biased(mask, shape.bias[:, :, begin:end, low:high])
        parts.append(_rows(rows, key[:, :, low:high], value[:, :, low:high], mask, shape))
    if not parts:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    return torch.cat(parts, dim=2)


def _seen(shape: Shape, begin: int, end: int, key: Tensor) -> tuple[int, int, Tensor]:
    """Return the first and one past the last key that rows [begin, end) may see, and their mask."""
    if shape.mask is not None:
        return 0, key.shape[2], shape.mask[:, :, begin:end]
    row = torch.arange(begin, end, device=key.device).unsqueeze(1) + shape.q_offset
    low = 0 if shape.window is None else max(0, begin + shape.q_offset - shape.window + 1)
    high = min(key.shape[2], end + shape.q_offset)
    column = torch.arange(low, high, device=key.device)
    mask = column <= row
    if shape.window is not None:
        mask &= column > row - shape.window
    if shape.key_range is None:
        return low, high, mask.view(1, 1, *mask.shape)
    start, stop = shape.key_range.to(key.device).view(-1, 1, 1, 1, 2).unbind(-1)
    inside = (column >= start) & (column < stop) & (row < stop) & (row >= start)
    return low, high, mask & inside


def _biased(mask: Tensor, bias: Tensor) -> Tensor:
    """Return an additive mask of ``bias``, with the least number where a bool ``mask`` hides a key."""
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def _rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, shape: Shape) -> Tensor:
    if shape.softcap is not None or shape.sinks is not None:
        return _composed(query, key, value, mask, shape)
    ratio = query.shape[1] // key.shape[1]
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=shape.dropout, scale=shape.scale, enable_gqa=ratio > 1
    )
    return _without_blind(out, mask)


def _composed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, shape: Shape) -> Tensor:
    ratio = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
    logits = (query @ key.transpose(2, 3)).float() * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if shape.sinks is not None:
        sinks = shape.sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    # a row that sees nothing would be -inf throughout, and its softmax NaN
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(blind, 0.0).softmax(-1)[..., : key.shape[2]]
    weights = functional.dropout(weights, shape.dropout).to(value.dtype)
    return _without_blind(weights @ value, mask)


def _without_blind(out: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return out
    return torch.where(mask.any(-1, keepdim=True), out, torch.zeros((), dtype=out.dtype, device=out.device))
