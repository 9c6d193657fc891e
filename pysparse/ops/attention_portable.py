"""Attention over chosen keys from torch's own fused kernels, on any device: gather, attend densely, merge.

The path of devices whose compiled kernels are missing or not vouched for: no custom code, the exact keys, and the
time of dense attention over as many keys. Every function here sees checked arguments (:mod:`pysparse.ops.attention`);
parts are (mean, largest logit, denominator) as in ``AttentionState``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pysparse.formats.stripe import StripeIndex

Parts = tuple[Tensor, Tensor, Tensor]
Bounds = list[tuple[int, int]]


def dense_part(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Return (out, log-sum-exp float32) of torch's fused attention; q [B, H, N, D], k and v of as many heads.

    With ``causal`` row i sees the keys up to i.
    """
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse.float()
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse[..., : q.shape[2]].float()
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]].float()


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (out float32, log-sum-exp) over the keys of two parts that share none."""
    lse = torch.logaddexp(one[1], other[1])
    shares = [torch.exp(part[1] - lse.nan_to_num(neginf=0.0))[..., None] for part in (one, other)]
    return one[0].float() * shares[0] + other[0].float() * shares[1], lse


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float, causal: bool, q_offset: int
) -> tuple[Tensor, Tensor]:
    """Return (out, log-sum-exp) of dense attention, sequence by sequence; rows outside theirs are 0 and -inf."""
    out, lse = _nothing(q)
    for b, (start, end) in enumerate(bounds):
        first, last = (
            (max(0, start - q_offset), min(q.shape[2], end - q_offset)) if causal else (0, q.shape[2])
        )
        if first >= last or start >= end:
            continue
        past = q_offset + first - start  # keys before the first row: all rows see them
        rows, heads = q[b : b + 1, :, first:last], q.shape[1] // k.shape[1]
        keys, values = (x[b : b + 1, :, start:end].repeat_interleave(heads, dim=1) for x in (k, v))
        if not causal:
            part = dense_part(rows, keys, values, scale, causal=False)
        else:
            here = slice(past, past + last - first)
            part = dense_part(rows, keys[:, :, here], values[:, :, here], scale, causal=True)
            if past:
                part = merged(
                    dense_part(rows, keys[:, :, :past], values[:, :, :past], scale, causal=False), part
                )
        out[b, :, first:last], lse[b, :, first:last] = part[0][0].to(out.dtype), part[1][0]
    return out, lse


def anchor_state(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, scale: float, q_offset: int, region: tuple[int, int, int]
) -> Parts:
    """Return the state over each group's first and nearest keys, from one product a group."""
    group, init, local = region
    mean = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    peak, total = mean.new_full(q.shape[:3], -math.inf), mean.new_zeros(q.shape[:3])
    ratio = q.shape[1] // k.shape[1]
    for b, (start, end) in enumerate(bounds):
        for first, last, g in _groups(q.shape[2], q_offset, (start, end), group):
            seen_end = q_offset + last  # the key after the last row's own
            near = max(start + init, start + g * group - local)
            keys = torch.cat(
                [
                    torch.arange(start, min(start + init, seen_end), device=q.device),
                    torch.arange(near, seen_end, device=q.device)
                    if near < seen_end
                    else q.new_empty(0).long(),
                ]
            )
            hidden = keys > torch.arange(q_offset + first, seen_end, device=q.device)[:, None]
            rows = q[b, :, first:last].float().unflatten(0, (k.shape[1], ratio))
            logits = (rows @ k[b][:, None, keys].float().mT * scale).masked_fill(hidden, -math.inf)
            top = logits.amax(dim=-1)
            weights = torch.exp(logits - top[..., None])
            mass = weights.sum(dim=-1)
            sums = weights @ v[b][:, None, keys].float() / mass[..., None]
            place = (b, slice(None), slice(first, last))
            mean[place], peak[place], total[place] = sums.flatten(0, 1), top.flatten(0, 1), mass.flatten(0, 1)
    return mean, peak, total


def stripe_attention(
    q: Tensor, k: Tensor, v: Tensor, index: StripeIndex, state: Parts | None, bounds: Bounds, scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out, log-sum-exp) over gathered keys, one dense product for each head and group, merged with a state."""
    if state is None:
        mean, lse = _nothing(q, torch.float32)
    else:
        mean, lse = state[0].clone(), state[1] + state[2].log()
    offsets = index.offsets.view(-1).tolist()
    _, heads, groups = index.shape
    shared, ratio = q.shape[1] // heads, q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for first, last, g in _groups(q.shape[2], q_offset, bounds[b], index.group_size):
            for h in range(q.shape[1]):
                at = (b * heads + h // shared) * groups + g
                keys = index.keys[offsets[at] : offsets[at + 1]].long()
                if not len(keys):
                    continue
                place = (slice(b, b + 1), slice(h, h + 1), slice(first, last))
                near_k, near_v = (x[b, h // ratio, keys][None, None] for x in (k, v))
                part = dense_part(q[place], near_k, near_v, scale, causal=False)
                mean[place], lse[place] = merged((mean[place], lse[place]), part)
    return mean.to(q.dtype), lse


def _nothing(q: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    out = q.new_zeros((batch, rows, heads, dim), dtype=dtype or q.dtype).transpose(1, 2)
    return out, q.new_full((batch, heads, rows), -math.inf, dtype=torch.float32)


def _groups(rows: int, q_offset: int, bounds: tuple[int, int], group: int) -> list[tuple[int, int, int]]:
    """Return (first row, end row, group) of the rows inside a sequence."""
    start, end = bounds
    first, last = max(0, start - q_offset), min(rows, end - q_offset)
    found = []
    while first < last:
        g = (first + q_offset - start) // group
        stop = min(last, (g + 1) * group + start - q_offset)
        found.append((first, stop, g))
        first = stop
    return found
