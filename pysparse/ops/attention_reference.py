"""Attention over chosen keys in plain torch, some query rows at a time: the oracle of the compiled kernels.

Computes in float64 for float64 inputs and in float32 otherwise, on any device; memory grows with the number of
keys, not with its square. Every function here sees checked arguments (:mod:`pysparse.ops.attention`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pysparse.formats.stripe import BlockIndex, StripeIndex

ROWS_AT_ONCE = 128

# (batch, first row, end row) -> boolean [Hq, rows, keys], True where a row attends to a key.
Selection = Callable[[int, int, int], Tensor]


def row_positions(rows: Tensor, q_offset: int, start: int) -> Tensor:
    """Return the positions of query ``rows``, counted from the sequence's first valid key."""
    return rows + q_offset - start


def visible(rows: Tensor, keys: int, q_offset: int, bounds: tuple[int, int], causal: bool) -> Tensor:
    """Return boolean [rows, keys]: the keys that each row may see at all."""
    start, end = bounds
    columns = torch.arange(keys, device=rows.device)
    valid = (columns >= start) & (columns < end)
    if not causal:
        return valid.expand(len(rows), keys)
    position = rows[:, None] + q_offset
    # A row that is itself padding sees nothing.
    return valid & (columns <= position) & (position >= start) & (position < end)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, selection: Selection
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, row maximum, denominator) of softmax attention over the selected keys.

    ``out`` [B, Hq, Nq, Dv] is the weighted mean, 0 for a row without keys; ``row maximum`` [B, Hq, Nq] is the
    largest scaled logit, -inf for such a row; the denominator sums exp(logit - maximum).
    """
    batch, heads, rows, _ = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    ratio = heads // k.shape[1]
    out = torch.zeros(batch, heads, rows, v.shape[-1], dtype=work, device=q.device)
    maximum = torch.full((batch, heads, rows), -math.inf, dtype=work, device=q.device)
    denominator = torch.zeros(batch, heads, rows, dtype=work, device=q.device)
    for b in range(batch):
        keys = k[b].to(work).repeat_interleave(ratio, dim=0)
        values = v[b].to(work).repeat_interleave(ratio, dim=0)
        for begin in range(0, rows, ROWS_AT_ONCE):
            end = min(rows, begin + ROWS_AT_ONCE)
            chosen = selection(b, begin, end)
            logits = (q[b, :, begin:end].to(work) @ keys.mT) * scale
            logits = logits.masked_fill(~chosen, -math.inf)
            peak = logits.amax(dim=-1) if keys.shape[1] else maximum[b, :, begin:end]
            weights = torch.exp(logits - peak.nan_to_num(neginf=0.0, nan=math.nan)[..., None])
            total = weights.sum(dim=-1)
            # Where the weight is 0 the value does not count, were it NaN: masked keys may be padding.
            product = _product(weights, values, chosen)
            out[b, :, begin:end] = torch.where(
                chosen.any(dim=-1)[..., None].expand_as(product), product / total[..., None], 0.0
            )
            maximum[b, :, begin:end], denominator[b, :, begin:end] = peak, total
    return out, maximum, denominator


def _product(weights: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    if bool(values.isfinite().all()):
        return weights @ values
    finite = values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    special = torch.where(values.isfinite(), 0.0, values)
    result = weights @ finite
    for head in range(len(values)):
        for key in (special[head] != 0).any(dim=-1).nonzero().flatten().tolist():
            touched = chosen[head, :, key]
            result[head, touched] += weights[head, touched, key, None] * special[head, key]
    return result


def dense_selection(
    keys: int, heads: int, q_offset: int, bounds: list[tuple[int, int]], causal: bool, device: torch.device
) -> Selection:
    """Select every visible key."""

    def select(b: int, begin: int, end: int) -> Tensor:
        rows = torch.arange(begin, end, device=device)
        return visible(rows, keys, q_offset, bounds[b], causal).expand(heads, end - begin, keys)

    return select


def anchor_selection(
    keys: int, heads: int, q_offset: int, bounds: list[tuple[int, int]], region: tuple[int, int, int],
    device: torch.device,
) -> Selection:  # fmt: skip
    """Select the first ``init`` keys and those from ``local`` before the row's group on; causal."""
    group, init, local = region

    def select(b: int, begin: int, end: int) -> Tensor:
        rows = torch.arange(begin, end, device=device)
        start = bounds[b][0]
        position = row_positions(rows, q_offset, start)[:, None]
        columns = torch.arange(keys, device=device) - start
        first_local = (position // group * group - local).clamp(min=init)
        near = (columns < init) | (columns >= first_local)
        return (visible(rows, keys, q_offset, bounds[b], True) & near).expand(heads, end - begin, keys)

    return select


def stripe_selection(
    index: StripeIndex, heads: int, q_offset: int, bounds: list[tuple[int, int]]
) -> Selection:
    """Select the keys of the list of each row's group; causal."""
    mask = index.to_mask().repeat_interleave(heads // index.shape[1], dim=1)

    def select(b: int, begin: int, end: int) -> Tensor:
        rows = torch.arange(begin, end, device=mask.device)
        seen = visible(rows, index.key_length, q_offset, bounds[b], True)
        group = row_positions(rows, q_offset, bounds[b][0]) // index.group_size
        return mask[b][:, group.clamp(0, index.shape[2] - 1)] & seen

    return select


def block_selection(
    index: BlockIndex, keys: int, heads: int, q_offset: int, bounds: list[tuple[int, int]], causal: bool
) -> Selection:  # fmt: skip
    """Select the keys of the blocks in the list of each row's block."""
    mask = index.to_mask().repeat_interleave(heads // index.shape[1], dim=1)

    def select(b: int, begin: int, end: int) -> Tensor:
        start = bounds[b][0]
        rows = torch.arange(begin, end, device=mask.device)
        # Without a mask the rows' positions only number their blocks: padding of the keys shifts none.
        row_block = row_positions(rows, q_offset, start if causal else 0) // index.block_q
        key_block = (torch.arange(keys, device=mask.device) - start) // index.block_k
        inside = (key_block >= 0) & (key_block < index.key_blocks)
        chosen = mask[b][:, row_block.clamp(0, index.shape[2] - 1)]
        chosen = chosen[:, :, key_block.clamp(0, index.key_blocks - 1)] & inside
        return chosen & visible(rows, keys, q_offset, bounds[b], causal)

    return select
