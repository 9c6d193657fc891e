"""What planners share: which blocks of keys to keep, from scores; deterministic, ties to the lower index.

Blocks of rows and of keys are counted from a sequence's first valid key, as in
:class:`pysparse.formats.stripe.BlockIndex`; the rows of a call may begin inside a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pysparse.attention.plan import AttentionInput
from pysparse.formats.stripe import BlockIndex


def rank_descending(scores: Tensor) -> Tensor:
    """Return for each entry of the last dimension its place (0 = largest); equal scores: the lower index first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def cumulative_budget(mass: Tensor, gamma: float) -> Tensor:
    """Return the fewest entries of the last dimension that hold the share ``gamma`` of its sum: int64 [...].

    ``mass`` is not negative. ``gamma`` >= 1 asks for all entries, so that rounding in a sum never drops one; a row
    whose sum is 0 needs none.
    """
    if gamma >= 1:
        return torch.full(mass.shape[:-1], mass.shape[-1], dtype=torch.int64, device=mass.device)
    running = mass.double().sort(dim=-1, descending=True).values.cumsum(-1)
    wanted = gamma * running[..., -1:]
    return ((running < wanted).sum(-1) + 1).where(running[..., -1] > 0, 0)


def top_mass(mass: Tensor, gamma: float, minimum: int = 0) -> Tensor:
    """Return a bool mask of the fewest, largest entries that hold the share ``gamma``, at least ``minimum``."""
    budget = cumulative_budget(mass, gamma).clamp(min=minimum)
    return rank_descending(mass) < budget.unsqueeze(-1)


def block_sums(values: Tensor, block: int, lead: int = 0) -> Tensor:
    """Return sums over blocks of the last dimension, whose first entry is entry ``lead`` of its block."""
    short = -(lead + values.shape[-1]) % block
    sums: Tensor = functional.pad(values, (lead, short)).unflatten(-1, (-1, block)).sum(-1)
    return sums


def block_means(rows: Tensor, block: int, lead: int = 0) -> Tensor:
    """Return float32 means over blocks of the last but one dimension; of the rows that are there."""
    sums = block_sums(rows.float().transpose(-1, -2), block, lead).transpose(-1, -2)
    counts = block_sums(torch.ones(rows.shape[-2], device=rows.device), block, lead)
    return sums / counts.unsqueeze(-1)


def causal_blocks(first: int, row_blocks: int, key_blocks: int, device: torch.device | None = None) -> Tensor:
    """Return a bool mask [row blocks, key blocks] with a causal pair; the row blocks begin at block ``first``."""
    rows = torch.arange(first, first + row_blocks, device=device).unsqueeze(1)
    return torch.arange(key_blocks, device=device) <= rows


def diagonal_blocks(
    first: int, row_blocks: int, key_blocks: int, device: torch.device | None = None
) -> Tensor:
    """Return a bool mask [row blocks, key blocks] of the blocks that rows' own positions lie in."""
    rows = torch.arange(first, first + row_blocks, device=device).unsqueeze(1)
    return torch.arange(key_blocks, device=device) == rows


def as_index(given: AttentionInput, masks: list[Tensor], block: int) -> BlockIndex:
    """Join the bool masks [H, row blocks, key blocks] of the sequences, each as its rows see it, into one index.

    The masks begin at the block of the sequence's first row of this call and end with its last.
    """
    bounds = given.bounds()
    longest = max(-(-one.end // block) for one in bounds)
    rows = -(
        -(given.q_offset + given.query.shape[2]) // block
    )  # counted as if there were no padding before them
    joined = torch.zeros(len(masks), masks[0].shape[0], max(rows, longest), longest, dtype=torch.bool)
    for whole, mask, one in zip(joined, masks, bounds, strict=True):
        first = one.first // block
        whole[:, first : first + mask.shape[1], : mask.shape[2]] = mask.cpu()
    return BlockIndex.from_mask(joined, block, block)
