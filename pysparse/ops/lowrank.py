"""A linear layer whose weight is sparse and has a low-rank term that its mask cuts, for training.

Neither the weight M * (W + s B A) nor its gradient ever exists as a whole: rows are made, used and forgotten tile
by tile, forward and backward, so that a step takes the memory of a few megabytes beside activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pysparse import backend
from pysparse.formats.bitmap import unpack_bits
from pysparse.ops.linear import KERNEL_DTYPES

# Weights of a tile: as float32 8 MB, a share of the last-level cache, and rows enough for a matrix product at
# full speed (190 rows of 11008 columns).
TILE = 1 << 21


@dataclass(frozen=True, slots=True, eq=False)
class LowRankTerm:
    """s B A, with ``up`` = B [out_features, r], ``down`` = A [r, in_features] and ``scale`` = s."""

    up: Tensor
    down: Tensor
    scale: float


def masked_lowrank_linear(
    x: Tensor, bitmask: Tensor, row_offsets: Tensor, values: Tensor | None, term: LowRankTerm | None = None
) -> Tensor:
    """Return x (M * (W + s B A))^T, with gradients for ``x``, ``values``, ``up`` and ``down`` where asked for.

    Args:
        x: [..., in_features], float32 or bfloat16 for compiled kernels; any floating dtype otherwise.
        bitmask: M, uint8 [out_features, ceil(in_features / 8)] as in :class:`pysparse.formats.BitmapTensor`.
        row_offsets: int64 [out_features], index of each row's first value.
        values: W where M keeps it, [kept], row by row; None for the low-rank term alone.
        term: the low-rank term; None for none.

    Parameters are float32 and are read as such whatever the dtype of ``x``; tiles are rounded to that dtype,
    and gradients of parameters are summed in float32. On the CPU compiled kernels make and take in the tiles,
    elsewhere torch does. Raises ValueError for shapes that do not fit, or when there is nothing to multiply.
    """
    _check(x, bitmask, row_offsets, values, term)
    up, down, scale = (None, None, 1.0) if term is None else (term.up, term.down, term.scale)
    rows = x.reshape(-1, x.shape[-1])
    result: Tensor = _MaskedLowRank.apply(rows, values, up, down, bitmask, row_offsets, scale)  # type: ignore[no-untyped-call]
    return result.reshape(*x.shape[:-1], len(row_offsets))


def masked_lowrank_weight(
    shape: tuple[int, int],
    bitmask: Tensor,
    row_offsets: Tensor,
    values: Tensor | None,
    term: LowRankTerm | None,
) -> Tensor:
    """Return M * (W + s B A) as a dense float32 matrix of ``shape``: what merging writes."""
    tiles = _Tiles.of(shape, values, term, bitmask, row_offsets)
    return tiles.expand(0, shape[0], torch.float32)


def dense_lowrank_linear(x: Tensor, weight: Tensor, keep: Tensor, term: LowRankTerm) -> Tensor:
    """Return the same by the plain formula, every matrix made in full: the oracle of tests and benchmarks."""
    return torch.nn.functional.linear(x, (weight + term.scale * (term.up @ term.down)) * keep)


def _check(
    x: Tensor, bitmask: Tensor, row_offsets: Tensor, values: Tensor | None, term: LowRankTerm | None
) -> None:
    rows, cols = len(row_offsets), x.shape[-1]
    if values is None and term is None:
        raise ValueError("neither values nor a low-rank term: there is nothing to multiply with")
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (rows, (cols + 7) // 8):
        raise ValueError(
            f"bitmask is uint8 {(rows, (cols + 7) // 8)} for {rows} rows and x of {cols} features, got "
            f"{bitmask.dtype} {tuple(bitmask.shape)}"
        )
    if term is None:
        return
    rank = term.down.shape[0]
    for name, tensor, shape in (("up", term.up, (rows, rank)), ("down", term.down, (rank, cols))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {shape} for a weight {(rows, cols)}, got {tuple(tensor.shape)}")


@dataclass(frozen=True, slots=True, eq=False)
class _Tiles:
    """Rows of the weight on demand."""

    shape: tuple[int, int]
    values: Tensor | None
    up: Tensor | None
    down: Tensor | None
    scale: float
    bitmask: Tensor
    row_offsets: Tensor

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        values: Tensor | None,
        term: LowRankTerm | None,
        bitmask: Tensor,
        row_offsets: Tensor,
    ) -> _Tiles:
        up, down, scale = (None, None, 1.0) if term is None else (term.up, term.down, term.scale)
        values, up, down = (None if one is None else one.detach().contiguous() for one in (values, up, down))
        return cls(shape, values, up, down, scale, bitmask.contiguous(), row_offsets.contiguous())

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of each tile."""
        rows, cols = self.shape
        height = max(16, TILE // max(cols, 1))
        for begin in range(0, rows, height):
            yield begin, min(rows, begin + height)

    def expand(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return rows [begin, end) of the weight as [end - begin, in_features] of ``dtype``."""
        if self._compiled(dtype):
            tile = torch.empty(end - begin, self.shape[1], dtype=dtype)
            backend.core().lowrank_expand(
                self._view(), KERNEL_DTYPES.index(dtype), begin, end, tile.data_ptr()
            )
            return tile
        keep = unpack_bits(self.bitmask[begin:end], self.shape[1])
        tile = torch.zeros(keep.shape, dtype=self._dtype(dtype), device=keep.device)
        if self.values is not None:
            tile[keep] = self.values[self._stored(begin, end)].to(tile.dtype)
        if self.up is not None and self.down is not None:
            tile += self.scale * (self.up[begin:end] @ self.down) * keep
        return tile.to(dtype)

    def contract(self, gradient: Tensor, begin: int, end: int, into: _Gradients) -> None:
        """Take in the gradient of rows [begin, end), [end - begin, in_features]."""
        if self._compiled(gradient.dtype):
            gradient, code = gradient.contiguous(), KERNEL_DTYPES.index(gradient.dtype)
            pointers = (0 if one is None else one.data_ptr() for one in (into.up, into.down, into.values))
            backend.core().lowrank_contract(self._view(), code, gradient.data_ptr(), begin, end, *pointers)
            return
        keep = unpack_bits(self.bitmask[begin:end], self.shape[1])
        if into.values is not None:
            into.values[self._stored(begin, end)] = gradient[keep].to(into.values.dtype)
        if into.up is None or into.down is None or self.up is None or self.down is None:
            return
        cut = gradient.to(into.up.dtype) * keep * self.scale
        into.up[begin:end] = cut @ self.down.T
        into.down.addmm_(self.up[begin:end].T, cut)

    def _stored(self, begin: int, end: int) -> slice:
        last = int(self.row_offsets[end]) if end < self.shape[0] else None
        return slice(int(self.row_offsets[begin]) if begin < self.shape[0] else 0, last)

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of sums: the parameters' own."""
        return next((one.dtype for one in (self.values, self.up) if one is not None), dtype)

    def _compiled(self, dtype: torch.dtype) -> bool:
        parts = [one for one in (self.values, self.up, self.down) if one is not None]
        return (
            backend.available()
            and dtype in KERNEL_DTYPES
            and self.bitmask.device.type == "cpu"
            and all(one.dtype == torch.float32 for one in parts)
        )

    def _view(self) -> Any:
        pointers = (0 if one is None else one.data_ptr() for one in (self.values, self.up, self.down))
        rank = 0 if self.down is None else self.down.shape[0]
        return backend.core().LowRankView(
            self.bitmask.data_ptr(), self.row_offsets.data_ptr(), *self.shape, *pointers, rank, self.scale
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Gradients:
    up: Tensor | None
    down: Tensor | None
    values: Tensor | None


class _MaskedLowRank(torch.autograd.Function):
    """Forward and backward over tiles of rows; the weight is made twice rather than kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor | None, up: Tensor | None, down: Tensor | None, bitmask: Tensor,
        row_offsets: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        term = None if up is None or down is None else LowRankTerm(up, down, scale)
        tiles = _Tiles.of((len(row_offsets), x.shape[1]), values, term, bitmask, row_offsets)
        ctx.save_for_backward(x, values, up, down, bitmask, row_offsets)
        ctx.scale = scale
        result = x.new_empty(len(x), len(row_offsets))
        for begin, end in tiles.ranges():
            torch.mm(x, tiles.expand(begin, end, x.dtype).T, out=result[:, begin:end])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, up, down, bitmask, row_offsets = ctx.saved_tensors
        term = None if up is None else LowRankTerm(up, down, ctx.scale)
        tiles = _Tiles.of((len(row_offsets), x.shape[1]), values, term, bitmask, row_offsets)
        wants_x, wants_values, *wants_term = ctx.needs_input_grad[:4]
        into = _Gradients(
            None if up is None else torch.zeros_like(up, memory_format=torch.contiguous_format),
            None if down is None else torch.zeros_like(down, memory_format=torch.contiguous_format),
            torch.zeros_like(values) if wants_values else None,
        )
        # bfloat16 has no room for a sum over many tiles
        total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if wants_x else None
        for begin, end in tiles.ranges():
            part = gradient[:, begin:end]
            if total is not None:
                _add_product(total, part, tiles.expand(begin, end, x.dtype))
            if wants_values or any(wants_term):
                tiles.contract(part.T @ x, begin, end, into)
        return None if total is None else total.to(x.dtype), into.values, into.up, into.down, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
