"""Which keys a group of query rows attends to: single keys (stripes) or blocks of keys, as CSR lists per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LIST_UNIT = (
    16  # group sizes, block sizes and region bounds are multiples of it: whole vectors, whole pairs of keys
)


@dataclass(frozen=True, slots=True, eq=False)
class StripeIndex:
    """For each sequence, head and group of consecutive query rows, the keys that all rows of the group attend to.

    Group g of a sequence holds the rows whose positions, counted from the sequence's first valid key, lie in
    [g G, (g+1) G). ``keys`` are rows of the key tensor, ascending within a list; list (b, h, g) is
    ``keys[offsets[i] : offsets[i + 1]]`` with i = (b * heads + h) * groups + g. The heads may be those of the
    queries or fewer, then consecutive query heads share a list. Immutable; every constructor validates.
    """

    offsets: Tensor  # int64 [B * H * groups + 1]
    keys: Tensor  # int32 [nnz]
    shape: tuple[int, int, int]  # (B, H, groups)
    group_size: int  # G, query rows
    key_length: int  # rows of the key tensor

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_mask(cls, mask: Tensor, group_size: int) -> StripeIndex:
        """Build the lists from a boolean ``mask`` [B, H, groups, keys], True where a group attends to a key."""
        _check_mask(mask)
        offsets, keys = _lists_of(mask)
        batch, heads, groups, length = mask.shape
        return cls(offsets, keys, (batch, heads, groups), group_size, length)

    def to_mask(self) -> Tensor:
        """Return the boolean mask [B, H, groups, keys]; the inverse of :meth:`from_mask`."""
        return _mask_of(self.offsets, self.keys, self.shape, self.key_length)

    def validate(self) -> None:
        """Raise ValueError, naming the first offence, unless every list is ascending and within the keys."""
        _check_unit("group_size", self.group_size)
        _check_lists(self.offsets, self.keys, self.shape, self.key_length, "key")

    @property
    def counts(self) -> Tensor:
        """Keys of each list, int64 [B, H, groups]."""
        return self.offsets.diff().view(self.shape)

    @property
    def nnz(self) -> int:
        """Keys of all lists together."""
        return self.keys.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.offsets.nbytes + self.keys.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class BlockIndex:
    """For each sequence, head and block of query rows, the blocks of keys that its rows attend to.

    Query and key blocks are counted from the sequence's first valid key: query block m holds the rows at
    positions [m block_q, (m+1) block_q), key block n the keys [n block_k, (n+1) block_k). List (b, h, m) is
    ``blocks[offsets[i] : offsets[i + 1]]`` with i = (b * heads + h) * q_blocks + m, ascending. A causal
    product masks within a block whatever lies after a row. Immutable; every constructor validates.
    """

    offsets: Tensor  # int64 [B * H * q_blocks + 1]
    blocks: Tensor  # int32 [nnz]
    shape: tuple[int, int, int]  # (B, H, q_blocks)
    block_q: int  # query rows
    block_k: int  # keys
    key_blocks: int  # blocks of the longest sequence

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_mask(cls, mask: Tensor, block_q: int = 128, block_k: int = 128) -> BlockIndex:
        """Build the lists from a boolean ``mask`` [B, H, q_blocks, key_blocks], True where computed."""
        _check_mask(mask)
        offsets, blocks = _lists_of(mask)
        batch, heads, q_blocks, key_blocks = mask.shape
        return cls(offsets, blocks, (batch, heads, q_blocks), block_q, block_k, key_blocks)

    def to_mask(self) -> Tensor:
        """Return the boolean mask [B, H, q_blocks, key_blocks]; the inverse of :meth:`from_mask`."""
        return _mask_of(self.offsets, self.blocks, self.shape, self.key_blocks)

    def validate(self) -> None:
        """Raise ValueError, naming the first offence, unless every list is ascending and within the blocks."""
        _check_unit("block_q", self.block_q)
        _check_unit("block_k", self.block_k)
        _check_lists(self.offsets, self.blocks, self.shape, self.key_blocks, "block")

    @property
    def counts(self) -> Tensor:
        """Blocks of each list, int64 [B, H, q_blocks]."""
        return self.offsets.diff().view(self.shape)

    @property
    def nnz(self) -> int:
        """Blocks of all lists together."""
        return self.blocks.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.offsets.nbytes + self.blocks.nbytes


def _check_unit(name: str, value: int) -> None:
    if value < LIST_UNIT or value % LIST_UNIT:
        raise ValueError(f"{name}={value} is not a positive multiple of {LIST_UNIT}")


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 4:
        raise ValueError(f"a mask is a boolean tensor of 4 dimensions, got {mask.dtype} {tuple(mask.shape)}")


def _lists_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    offsets = torch.zeros(mask.shape[:3].numel() + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(mask.sum(dim=-1).flatten(), 0, out=offsets[1:])
    return offsets, mask.nonzero()[:, 3].to(torch.int32)


def _mask_of(offsets: Tensor, items: Tensor, shape: tuple[int, int, int], bound: int) -> Tensor:
    lists = offsets.numel() - 1
    mask = torch.zeros(lists, bound, dtype=torch.bool, device=items.device)
    of_list = torch.repeat_interleave(torch.arange(lists, device=items.device), offsets.diff())
    mask[of_list, items.long()] = True
    return mask.view(*shape, bound)


def _check_lists(offsets: Tensor, items: Tensor, shape: tuple[int, int, int], bound: int, item: str) -> None:
    if min(shape) < 0 or bound < 0 or bound >= 2**31:
        raise ValueError(f"lists of shape {shape} over {bound} {item}s: sizes lie in [0, 2^31)")
    lists = shape[0] * shape[1] * shape[2]
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (lists + 1,):
        raise ValueError(
            f"offsets are int64 [{lists + 1}] for {shape}, got {offsets.dtype} {tuple(offsets.shape)}"
        )
    if items.dtype != torch.int32 or items.dim() != 1:
        raise ValueError(f"{item}s are an int32 vector, got {items.dtype} {tuple(items.shape)}")
    steps = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != items.numel() or bool((steps < 0).any()):
        raise ValueError(
            f"offsets must rise from 0 to the number of {item}s, {items.numel()}; they run from "
            f"{int(offsets[0])} to {int(offsets[-1])}, smallest step {int(steps.min()) if lists else 0}"
        )
    if items.numel() == 0:
        return
    low, high = int(items.min()), int(items.max())
    if low < 0 or high >= bound:
        raise ValueError(f"{item}s run from {low} to {high}, they must lie in [0, {bound})")
    falls = items.diff() <= 0
    starts = offsets[1:-1]
    falls[starts[(starts > 0) & (starts < items.numel())] - 1] = False  # the next list starts anew
    if bool(falls.any()):
        where = int(falls.nonzero()[0])
        raise ValueError(
            f"{item}s of a list must ascend: entry {where + 1} is {int(items[where + 1])} after {int(items[where])}"
        )
