"""Attention over all keys, over stripes (single keys chosen per group of rows) and over blocks of keys.

Shapes: q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, D] of one dtype; Hk divides Hq and query head h reads
key head h // (Hq / Hk). Any strides, with the last dimension contiguous. Results are laid out as [B, Nq, Hq, D]
and returned transposed, so that ``out.transpose(1, 2)`` is contiguous.

Positions: query row i stands at key index ``q_offset + i`` (default Nk - Nq: the rows are the last ones). With
``key_range`` [B, 2] sequence b has its keys in [start, end): padding on either side, or the unused tail of a
static cache. A causal row sees the keys of its sequence up to its own position; a row outside its sequence sees
none. A row without keys gives 0, and -inf as log-sum-exp.

The methods: AnchorAttention (arXiv 2505.23520) and ProxyAttn (arXiv 2509.24745).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.formats.stripe import LIST_UNIT, BlockIndex, StripeIndex
from pysparse.ops import attention_cuda, attention_ops  # noqa: F401  they register torch.ops.pysparse.*
from pysparse.ops.attention_state import AttentionState

MAX_HEAD_DIM = 256
MAX_POOLS = 64


@dataclass(frozen=True, slots=True)
class AnchorRegion:
    """The keys that AnchorAttention always computes, in positions counted from the sequence's first valid key.

    A row of group g (rows [g G, (g+1) G)) sees the first ``init`` keys and those from max(init, g G - local)
    on. The candidates for stripes, [init, g G - local), are the exact complement.
    """

    group_size: int = 2048  # G, query rows that share a list of stripes
    init: int = 128
    local: int = 128  # before the group's first row

    def __post_init__(self) -> None:
        for name in ("group_size", "init", "local"):
            value = getattr(self, name)
            if value < (LIST_UNIT if name == "group_size" else 0) or value % LIST_UNIT:
                raise ValueError(f"{name}={value} is not a multiple of {LIST_UNIT} in range")


@dataclass(frozen=True, slots=True)
class StripeRule:
    """A candidate key is a stripe unless every pooled row's logit lies more than ``theta`` below its anchor.

    The rows of a group are pooled into ``pools`` means of equal length, their row maxima over the anchor region
    likewise. ``theta`` is in natural logit units: +inf keeps every candidate, -inf none. With ``share_kv`` the
    query heads of one key head share the union of their stripes.
    """

    theta: float = 12.0
    pools: int = 16
    share_kv: bool = False

    def __post_init__(self) -> None:
        if math.isnan(self.theta):
            raise ValueError("theta is NaN; it is a number of logit units, or an infinity")
        if not 1 <= self.pools <= MAX_POOLS:
            raise ValueError(f"pools={self.pools} is not in 1..{MAX_POOLS}")


@dataclass(frozen=True, slots=True)
class ProxyGrid:
    """ProxyAttn's estimate: ``proxies`` mean heads, every ``stride``-th row and key, blocks of ``block`` tokens."""

    proxies: int = 1
    block: int = 128
    stride: int = 4

    def __post_init__(self) -> None:
        if self.block < LIST_UNIT or self.block % LIST_UNIT:
            raise ValueError(f"block={self.block} is not a positive multiple of {LIST_UNIT}")
        if self.stride < 1 or self.block % self.stride:
            raise ValueError(f"stride={self.stride} does not divide a block of {self.block} tokens")
        if self.proxies < 1:
            raise ValueError(f"proxies={self.proxies} is not a positive number of mean heads")


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
    q_offset: int | None = None, key_range: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out [B, Hq, Nq, D] in q's dtype, log-sum-exp [B, Hq, Nq] float32) of exact attention.

    ``scale`` defaults to D^-1/2; ``key_range`` is int64 [B, 2] on the CPU. Without ``causal`` every row sees all
    valid keys of its sequence. Raises ValueError for shapes, dtypes or ranges that do not fit and for inputs
    that need a gradient (there is no backward).
    """
    scale, offset = _checked(q, k, v, scale, q_offset, key_range, causal)
    out, lse = torch.ops.pysparse.flash_attention(q, k, v, key_range, scale, causal, offset)
    return out, lse


def flash_attention_state(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
    q_offset: int | None = None, key_range: Tensor | None = None,
) -> AttentionState:  # fmt: skip
    """Return :func:`flash_attention`'s result as a state that can be merged. Raises as that does."""
    scale, offset = _checked(q, k, v, scale, q_offset, key_range, causal)
    return AttentionState(
        *torch.ops.pysparse.flash_attention_state(q, k, v, key_range, scale, causal, offset)
    )


def anchor_state(
    q: Tensor, k: Tensor, v: Tensor, region: AnchorRegion, *, scale: float | None = None,
    q_offset: int | None = None, key_range: Tensor | None = None,
) -> AttentionState:  # fmt: skip
    """Return causal attention over the anchor ``region``; its ``max`` is AnchorAttention's anchor.

    By itself this is sink-and-window (streaming) attention. Raises as :func:`flash_attention`.
    """
    scale, offset = _checked(q, k, v, scale, q_offset, key_range)
    return AttentionState(
        *torch.ops.pysparse.anchor_state(
            q, k, v, key_range, scale, offset, region.group_size, region.init, region.local
        )
    )


def identify_stripes(
    q: Tensor, k: Tensor, anchor: Tensor, region: AnchorRegion, rule: StripeRule, *, scale: float | None = None,
    q_offset: int | None = None, key_range: Tensor | None = None,
) -> StripeIndex:  # fmt: skip
    """Return the stripes of every group: candidates that some pooled row reaches within theta of its anchor.

    ``anchor`` is the ``max`` [B, Hq, Nq] of :func:`anchor_state`. Key j of group g is kept unless, for every pool
    u, scale * mean(q of u) . k_j < mean(anchor of u) - theta; means are over the rows present in this call, those
    of q are rounded to its dtype, the comparison is in float32. So a NaN keeps. Raises as
    :func:`flash_attention`, and when the pools do not divide the group.
    """
    scale, offset = _checked(q, k, k, scale, q_offset, key_range)
    if anchor.dtype != torch.float32 or anchor.shape != q.shape[:3]:
        raise ValueError(f"anchor is float32 {tuple(q.shape[:3])}, got {anchor.dtype} {tuple(anchor.shape)}")
    check_pools(region, rule)
    offsets, keys = torch.ops.pysparse.identify_stripes(
        q, k, anchor, key_range, scale, offset, region.group_size, region.init, region.local, rule.theta,
        rule.pools, rule.share_kv,
    )  # fmt: skip
    return stripe_index(q, k, region, rule, offset, offsets, keys)


def stripe_attention(
    q: Tensor, k: Tensor, v: Tensor, index: StripeIndex, state: AttentionState | None = None, *,
    scale: float | None = None, q_offset: int | None = None, key_range: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out, log-sum-exp) of attention over the stripes of ``index``, continued from ``state`` if given.

    Every stripe must lie before the first row of its group (that makes it visible to all of them) and within its
    sequence's keys, and none of them may be in ``state`` already. The index's heads are Hq, Hk or another divisor
    of Hq. Raises as :func:`flash_attention`, and for lists that break these rules, before any of them is read.
    """
    scale, offset = _checked(q, k, v, scale, q_offset, key_range)
    _check_index(q, index.shape, index.group_size, offset, index.offsets, index.keys)
    if index.key_length != k.shape[2]:
        raise ValueError(f"the index is over {index.key_length} keys, k has {k.shape[2]}")
    parts = (None, None, None) if state is None else (state.out, state.max, state.denominator)
    if state is not None:
        _check_state(q, state)
    out, lse = torch.ops.pysparse.stripe_attention(
        q, k, v, index.offsets, index.keys, index.shape[1], index.group_size, *parts, key_range, scale, offset
    )
    return out, lse


def anchor_attention(
    q: Tensor, k: Tensor, v: Tensor, region: AnchorRegion, rule: StripeRule, *, scale: float | None = None,
    q_offset: int | None = None, key_range: Tensor | None = None,
) -> tuple[Tensor, Tensor, StripeIndex]:  # fmt: skip
    """Return (out, log-sum-exp, stripes) of AnchorAttention in one pass that keeps a group's state in the cache.

    The same as :func:`anchor_state`, :func:`identify_stripes` and :func:`stripe_attention` one after the other, to
    rounding. Raises as they do.
    """
    scale, offset = _checked(q, k, v, scale, q_offset, key_range)
    check_pools(region, rule)
    out, lse, offsets, keys = torch.ops.pysparse.anchor_attention(
        q, k, v, key_range, scale, offset, region.group_size, region.init, region.local, rule.theta, rule.pools,
        rule.share_kv,
    )  # fmt: skip
    return out, lse, stripe_index(q, k, region, rule, offset, offsets, keys)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, *, scale: float | None = None, causal: bool = True,
    q_offset: int | None = None, key_range: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out, log-sum-exp) of attention over the key blocks that ``index`` lists for each block of rows.

    A causal product masks inside the blocks that reach past a row. The index's heads are Hq, Hk or another
    divisor of Hq. Raises as :func:`flash_attention`, and for an index of another size.
    """
    scale, offset = _checked(q, k, v, scale, q_offset, key_range, causal)
    _check_index(q, index.shape, index.block_q, offset, index.offsets, index.blocks)
    out, lse = torch.ops.pysparse.block_sparse_attention(
        q, k, v, index.offsets, index.blocks, index.shape[1], index.block_q, index.block_k, key_range, scale, causal,
        offset,
    )  # fmt: skip
    return out, lse


def block_sparse_state(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, *, scale: float | None = None, causal: bool = True,
    q_offset: int | None = None, key_range: Tensor | None = None,
) -> AttentionState:  # fmt: skip
    """Return :func:`block_sparse_attention`'s result as a state, for stripes to continue. Raises as that does."""
    scale, offset = _checked(q, k, v, scale, q_offset, key_range, causal)
    _check_index(q, index.shape, index.block_q, offset, index.offsets, index.blocks)
    return AttentionState(
        *torch.ops.pysparse.block_sparse_state(
            q, k, v, index.offsets, index.blocks, index.shape[1], index.block_q, index.block_k, key_range, scale,
            causal, offset,
        )
    )  # fmt: skip


def proxy_scores(
    q: Tensor, k: Tensor, grid: ProxyGrid, *, scale: float | None = None, q_offset: int | None = None,
    key_range: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return ProxyAttn's block scores A [B, proxies, q blocks, key blocks], float32.

    A proxy is the mean of Hq/proxies query heads against the mean of their key heads, rounded to q's dtype; of
    both, every ``stride``-th position counts. A[m, n] is the largest probability, causal softmax over the strided
    keys, that a strided row of block m gives a strided key of block n; 0 where there is none. Blocks are counted
    from the sequence's first valid key (the first rows of ``q`` may thus lie in a later block). Raises as
    :func:`flash_attention`, and when the proxies do not divide the key heads (any number that divides Hq will do
    for a single key head).
    """
    scale, offset = _checked(q, k, k, scale, q_offset, key_range)
    heads, key_heads = q.shape[1], k.shape[1]
    if heads % grid.proxies or (key_heads % grid.proxies and key_heads > 1):
        raise ValueError(
            f"proxies={grid.proxies} must divide {heads} query heads and {key_heads} key heads (or there is one)"
        )
    scores: Tensor = torch.ops.pysparse.proxy_scores(
        q, k, key_range, scale, offset, grid.proxies, grid.block, grid.stride
    )
    return scores


def block_mass(
    q: Tensor, k: Tensor, block: int = 128, *, scale: float | None = None, q_offset: int | None = None,
    key_range: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return how the last block of query rows spreads its attention over blocks of keys, [B, Hq, key blocks].

    Entry n is the causal softmax probability that falls on key block n, averaged over the rows that the last
    (possibly ragged) block of each sequence has in this call: float32, summing to 1; 0 for an empty sequence.
    ProxyAttn's budget probe. Raises as :func:`flash_attention`.
    """
    scale, offset = _checked(q, k, k, scale, q_offset, key_range)
    if block < LIST_UNIT or block % LIST_UNIT:
        raise ValueError(f"block={block} is not a positive multiple of {LIST_UNIT}")
    mass: Tensor = torch.ops.pysparse.block_mass(q, k, key_range, scale, offset, block)
    return mass


def groups_of(q_offset: int, rows: int, group_size: int) -> int:
    """Return how many groups, or blocks, of ``group_size`` positions an index over these rows counts."""
    return -(-(q_offset + rows) // group_size)


def check_pools(region: AnchorRegion, rule: StripeRule) -> None:
    """Raise ValueError unless the pools of ``rule`` are equal parts of a group of ``region``."""
    if region.group_size % rule.pools:
        raise ValueError(f"pools={rule.pools} do not divide a group of {region.group_size} rows")


def stripe_index(
    q: Tensor, k: Tensor, region: AnchorRegion, rule: StripeRule, q_offset: int, offsets: Tensor, keys: Tensor
) -> StripeIndex:  # fmt: skip
    """Wrap identified lists."""
    heads = k.shape[1] if rule.share_kv else q.shape[1]
    groups = groups_of(q_offset, q.shape[2], region.group_size)
    return StripeIndex(offsets, keys, (q.shape[0], heads, groups), region.group_size, k.shape[2])


def _checked(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, q_offset: int | None, key_range: Tensor | None,
    causal: bool = True,
) -> tuple[float, int]:  # fmt: skip
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q, k, v are [batch, heads, length, dim], k and v alike; got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dimension")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"head dimension {q.shape[3]} is not in 1..{MAX_HEAD_DIM}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"q, k, v differ: {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("these attention kernels have no backward: call them under torch.no_grad()")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale={scale} is not a positive number")
    last = k.shape[2] - q.shape[2]
    offset = (last if causal else max(0, last)) if q_offset is None else q_offset
    if offset < 0 or (causal and offset > last):
        raise ValueError(
            f"q_offset={offset} puts {q.shape[2]} query rows outside the {k.shape[2]} keys they are counted in"
        )
    _check_range(q, k, key_range)
    return scale, offset


def _check_range(q: Tensor, k: Tensor, key_range: Tensor | None) -> None:
    if key_range is None:
        return
    if key_range.dtype != torch.int64 or tuple(key_range.shape) != (q.shape[0], 2) or not key_range.is_cpu:
        raise ValueError(
            f"key_range is int64 ({q.shape[0]}, 2) on the CPU, got {key_range.dtype} {tuple(key_range.shape)} on "
            f"{key_range.device}"
        )


def _check_state(q: Tensor, state: AttentionState) -> None:
    for name, wanted in (("out", q.shape), ("max", q.shape[:3]), ("denominator", q.shape[:3])):
        part: Tensor = getattr(state, name)
        if part.dtype != torch.float32 or part.shape != wanted or part.device != q.device:
            raise ValueError(
                f"state.{name} is float32 {tuple(wanted)} on {q.device}, got {part.dtype} {tuple(part.shape)} on "
                f"{part.device}"
            )


def _check_index(q: Tensor, shape: tuple[int, int, int], size: int, q_offset: int, *lists: Tensor) -> None:
    if any(array.device != q.device for array in lists):
        raise ValueError(
            f"q is on {q.device}, the lists of the index on {', '.join(str(a.device) for a in lists)}"
        )
    groups = groups_of(q_offset, q.shape[2], size)
    if shape[0] != q.shape[0] or shape[1] < 1 or q.shape[1] % shape[1] or shape[2] < groups:
        raise ValueError(
            f"the index has lists for {shape} (batch, heads, groups of {size} rows); q needs batch {q.shape[0]}, a "
            f"divisor of {q.shape[1]} heads and at least {groups} groups"
        )
