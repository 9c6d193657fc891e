"""What AnchorAttention and ProxyAttn look at to choose keys, in plain torch: the oracle of the compiled kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pysparse.ops.attention_reference import row_positions, visible


def pooled(values: Tensor, position: Tensor, size: int, pools: int) -> tuple[Tensor, Tensor]:
    """Return (means [pools, ...], which pools have rows) of ``values`` [rows, ...] by position // size."""
    sums = values.new_zeros(pools, *values.shape[1:]).index_add_(0, position // size, values)
    counts = torch.bincount(position // size, minlength=pools).to(values.dtype)
    counts = counts.view(-1, *[1] * (values.dim() - 1))
    return sums / counts.clamp(min=1), counts.flatten() > 0


def keep_mask(
    q: Tensor, k: Tensor, anchor: Tensor, scale: float, q_offset: int, bounds: list[tuple[int, int]],
    region: tuple[int, int, int], rule: tuple[float, int, bool],
) -> Tensor:  # fmt: skip
    """Return boolean [B, heads of the index, groups, keys]: the stripes of every group."""
    group, init, local = region
    theta, pools, share = rule
    batch, heads, rows, _ = q.shape
    groups = -(-(q_offset + rows) // group)
    ratio = heads // k.shape[1]
    mask = torch.zeros(batch, heads, groups, k.shape[2], dtype=torch.bool, device=q.device)
    for b, (start, end) in enumerate(bounds):
        position = row_positions(torch.arange(rows, device=q.device), q_offset, start)
        valid = (position >= 0) & (position < end - start)
        for g in range(groups):
            here = valid & (position // group == g)
            last = g * group - local
            if last <= init or not bool(here.any()):
                continue
            candidates = slice(start + init, start + last)
            inside = position[here] - g * group
            for h in range(heads):
                means, live = pooled(q[b, h, here].float(), inside, group // pools, pools)
                tops, _ = pooled(anchor[b, h, here], inside, group // pools, pools)
                logits = means.to(q.dtype).float() @ k[b, h // ratio, candidates].float().mT
                missed = logits < ((tops - theta) / scale)[:, None]
                missed |= ~live[:, None]
                mask[b, h, g, candidates] = ~missed.all(dim=0)
    if share:
        mask = mask.unflatten(1, (k.shape[1], ratio)).any(dim=2)
    return mask


def proxy_scores(
    q: Tensor, k: Tensor, scale: float, q_offset: int, bounds: list[tuple[int, int]], grid: tuple[int, int, int]
) -> Tensor:  # fmt: skip
    """Return the block scores [B, proxies, q blocks, key blocks], float32."""
    proxies, block, stride = grid
    batch, _, rows, _ = q.shape
    q_blocks, key_blocks = -(-(q_offset + rows) // block), -(-k.shape[2] // block)
    mean_q = q.float().unflatten(1, (proxies, -1)).mean(dim=2).to(q.dtype).float()
    mean_k = k.float().expand(-1, max(k.shape[1], proxies), -1, -1)
    mean_k = mean_k.unflatten(1, (proxies, -1)).mean(dim=2).to(q.dtype).float()
    scores = torch.zeros(batch, proxies, q_blocks, key_blocks, device=q.device)
    for b, (start, end) in enumerate(bounds):
        position = row_positions(torch.arange(rows, device=q.device), q_offset, start)
        strided = (position >= 0) & (position < end - start) & (position % stride == 0)
        columns = torch.arange(start, end, stride, device=q.device)
        for m in range(q_blocks):
            here = (strided & (position // block == m)).nonzero().flatten()
            if not len(here):
                continue
            seen = visible(here, k.shape[2], q_offset, (start, end), True)[:, columns]
            logits = (mean_q[b][:, here] @ mean_k[b][:, columns].mT) * scale
            weights = logits.masked_fill(~seen, -math.inf).softmax(dim=-1).amax(dim=1)
            target = ((columns - start) // block).expand(proxies, -1)
            scores[b, :, m] = scores[b, :, m].scatter_reduce(1, target, weights, "amax")
    return scores


def block_mass(
    q: Tensor, k: Tensor, scale: float, q_offset: int, bounds: list[tuple[int, int]], block: int
) -> Tensor:  # fmt: skip
    """Return the mean attention of the last block of rows over key blocks, float32 [B, Hq, key blocks]."""
    batch, heads, rows, _ = q.shape
    mass = torch.zeros(batch, heads, -(-k.shape[2] // block), device=q.device)
    ratio = heads // k.shape[1]
    for b, (start, end) in enumerate(bounds):
        position = row_positions(torch.arange(rows, device=q.device), q_offset, start)
        valid = (position >= 0) & (position < end - start)
        if not bool(valid.any()):
            continue
        here = (valid & (position // block == int(position[valid].max()) // block)).nonzero().flatten()
        seen = visible(here, k.shape[2], q_offset, (start, end), True)[:, start:end]
        keys = k[b, :, start:end].float().repeat_interleave(ratio, dim=0)
        logits = ((q[b][:, here].float() @ keys.mT) * scale).masked_fill(~seen, -math.inf)
        target = (torch.arange(end - start, device=q.device) // block).expand(heads, -1)
        mass[b].scatter_add_(1, target, logits.softmax(dim=-1).mean(dim=1))
    return mass
