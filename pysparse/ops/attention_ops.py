"""``torch.library`` registration of the attention operations; :mod:`pysparse.ops.attention` is their front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysparse.formats.stripe import BlockIndex, StripeIndex
from pysparse.ops import attention_cpu as compiled
from pysparse.ops import attention_reference as reference
from pysparse.ops import selection_reference as selection
from pysparse.ops.attention_state import AttentionState

Bounds = list[tuple[int, int]]
Parts = tuple[Tensor, Tensor, Tensor]

_SPAN = "Tensor? key_range, float scale"
_REGION = "int q_offset, int group_size, int init, int local"
_BLOCKS = "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor blocks, int heads, int block_q, int block_k"
_SCHEMAS = (
    f"flash_attention(Tensor q, Tensor k, Tensor v, {_SPAN}, bool causal, int q_offset) -> (Tensor, Tensor)",
    f"flash_attention_state(Tensor q, Tensor k, Tensor v, {_SPAN}, bool causal, int q_offset) "
    "-> (Tensor, Tensor, Tensor)",
    f"anchor_state(Tensor q, Tensor k, Tensor v, {_SPAN}, {_REGION}) -> (Tensor, Tensor, Tensor)",
    f"identify_stripes(Tensor q, Tensor k, Tensor anchor, {_SPAN}, {_REGION}, float theta, int pools, "
    "bool share_kv) -> (Tensor, Tensor)",
    "stripe_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor keys, int heads, int group_size, "
    f"Tensor? out, Tensor? max, Tensor? denominator, {_SPAN}, int q_offset) -> (Tensor, Tensor)",
    f"anchor_attention(Tensor q, Tensor k, Tensor v, {_SPAN}, {_REGION}, float theta, int pools, bool share_kv) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    f"block_sparse_attention({_BLOCKS}, {_SPAN}, bool causal, int q_offset) -> (Tensor, Tensor)",
    f"block_sparse_state({_BLOCKS}, {_SPAN}, bool causal, int q_offset) -> (Tensor, Tensor, Tensor)",
    f"proxy_scores(Tensor q, Tensor k, {_SPAN}, int q_offset, int proxies, int block, int stride) -> Tensor",
    f"block_mass(Tensor q, Tensor k, {_SPAN}, int q_offset, int block) -> Tensor",
)

_library = torch.library.Library("pysparse", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema)


def bounds_of(k: Tensor, key_range: Tensor | None) -> Bounds:
    """Return (start, end) of every sequence's keys; ValueError for a range outside them."""
    length = k.shape[2]
    if key_range is None:
        return [(0, length)] * k.shape[0]
    bounds = [(int(start), int(end)) for start, end in key_range.tolist()]
    for b, (start, end) in enumerate(bounds):
        if not 0 <= start <= end <= length:
            raise ValueError(f"key_range of sequence {b} is [{start}, {end}), it must lie in [0, {length})")
    return bounds


def _rounded(parts: Parts, q: Tensor) -> tuple[Tensor, Tensor]:
    out, peak, total = parts
    return _layout(out.to(q.dtype)), (peak + total.log()).float()


def _layout(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _state(parts: Parts) -> Parts:
    out, peak, total = parts
    return out.float(), peak.float(), total.float()


def _flash_parts(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, causal: bool, q_offset: int
) -> Parts:
    bounds = bounds_of(k, key_range)
    chosen = reference.dense_selection(k.shape[2], q.shape[1], q_offset, bounds, causal, q.device)
    return reference.attend(q, k, v, scale, chosen)


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, causal: bool, q_offset: int
) -> tuple[Tensor, Tensor]:
    return _rounded(_flash_parts(q, k, v, key_range, scale, causal, q_offset), q)


def _flash_attention_state(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, causal: bool, q_offset: int
) -> Parts:
    return _state(_flash_parts(q, k, v, key_range, scale, causal, q_offset))


def _anchor_state(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int,
) -> Parts:  # fmt: skip
    bounds = bounds_of(k, key_range)
    chosen = reference.anchor_selection(
        k.shape[2], q.shape[1], q_offset, bounds, (group_size, init, local), q.device
    )
    return _state(reference.attend(q, k, v, scale, chosen))


def _identify_stripes(
    q: Tensor, k: Tensor, anchor: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int, theta: float, pools: int, share_kv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mask = selection.keep_mask(
        q, k, anchor, scale, q_offset, bounds_of(k, key_range), (group_size, init, local), (theta, pools, share_kv)
    )  # fmt: skip
    index = StripeIndex.from_mask(mask, group_size)
    return index.offsets, index.keys


def _stripe_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, keys: Tensor, heads: int, group_size: int,
    out: Tensor | None, max: Tensor | None, denominator: Tensor | None, key_range: Tensor | None, scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bounds = bounds_of(k, key_range)
    groups = (offsets.numel() - 1) // (q.shape[0] * heads)
    index = StripeIndex(offsets, keys, (q.shape[0], heads, groups), group_size, k.shape[2])
    check_stripes(index, bounds)
    parts = reference.attend(q, k, v, scale, reference.stripe_selection(index, q.shape[1], q_offset, bounds))
    if out is not None and max is not None and denominator is not None:
        merged = AttentionState(out, max, denominator).merge(AttentionState(*_state(parts)))
        parts = (merged.out, merged.max, merged.denominator)
    return _rounded(parts, q)


def check_stripes(index: StripeIndex, bounds: Bounds) -> None:
    """Raise ValueError unless every stripe lies in its sequence and before its group's first row."""
    _, heads, groups = index.shape
    counts = index.counts.flatten()
    of_list = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    low = torch.tensor([start for start, _ in bounds], device=counts.device)[of_list // (heads * groups)]
    end = torch.tensor([end for _, end in bounds], device=counts.device)[of_list // (heads * groups)]
    high = torch.minimum(low + of_list % groups * index.group_size, end)
    bad = ((index.keys < low) | (index.keys >= high)).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"stripe {int(index.keys[i])} of group {int(of_list[i] % groups)} must lie in "
            f"[{int(low[i])}, {int(high[i])}): in its sequence and before the group's first row"
        )


def _anchor_attention(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int, theta: float, pools: int, share_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    region = (group_size, init, local)
    parts = _anchor_state(q, k, v, key_range, scale, q_offset, *region)
    offsets, keys = _identify_stripes(
        q, k, parts[1], key_range, scale, q_offset, *region, theta, pools, share_kv
    )
    heads = k.shape[1] if share_kv else q.shape[1]
    out, lse = _stripe_attention(
        q, k, v, offsets, keys, heads, group_size, *parts, key_range, scale, q_offset
    )
    return out, lse, offsets, keys


def block_index(
    k: Tensor, offsets: Tensor, blocks: Tensor, shape: tuple[int, int, int], block_q: int, block_k: int
) -> BlockIndex:
    """Return the index that an operation was handed in parts; ValueError for lists that do not fit ``k``."""
    return BlockIndex(offsets, blocks, shape, block_q, block_k, -(-k.shape[2] // block_k))


def _block_parts(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, blocks: Tensor, heads: int, block_q: int, block_k: int,
    key_range: Tensor | None, scale: float, causal: bool, q_offset: int,
) -> Parts:  # fmt: skip
    q_blocks = (offsets.numel() - 1) // (q.shape[0] * heads)
    index = block_index(k, offsets, blocks, (q.shape[0], heads, q_blocks), block_q, block_k)
    chosen = reference.block_selection(
        index, k.shape[2], q.shape[1], q_offset, bounds_of(k, key_range), causal
    )
    return reference.attend(q, k, v, scale, chosen)


def _block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, blocks: Tensor, heads: int, block_q: int, block_k: int,
    key_range: Tensor | None, scale: float, causal: bool, q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = (offsets, blocks, heads, block_q, block_k, key_range, scale, causal, q_offset)
    return _rounded(_block_parts(q, k, v, *arguments), q)


def _block_sparse_state(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, blocks: Tensor, heads: int, block_q: int, block_k: int,
    key_range: Tensor | None, scale: float, causal: bool, q_offset: int,
) -> Parts:  # fmt: skip
    arguments = (offsets, blocks, heads, block_q, block_k, key_range, scale, causal, q_offset)
    return _state(_block_parts(q, k, v, *arguments))


def _proxy_scores(
    q: Tensor, k: Tensor, key_range: Tensor | None, scale: float, q_offset: int, proxies: int, block: int,
    stride: int,
) -> Tensor:  # fmt: skip
    return selection.proxy_scores(q, k, scale, q_offset, bounds_of(k, key_range), (proxies, block, stride))


def _block_mass(
    q: Tensor, k: Tensor, key_range: Tensor | None, scale: float, q_offset: int, block: int
) -> Tensor:
    return selection.block_mass(q, k, scale, q_offset, bounds_of(k, key_range), block)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "flash_attention": _flash_attention,
    "flash_attention_state": _flash_attention_state,
    "anchor_state": _anchor_state,
    "identify_stripes": _identify_stripes,
    "stripe_attention": _stripe_attention,
    "anchor_attention": _anchor_attention,
    "block_sparse_attention": _block_sparse_attention,
    "block_sparse_state": _block_sparse_state,
    "proxy_scores": _proxy_scores,
    "block_mass": _block_mass,
}


def _compiled_where_it_can(name: str) -> Callable[..., Any]:
    """Return the operation ``name`` by its kernel where that takes the queries, else by the oracle."""
    slow, fast = IMPLEMENTATIONS[name], getattr(compiled, name)

    def run(q: Tensor, *rest: Any) -> Any:
        return fast(q, *rest) if compiled.can_attend(q) else slow(q, *rest)

    return run


for _name, _implementation in IMPLEMENTATIONS.items():
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    _library.impl(_name, _compiled_where_it_can(_name), "CPU")


def _fake_out(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = q.shape
    out = q.new_empty((batch, rows, heads, dim)).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=torch.float32)


def _fake_state(q: Tensor) -> Parts:
    row = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(q.shape, dtype=torch.float32), row, torch.empty_like(row)


def _fake_lists(q: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return q.new_empty((lists + 1,), dtype=torch.int64), q.new_empty((nnz,), dtype=torch.int32)


def _lists(q: Tensor, k: Tensor, q_offset: int, group_size: int, share_kv: bool) -> int:
    heads = k.shape[1] if share_kv else q.shape[1]
    return q.shape[0] * heads * (-(-(q_offset + q.shape[2]) // group_size))


def _identify_fake(
    q: Tensor, k: Tensor, anchor: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int, theta: float, pools: int, share_kv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _fake_lists(q, _lists(q, k, q_offset, group_size, share_kv))


def _anchor_fake(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int, theta: float, pools: int, share_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return *_fake_out(q), *_fake_lists(q, _lists(q, k, q_offset, group_size, share_kv))


def _proxy_fake(
    q: Tensor, k: Tensor, key_range: Tensor | None, scale: float, q_offset: int, proxies: int, block: int,
    stride: int,
) -> Tensor:  # fmt: skip
    sizes = (-(-(q_offset + q.shape[2]) // block), -(-k.shape[2] // block))
    return q.new_empty((q.shape[0], proxies, *sizes), dtype=torch.float32)


def _mass_fake(
    q: Tensor, k: Tensor, key_range: Tensor | None, scale: float, q_offset: int, block: int
) -> Tensor:
    return q.new_empty((*q.shape[:2], -(-k.shape[2] // block)), dtype=torch.float32)


_FAKES: dict[str, Callable[..., Any]] = {
    "flash_attention": lambda q, *rest: _fake_out(q),
    "flash_attention_state": lambda q, *rest: _fake_state(q),
    "anchor_state": lambda q, *rest: _fake_state(q),
    "identify_stripes": _identify_fake,
    "stripe_attention": lambda q, *rest: _fake_out(q),
    "anchor_attention": _anchor_fake,
    "block_sparse_attention": lambda q, *rest: _fake_out(q),
    "block_sparse_state": lambda q, *rest: _fake_state(q),
    "proxy_scores": _proxy_fake,
    "block_mass": _mass_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"pysparse::{_name}", _fake, lib=_library)
