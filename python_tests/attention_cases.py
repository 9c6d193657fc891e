"""Random attention problems and their float64 answer, by a masked softmax over the whole matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Case:
    """q [B, Hq, Nq, D], k and v [B, Hk, Nk, D], the rows' place among the keys and each sequence's keys."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_offset: int
    key_range: torch.Tensor | None

    @property
    def bounds(self):
        if self.key_range is None:
            return [(0, self.k.shape[2])] * self.k.shape[0]
        return [tuple(pair) for pair in self.key_range.tolist()]

    @property
    def span(self):
        return {"q_offset": self.q_offset, "key_range": self.key_range}

    def positions(self, b):
        """Positions of the rows of sequence b, and which of them belong to it."""
        start, end = self.bounds[b]
        position = torch.arange(self.q.shape[2]) + self.q_offset - start
        return position, (position >= 0) & (position < end - start)

    def causal_mask(self):
        """Boolean [B, 1, Nq, Nk]: what each row sees."""
        masks = []
        for b, (start, end) in enumerate(self.bounds):
            position, valid = self.positions(b)
            key = torch.arange(self.k.shape[2]) - start
            masks.append((key >= 0) & (key < end - start) & (key <= position[:, None]) & valid[:, None])
        return torch.stack(masks)[:, None]

    def full_mask(self):
        masks = []
        for start, end in self.bounds:
            key = torch.arange(self.k.shape[2])
            masks.append(((key >= start) & (key < end)).expand(self.q.shape[2], -1))
        return torch.stack(masks)[:, None]


def draw(
    seed, dtype, batch=1, heads=2, key_heads=1, rows=70, dim=64, past=0, tail=0, padded=False, spread=1.0
):
    """Draw a case; ``tail`` keys after the last row are not valid, ``padded`` sequences differ in length."""
    generator = torch.Generator().manual_seed(seed)
    keys = past + rows + tail

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    q, k = normal(batch, heads, rows, dim, std=spread), normal(batch, key_heads, keys, dim)
    key_range = None
    if padded or tail:
        cuts = torch.randint(0, max(1, (past + rows) // 3), (batch, 2), generator=generator)
        if not padded:
            cuts = torch.zeros_like(cuts)
        key_range = torch.stack([cuts[:, 0], past + rows - cuts[:, 1]], dim=1).to(torch.int64)
    return Case(q, k, normal(batch, key_heads, keys, dim), past, key_range)


def exact(case, mask, scale=None):
    """Return (out, log-sum-exp) in float64 over the keys of the boolean ``mask`` [B, H or 1, Nq, Nk]."""
    ratio = case.q.shape[1] // case.k.shape[1]
    q = case.q.double()
    k, v = (part.double().repeat_interleave(ratio, dim=1) for part in (case.k, case.v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(dim=-1)
    weights = torch.exp(logits - lse.nan_to_num(neginf=0.0)[..., None])
    return weights @ v, lse


def tolerance(dtype):
    """Largest relative Frobenius error: rounding of the weights and the result in ``dtype``."""
    return 5e-3 if dtype == torch.bfloat16 else 2e-6


def assert_close(actual, expected, dtype):
    """Compare in the Frobenius norm, and every row on its own more loosely; both exact where nothing is seen."""
    out, lse = actual
    wanted, wanted_lse = expected
    error = out.double() - wanted
    relative = float(error.norm() / wanted.norm().clamp(min=1e-30))
    assert relative <= tolerance(dtype), f"relative error {relative:.2e} above {tolerance(dtype):.2e}"
    if not error.numel():
        return
    row = error.abs().amax(dim=-1) / wanted.abs().amax(dim=-1).clamp(min=1.0)
    assert float(row.max()) <= 8 * tolerance(dtype), f"a row is off by {float(row.max()):.2e}"
    finite = wanted_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite), "a row without keys must give -inf, another a number"
    gap = (lse.double() - wanted_lse)[finite].abs()
    assert not len(gap) or float(gap.max()) <= 2 * tolerance(dtype), (
        f"log-sum-exp off by {float(gap.max()):.2e}"
    )


def anchor_mask(case, region):
    """Boolean [B, 1, Nq, Nk]: the region's keys that each row sees."""
    near = torch.zeros_like(case.causal_mask())
    for b, (start, _) in enumerate(case.bounds):
        position, _valid = case.positions(b)
        first = (position // region.group_size * region.group_size - region.local).clamp(min=region.init)
        key = torch.arange(case.k.shape[2]) - start
        near[b, 0] = (key < region.init) | (key >= first[:, None])
    return near & case.causal_mask()


def stripe_mask(case, index):
    """Boolean [B, Hq, Nq, Nk] of the index's lists, spread over the rows of each group."""
    lists = index.to_mask().repeat_interleave(case.q.shape[1] // index.shape[1], dim=1)
    mask = torch.zeros(*case.q.shape[:3], case.k.shape[2], dtype=torch.bool)
    for b in range(len(case.q)):
        position, valid = case.positions(b)
        group = (position // index.group_size).clamp(0, index.shape[2] - 1)
        mask[b] = lists[b][:, group] & valid[:, None]
    return mask & case.causal_mask()


def block_mask(case, index, causal=True):
    """Boolean [B, Hq, Nq, Nk] of the index's blocks, masked."""
    lists = index.to_mask().repeat_interleave(case.q.shape[1] // index.shape[1], dim=1)
    mask = torch.zeros(*case.q.shape[:3], case.k.shape[2], dtype=torch.bool)
    for b, (start, end) in enumerate(case.bounds):
        position = case.positions(b)[0] if causal else torch.arange(case.q.shape[2]) + case.q_offset
        row_block = (position // index.block_q).clamp(0, index.shape[2] - 1)
        key_block = (torch.arange(end - start) // index.block_k).clamp(0, index.key_blocks - 1)
        mask[b, :, :, start:end] = lists[b][:, row_block][:, :, key_block]
    return mask & (case.causal_mask() if causal else case.full_mask())
