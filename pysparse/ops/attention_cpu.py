"""Calls of the compiled attention kernels: float32 and bfloat16 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend

Parts = tuple[Tensor, Tensor, Tensor]
Address = tuple[int, int, int, int]

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def can_attend(q: Tensor) -> bool:
    """Tell whether compiled kernels take ``q``; say once where a dtype that models have must do without."""
    if q.device.type == "cpu" and q.dtype in _DTYPE_CODES and backend.available():
        return True
    if q.dtype != torch.float64:  # which only a check computes in
        reason = backend.missing_reason() or f"they take float32 and bfloat16, not {q.dtype}, on the CPU"
        backend.warn_once(
            f"attention-{q.dtype}-{q.device.type}",
            f"attention runs without its compiled kernels ({reason}), which is slow",
        )
    return False


def _address(tensor: Tensor) -> Address:
    batch, head, row, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, row


def _row_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


class Call:
    """The arguments that every kernel takes, and the tensors that own their memory."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, causal: bool, q_offset: int
    ) -> None:  # fmt: skip
        self._owners = [_row_contiguous(part) for part in (q, k, v)]
        self._range = None if key_range is None else key_range.contiguous()
        batch, heads, rows, dim = q.shape
        self.arguments = (
            *(_address(part) for part in self._owners),
            (_DTYPE_CODES[q.dtype], batch, heads, k.shape[1], rows, k.shape[2], dim),
            (scale, causal, q_offset, 0 if self._range is None else self._range.data_ptr()),
        )


def rounded_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for an output in q's dtype, [B, Nq, Hq, D] transposed, and for the log-sum-exp."""
    batch, heads, rows, dim = q.shape
    out = torch.empty(batch, rows, heads, dim, dtype=q.dtype).transpose(1, 2)
    return out, torch.empty(batch, heads, rows)


def state_result(q: Tensor) -> Parts:
    """Return room for a float32 output, the row maxima and the denominators."""
    out = torch.empty(q.shape, dtype=torch.float32)
    return out, torch.empty(q.shape[:3]), torch.empty(q.shape[:3])


def _rounded(result: tuple[Tensor, Tensor]) -> tuple[Address, bool, int, int, int]:
    out, lse = result
    return _address(out), False, lse.data_ptr(), 0, 0


def _state(parts: Parts) -> tuple[Address, bool, int, int, int]:
    out, peak, total = parts
    return _address(out), True, 0, peak.data_ptr(), total.data_ptr()


def _lists(
    offsets: Tensor, items: Tensor, heads: int, group_size: int
) -> tuple[int, int, int, int, int, int]:
    return offsets.data_ptr(), items.data_ptr(), offsets.numel(), items.numel(), heads, group_size


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, causal: bool, q_offset: int
) -> tuple[Tensor, Tensor]:
    """Attend to all keys; return (out, lse)."""
    call, result = Call(q, k, v, key_range, scale, causal, q_offset), rounded_result(q)
    backend.core().flash_attention(*call.arguments, _rounded(result))
    return result


def flash_attention_state(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, causal: bool, q_offset: int
) -> Parts:
    """Attend to all keys; return the state."""
    call, result = Call(q, k, v, key_range, scale, causal, q_offset), state_result(q)
    backend.core().flash_attention(*call.arguments, _state(result))
    return result


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, blocks: Tensor, heads: int, block_q: int, block_k: int,
    key_range: Tensor | None, scale: float, causal: bool, q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the listed blocks; return (out, lse)."""
    call, result = Call(q, k, v, key_range, scale, causal, q_offset), rounded_result(q)
    offsets, blocks = offsets.contiguous(), blocks.contiguous()
    backend.core().block_sparse_attention(
        *call.arguments, _lists(offsets, blocks, heads, block_q), block_k, _rounded(result)
    )
    return result


def block_sparse_state(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, blocks: Tensor, heads: int, block_q: int, block_k: int,
    key_range: Tensor | None, scale: float, causal: bool, q_offset: int,
) -> Parts:  # fmt: skip
    """Attend to the listed blocks; return the state."""
    call, result = Call(q, k, v, key_range, scale, causal, q_offset), state_result(q)
    offsets, blocks = offsets.contiguous(), blocks.contiguous()
    backend.core().block_sparse_attention(
        *call.arguments, _lists(offsets, blocks, heads, block_q), block_k, _state(result)
    )
    return result


class _Room:
    """Memory for the keys of lists whose number is known only when they are found."""

    def __init__(self, q: Tensor, heads: int, q_offset: int, group_size: int) -> None:
        lists = q.shape[0] * heads * -(-(q_offset + q.shape[2]) // group_size)
        self.offsets = torch.empty(lists + 1, dtype=torch.int64)
        self.keys = torch.empty(0, dtype=torch.int32)

    def allocate(self, count: int) -> int:
        self.keys = torch.empty(count, dtype=torch.int32)
        return self.keys.data_ptr()


def anchor_state(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int,
) -> Parts:  # fmt: skip
    """Attend to the anchor region; return the state."""
    call, result = Call(q, k, v, key_range, scale, True, q_offset), state_result(q)
    backend.core().anchor_state(*call.arguments, (group_size, init, local), _state(result))
    return result


def identify_stripes(
    q: Tensor, k: Tensor, anchor: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int, theta: float, pools: int, share_kv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Find every group's stripes; return (offsets, keys)."""
    call, anchor = Call(q, k, k, key_range, scale, True, q_offset), anchor.contiguous()
    room = _Room(q, k.shape[1] if share_kv else q.shape[1], q_offset, group_size)
    queries, keys, _, shape, span = call.arguments
    backend.core().identify_stripes(
        queries, keys, shape, span, anchor.data_ptr(), (group_size, init, local), (theta, pools, share_kv),
        room.offsets.data_ptr(), room.allocate,
    )  # fmt: skip
    return room.offsets, room.keys


def stripe_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, keys: Tensor, heads: int, group_size: int,
    out: Tensor | None, max: Tensor | None, denominator: Tensor | None, key_range: Tensor | None, scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the listed keys, after those of the state if there is one; return (out, lse)."""
    call, result = Call(q, k, v, key_range, scale, True, q_offset), rounded_result(q)
    offsets, keys = offsets.contiguous(), keys.contiguous()
    before: tuple[Address, bool, int, int, int] = ((0, 0, 0, 0), True, 0, 0, 0)
    if out is not None and max is not None and denominator is not None:
        parts = (_row_contiguous(out), max.contiguous(), denominator.contiguous())
        for part, shape in zip(parts, (q.shape, q.shape[:3], q.shape[:3]), strict=True):
            if part.dtype != torch.float32 or part.shape != shape:
                raise ValueError(
                    f"a state's part is float32 {tuple(shape)}, got {part.dtype} {tuple(part.shape)}"
                )
        before = _state(parts)
    backend.core().stripe_attention(
        *call.arguments, _lists(offsets, keys, heads, group_size), before, _rounded(result)
    )
    return result


def anchor_attention(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, scale: float, q_offset: int, group_size: int,
    init: int, local: int, theta: float, pools: int, share_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Anchor region, stripes and attention over them; return (out, lse, offsets, keys)."""
    call, result = Call(q, k, v, key_range, scale, True, q_offset), rounded_result(q)
    room = _Room(q, k.shape[1] if share_kv else q.shape[1], q_offset, group_size)
    backend.core().anchor_attention(
        *call.arguments, (group_size, init, local), (theta, pools, share_kv), _rounded(result),
        room.offsets.data_ptr(), room.allocate,
    )  # fmt: skip
    return *result, room.offsets, room.keys


def proxy_scores(
    q: Tensor, k: Tensor, key_range: Tensor | None, scale: float, q_offset: int, proxies: int, block: int,
    stride: int,
) -> Tensor:  # fmt: skip
    """Score blocks by mean heads; return [B, proxies, q blocks, key blocks]."""
    call = Call(q, k, k, key_range, scale, True, q_offset)  # owns the inputs
    queries, keys, _, shape, span = call.arguments
    scores = torch.empty(q.shape[0], proxies, -(-(q_offset + q.shape[2]) // block), -(-k.shape[2] // block))
    backend.core().proxy_scores(queries, keys, shape, span, proxies, block, stride, scores.data_ptr())
    return scores


def block_mass(
    q: Tensor, k: Tensor, key_range: Tensor | None, scale: float, q_offset: int, block: int
) -> Tensor:
    """Return the last rows' mass on every block of keys, [B, Hq, key blocks]."""
    call = Call(q, k, k, key_range, scale, True, q_offset)  # owns the inputs
    queries, keys, _, shape, span = call.arguments
    mass = torch.empty(*q.shape[:2], -(-k.shape[2] // block))
    backend.core().block_mass(queries, keys, shape, span, block, mass.data_ptr())
    return mass
