"""The attention operations on CUDA tensors: the compiled kernels where they apply, torch's fused ones elsewhere.

The kernels take bfloat16 and float16, head dimensions of 64, 128 and 256, groups and blocks of rows that are
multiples of 128 and blocks of keys that are multiples of 64; they are used when a GPU report vouches for their
sources (:func:`pysparse.backend.cuda_gate`). :func:`why_portable` says what keeps them from a call. Everything runs on
torch's current stream and nothing waits for it, but for the lists of stripes: their number sizes an array.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.stripe import StripeIndex
from pysparse.ops import attention_ops as common
from pysparse.ops import attention_portable as portable

DIMS = (64, 128, 256)
ROWS = 128  # of queries that a thread block may hold: groups are multiples of it
KEYS = 64  # in a tile
POOLS = 16  # pooled rows of a group: one operand of the tensor cores
_CODES = {torch.bfloat16: 0, torch.float16: 1}
_SPANS, _STRIPES, _BLOCKS = range(3)
_NO_STATE = (0, 0, 0)

Parts = tuple[Tensor, Tensor, Tensor]
_oracle: dict[str, Any] = (
    common.IMPLEMENTATIONS
)  # plain torch, for what neither the kernels nor torch's fused ones do


def why_portable(q: Tensor, *, rows: int = ROWS, keys: int = KEYS, pools: int = 1) -> str:
    """Return why the compiled kernels do not take a call with ``q``, or an empty string when they do.

    ``rows`` is the group or block of query rows, ``keys`` the block of keys, ``pools`` the pooled rows of a group.
    """
    if q.dtype not in _CODES:
        return f"the kernels take bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] not in DIMS:
        return f"head dimension {q.shape[-1]} is not one of {DIMS}"
    if rows % ROWS or keys % KEYS or pools > POOLS:
        return (
            f"groups of {rows} rows, blocks of {keys} keys and {pools} pools: the kernels take multiples of {ROWS} "
            f"and {KEYS} and at most {POOLS} pools"
        )
    return backend.cuda_gate("attention")


def _torch_is_faster(q: Tensor) -> bool:
    """Tell whether torch's kernels compute exact attention of ``q`` faster than ours: all but a few rows.

    On an H200 ours takes 1.05 to 1.2 times as long as torch's flash attention, twice cuDNN's time
    (``benchmarks/results/cuda_attention_h200.json``). Asking for experimental kernels gets it all the same.
    """
    return q.shape[2] >= ROWS and not backend.experimental()


def _place(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return ``x`` as the kernels read it, copied only where strides or address forbid, with address and strides."""
    if x.stride(-1) != 1 or any(stride % 8 for stride in x.stride()[:3]) or x.data_ptr() % 16:
        x = x.contiguous()
    batch, head, row, _ = x.stride()
    return x, (x.data_ptr(), batch, head, row)


def _addresses(parts: Parts | None) -> tuple[int, int, int]:
    return _NO_STATE if parts is None else (parts[0].data_ptr(), parts[1].data_ptr(), parts[2].data_ptr())


def _ranges(q: Tensor, key_range: Tensor | None) -> tuple[list[Tensor], tuple[int, int]]:
    if key_range is None:
        return [], (0, 0)
    first, end = (column.contiguous() for column in key_range.to(q.device, torch.int32).unbind(1))
    return [first, end], (first.data_ptr(), end.data_ptr())


def _launch(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, causal: bool, q_offset: int, kind: int, *,
    spans: tuple[int, int, int] = (0, 0, 0), lists: tuple[Tensor, Tensor] | None = None,
    list_sizes: tuple[int, int, int] = (1, 1, KEYS), before: Parts | None = None, want_state: bool = False,
) -> tuple[Tensor, Tensor] | Parts:  # fmt: skip
    """Run the attention kernel; return (out, log-sum-exp), or the state."""
    common.bounds_of(k, key_range)  # refuses ranges outside the keys
    if any(tensor.device != q.device for tensor in (*(lists or ()), *(before or ()))):
        raise ValueError(f"q is on {q.device}, its lists and state must be, too")
    (q, q_place), (k, k_place), (v, v_place) = _place(q), _place(k), _place(v)
    before = None if before is None else tuple(part.contiguous() for part in before)  # type: ignore[assignment]
    kept, valid = _ranges(q, key_range)
    batch, heads, rows, dim = q.shape
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    state: Parts | None = None
    out_place = (0, 0, 0, 0)
    if want_state:
        state = (q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(lse), torch.empty_like(lse))
    else:
        out = q.new_empty((batch, rows, heads, dim)).transpose(1, 2)
        out, out_place = _place(out)
    addresses = (0, 0) if lists is None else (lists[0].data_ptr(), lists[1].data_ptr())
    backend.cuda().attention(
        _CODES[q.dtype], q_place, k_place, v_place, out_place, 0 if want_state else lse.data_ptr(), _addresses(before),
        _addresses(state), valid, (batch, heads, k.shape[1], rows, k.shape[2], dim), q_offset, scale, causal, kind,
        spans, addresses, list_sizes, q.device.index, torch.cuda.current_stream(q.device).cuda_stream,
    )  # fmt: skip
    del kept  # alive until here: the launch has their addresses
    return (out, lse) if state is None else state


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, causal: bool, q_offset: int
) -> tuple[Tensor, Tensor]:
    if why_portable(q) or _torch_is_faster(q):
        return portable.flash_attention(q, k, v, common.bounds_of(k, key_range), scale, causal, q_offset)
    return _launch(q, k, v, key_range, scale, causal, q_offset, _SPANS)  # type: ignore[return-value]


def _flash_attention_state(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, causal: bool, q_offset: int
) -> Parts:
    if why_portable(q):
        parts: Parts = _oracle["flash_attention_state"](q, k, v, key_range, scale, causal, q_offset)
        return parts
    return _launch(q, k, v, key_range, scale, causal, q_offset, _SPANS, want_state=True)  # type: ignore[return-value]


def _anchor_state(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int,
) -> Parts:  # fmt: skip
    region = (group_size, init, local)
    if why_portable(q, rows=group_size):
        return portable.anchor_state(q, k, v, common.bounds_of(k, key_range), scale, q_offset, region)
    return _launch(q, k, v, key_range, scale, True, q_offset, _SPANS, spans=region, want_state=True)  # type: ignore[return-value]


def _stripe_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, keys: Tensor, heads: int, group_size: int,
    out: Tensor | None, max: Tensor | None, denominator: Tensor | None, key_range: Tensor | None, scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bounds = common.bounds_of(k, key_range)
    groups = (offsets.numel() - 1) // (q.shape[0] * heads)
    index = StripeIndex(offsets, keys, (q.shape[0], heads, groups), group_size, k.shape[2])
    common.check_stripes(index, bounds)
    state = None if out is None or max is None or denominator is None else (out, max, denominator)
    if why_portable(q, rows=group_size):
        return portable.stripe_attention(q, k, v, index, state, bounds, scale, q_offset)
    return _stripes(
        q, k, v, index.offsets, index.keys, (heads, groups, group_size), state, key_range, scale, q_offset
    )


def _stripes(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, keys: Tensor, sizes: tuple[int, int, int], state: Parts | None,
    key_range: Tensor | None, scale: float, q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads, groups, group_size = sizes
    return _launch(  # type: ignore[return-value]
        q, k, v, key_range, scale, True, q_offset, _STRIPES, spans=(group_size, 0, 0), before=state,
        lists=(offsets.contiguous(), keys.contiguous()), list_sizes=(heads, groups, KEYS),
    )  # fmt: skip


def _pooled_rows(
    q: Tensor, anchor: Tensor, bounds: common.Bounds, q_offset: int, groups: int, group: int, pools: int
) -> tuple[Tensor, Tensor]:
    """Return the means of q [B, H, groups * pools, D] and of the anchor, +inf for a pool without rows."""
    batch, heads, rows, dim = q.shape
    size, count = group // pools, groups * pools
    means = q.new_zeros((batch, heads, count, dim))
    tops = anchor.new_full((batch, heads, count), math.inf)
    for b, (start, end) in enumerate(bounds):
        first, last = max(0, start - q_offset), min(rows, end - q_offset)
        if first >= last:
            continue
        pool = torch.arange(first + q_offset - start, last + q_offset - start, device=q.device) // size
        present = torch.bincount(pool, minlength=count)
        share = present.clamp(min=1).to(torch.float32)
        sums = anchor.new_zeros((heads, count, dim)).index_add_(1, pool, q[b, :, first:last].float())
        means[b] = (sums / share[:, None]).to(q.dtype)
        top = anchor.new_zeros((heads, count)).index_add_(1, pool, anchor[b, :, first:last])
        tops[b] = torch.where(present > 0, top / share, math.inf)
    return means, tops


def _identify_stripes(
    q: Tensor, k: Tensor, anchor: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int, theta: float, pools: int, share_kv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if why_portable(q, rows=group_size, pools=pools):
        lists: tuple[Tensor, Tensor] = _oracle["identify_stripes"](
            q, k, anchor, key_range, scale, q_offset, group_size, init, local, theta, pools, share_kv
        )
        return lists
    bounds = common.bounds_of(k, key_range)
    (batch, heads, rows, dim), (_, kv_heads, length, _) = q.shape, k.shape
    groups, words = -(-(q_offset + rows) // group_size), -(-length // 32)
    means, tops = _pooled_rows(q, anchor, bounds, q_offset, groups, group_size, pools)
    # A pool without rows stays at +inf for any theta, also an infinite one.
    floor = torch.where(tops == math.inf, math.inf, tops - theta).contiguous()
    bits = torch.zeros((batch, heads, groups, words), dtype=torch.int32, device=q.device)
    first_group = max(0, q_offset - max(start for start, _ in bounds)) // group_size
    (means, pooled_place), (k, k_place) = _place(means), _place(k)
    kept, valid = _ranges(q, key_range)
    stream = torch.cuda.current_stream(q.device).cuda_stream
    backend.cuda().find_stripes(
        _CODES[q.dtype], pooled_place, k_place, floor.data_ptr(), valid[0], bits.data_ptr(),
        (batch, heads, kv_heads, groups, pools, length, dim, words), (group_size, first_group, init, local), scale,
        q.device.index, stream,
    )  # fmt: skip
    del kept
    if share_kv:
        bits = _united(bits, kv_heads)
    return _lists(bits, q.device.index, stream)


def _united(bits: Tensor, kv_heads: int) -> Tensor:
    """Return the bits that any query head of a key head has."""
    by_head = bits.unflatten(1, (kv_heads, -1))
    result: Tensor = by_head[:, :, 0].clone()
    for i in range(1, by_head.shape[2]):
        result |= by_head[:, :, i]
    return result


def _lists(bits: Tensor, device: int | None, stream: int) -> tuple[Tensor, Tensor]:
    rows, words = bits.shape[:3].numel(), bits.shape[3]
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=bits.device)
    counts = torch.empty(rows, dtype=torch.int64, device=bits.device)
    backend.cuda().count_stripes(bits.data_ptr(), rows, words, counts.data_ptr(), device, stream)
    torch.cumsum(counts, 0, out=offsets[1:])
    keys = torch.empty(int(offsets[-1]), dtype=torch.int32, device=bits.device)
    backend.cuda().list_stripes(
        bits.data_ptr(), rows, words, offsets.data_ptr(), keys.data_ptr(), device, stream
    )
    return offsets, keys


def _anchor_attention(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int, theta: float, pools: int, share_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    region = (group_size, init, local)
    state = _anchor_state(q, k, v, key_range, scale, q_offset, *region)
    found = _identify_stripes(q, k, state[1], key_range, scale, q_offset, *region, theta, pools, share_kv)
    heads = k.shape[1] if share_kv else q.shape[1]
    if why_portable(q, rows=group_size):
        out, lse = _stripe_attention(q, k, v, *found, heads, group_size, *state, key_range, scale, q_offset)
    else:  # lists just made need no check
        groups = -(-(q_offset + q.shape[2]) // group_size)
        out, lse = _stripes(q, k, v, *found, (heads, groups, group_size), state, key_range, scale, q_offset)
    return out, lse, *found


def _blocks(name: str, want_state: bool) -> Any:
    def run(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, blocks: Tensor, heads: int, block_q: int, block_k: int,
        key_range: Tensor | None, scale: float, causal: bool, q_offset: int,
    ) -> tuple[Tensor, Tensor] | Parts:  # fmt: skip
        if why_portable(q, rows=block_q, keys=block_k):
            parts: tuple[Tensor, Tensor] | Parts = _oracle[name](
                q, k, v, offsets, blocks, heads, block_q, block_k, key_range, scale, causal, q_offset
            )
            return parts
        groups = (offsets.numel() - 1) // (q.shape[0] * heads)
        common.block_index(k, offsets, blocks, (q.shape[0], heads, groups), block_q, block_k)
        return _launch(
            q, k, v, key_range, scale, causal, q_offset, _BLOCKS, spans=(block_q, 0, 0), want_state=want_state,
            lists=(offsets.contiguous(), blocks.contiguous()), list_sizes=(heads, groups, block_k),
        )  # fmt: skip

    return run


_IMPLEMENTATIONS = {
    "flash_attention": _flash_attention,
    "flash_attention_state": _flash_attention_state,
    "anchor_state": _anchor_state,
    "identify_stripes": _identify_stripes,
    "stripe_attention": _stripe_attention,
    "anchor_attention": _anchor_attention,
    "block_sparse_attention": _blocks("block_sparse_attention", want_state=False),
    "block_sparse_state": _blocks("block_sparse_state", want_state=True),
}
_library = torch.library.Library("pysparse", "IMPL", "CUDA")
for _name, _implementation in _IMPLEMENTATIONS.items():
    _library.impl(_name, _implementation)
