"""Index lists and block masks that the user brings, as a planner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pysparse.attention.plan import AttentionInput, AttentionPlan
from pysparse.formats.stripe import BlockIndex, StripeIndex
from pysparse.ops.attention import AnchorRegion, anchor_state


@dataclass(frozen=True, slots=True, eq=False)
class FixedPlan:
    """Compute the same ``blocks``, or the same ``stripes`` beside an anchor ``region``, whatever the queries are.

    Stripes without a region are the only keys computed (rows of the first group then have none). Every use
    checks that the lists fit the call: ValueError before anything is read otherwise.
    """

    blocks: BlockIndex | None = None
    stripes: StripeIndex | None = None
    region: AnchorRegion | None = None

    def __post_init__(self) -> None:
        if self.blocks is None and self.stripes is None:
            raise ValueError("pass blocks, stripes or both")
        if self.blocks is not None and self.region is not None:
            raise ValueError("blocks and an anchor region overlap: their keys would count twice")

    @property
    def crossover(self) -> int:
        """None: who brings lists wants them used."""
        return 0

    def plan(self, given: AttentionInput) -> AttentionPlan:
        """Return the lists."""
        if self.region is None:
            return AttentionPlan(self.blocks, self.stripes)
        carry = anchor_state(
            given.query, given.key, given.value, self.region,
            scale=given.scale, q_offset=given.q_offset, key_range=given.key_range,
        )  # fmt: skip
        return AttentionPlan(None, self.stripes, self.region, carry)


def from_block_mask(mask: BlockMask) -> BlockIndex:
    """Return the blocks of FlexAttention's ``mask``, whose pattern must be causal inside its partial blocks.

    The kernels mask what lies after a row and nothing else, so a partial block with another pattern cannot be
    expressed, nor a full block that reaches past a row: ValueError names the first such block. So does a mask
    that is not square, because rows are counted from the first key.
    """
    rows, keys = mask.seq_lengths
    if rows != keys:
        raise ValueError(
            f"the mask is over {rows} rows and {keys} keys: only square ones can be counted alike"
        )
    block_q, block_k = mask.BLOCK_SIZE
    partial = _lists(mask.kv_num_blocks, mask.kv_indices)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _lists(mask.full_kv_num_blocks, mask.full_kv_indices)
    for b, h, m, n in partial.nonzero().tolist():
        _check_causal(mask, (b, h, m, n), full=False)
    row = torch.arange(full.shape[2]).unsqueeze(1) * block_q
    late = full & ((torch.arange(full.shape[3]) + 1) * block_k - 1 > row)
    for b, h, m, n in late.nonzero().tolist():
        _check_causal(mask, (b, h, m, n), full=True)
    return BlockIndex.from_mask(partial | full, block_q, block_k)


def _lists(counts: Tensor, indices: Tensor) -> Tensor:
    """Return FlexAttention's lists as a bool mask [B, H, row blocks, key blocks]."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    mask = torch.zeros(indices.shape, dtype=torch.int64, device=indices.device)
    return mask.scatter_add_(3, indices.long(), listed.long()).bool().cpu()


def _check_causal(mask: BlockMask, block: tuple[int, int, int, int], full: bool) -> None:
    b, h, m, n = block
    rows, keys = mask.seq_lengths
    block_q, block_k = mask.BLOCK_SIZE
    row = torch.arange(m * block_q, min((m + 1) * block_q, rows)).unsqueeze(1)
    key = torch.arange(n * block_k, min((n + 1) * block_k, keys)).unsqueeze(0)
    wanted = torch.ones(row.shape[0], key.shape[1], dtype=torch.bool)
    if not full:
        wanted = mask.mask_mod(torch.tensor(b), torch.tensor(h), row, key).expand_as(wanted)
    if not torch.equal(wanted.cpu(), key <= row):
        raise ValueError(
            f"block (batch {b}, head {h}, rows {m * block_q}.., keys {n * block_k}..) is not causal inside: the "
            f"kernels express whole blocks and the causal diagonal only"
        )
