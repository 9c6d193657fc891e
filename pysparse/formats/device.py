"""Packings that GPU kernels stream: made on the host from a bitmap when a layer moves, never written to disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.bitmap import BitmapTensor

PACKED_DTYPES = (torch.bfloat16, torch.float16)
STRIP_ROWS, BLOCK_COLS = 16, 64
UNIT_BYTES = 16  # blocks start at multiples of this


class DevicePacking(Protocol):
    """What every packing offers; the arrays are its tensor fields."""

    name: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C) = (out_features, in_features)."""
        ...

    def to_bitmap(self) -> BitmapTensor:
        """Return the row-major form, on the packing's device."""
        ...


def _host(bitmap: BitmapTensor) -> BitmapTensor:
    """Return ``bitmap`` on the CPU with contiguous arrays; ValueError for values that are not 16 bits wide."""
    if bitmap.dtype not in PACKED_DTYPES:
        raise ValueError(f"GPU packings hold bfloat16 or float16 values, got {bitmap.dtype}")
    arrays = (t.cpu().contiguous() for t in (bitmap.values, bitmap.bitmask, bitmap.row_offsets))
    values, bitmask, row_offsets = arrays
    return BitmapTensor(values, bitmask, row_offsets, bitmap.shape)


def _unpack(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fill: Callable[[int, int, int], int]
) -> BitmapTensor:
    """Run ``fill(values, bitmask, row_offsets)`` twice: without values to count, then with them."""
    rows, cols = shape
    bitmask = torch.zeros(rows, (cols + 7) // 8, dtype=torch.uint8)
    row_offsets = torch.zeros(rows, dtype=torch.int64)
    nnz = fill(0, bitmask.data_ptr(), row_offsets.data_ptr())
    values = torch.empty(nnz, dtype=dtype)
    if nnz:
        fill(values.data_ptr(), bitmask.data_ptr(), row_offsets.data_ptr())
    return BitmapTensor(values.to(device), bitmask.to(device), row_offsets.to(device), shape)


def _nbytes(packing: DevicePacking) -> int:
    arrays = (getattr(packing, f.name) for f in fields(packing))  # type: ignore[arg-type]
    return sum(t.numel() * t.element_size() for t in arrays if isinstance(t, Tensor))


@dataclass(frozen=True, slots=True, eq=False)
class DeltaRows:
    """Rows of 16-bit values, each with the 4-bit distance to the column before: 2.5 bytes a weight.

    Entry i of a row lies (step i) + 1 columns after entry i - 1. Gaps above 16 columns and the end of the last
    group of 8 hold fillers (-0.0), so the sign of a stored zero is lost.
    """

    name: ClassVar[str] = "delta"
    values: Tensor  # [8 * G] bfloat16 | float16
    deltas: Tensor  # int32 [G]: 8 steps of 4 bits, first entry lowest
    row_groups: Tensor  # int32 [R + 1]: first group of each row, and the total G
    chunk_cols: Tensor  # int32: column before each run of 64 groups, see chunk_slot in device_layout.h
    shape: tuple[int, int]

    @classmethod
    def from_bitmap(cls, bitmap: BitmapTensor) -> DeltaRows:
        """Pack ``bitmap`` (validated here) on the host and return it on the bitmap's device.

        Raises ValueError for values that are not 16 bits wide, or for more groups than int32 counts.
        """
        host, core = _host(bitmap), backend.core()
        rows, cols = host.shape
        row_groups = torch.empty(rows + 1, dtype=torch.int32)
        at = host.bitmask.data_ptr(), host.row_offsets.data_ptr()
        groups = core.delta_count(at[0], rows, cols, at[1], host.nnz, row_groups.data_ptr())
        values = torch.empty(8 * groups, dtype=host.dtype)
        deltas = torch.empty(groups, dtype=torch.int32)
        chunk_cols = torch.empty(core.delta_chunk_slots(rows, groups), dtype=torch.int32)
        core.delta_pack(
            host.values.data_ptr(), rows, cols, *at, row_groups.data_ptr(), values.data_ptr(), deltas.data_ptr(),
            chunk_cols.data_ptr(),
        )  # fmt: skip
        device = bitmap.device
        return cls(
            values.to(device), deltas.to(device), row_groups.to(device), chunk_cols.to(device), bitmap.shape
        )

    def to_bitmap(self) -> BitmapTensor:
        """Return the row-major form; exact but for the sign of stored zeros."""
        values, deltas, groups = (t.cpu() for t in (self.values, self.deltas, self.row_groups))
        return _unpack(
            self.shape, values.dtype, self.values.device,
            lambda v, b, r: backend.core().delta_unpack(
                values.data_ptr(), deltas.data_ptr(), groups.data_ptr(), *self.shape, v, b, r
            ),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return _nbytes(self)


@dataclass(frozen=True, slots=True, eq=False)
class FragmentBitmap:
    """Blocks of 16 x 64 weights in the order of tensor-core operands: 128 bytes of mask, then the values.

    Costs 2 bytes a weight, 1/8 byte an entry and some 11 bytes a block. The map from bits to weights is
    ``fragment_place`` in device_layout.h.
    """

    name: ClassVar[str] = "fragment"
    stream: Tensor  # [bytes / 2] in the values' dtype, whatever the bits mean
    offsets: Tensor  # int32 [strips * blocks + 1]: start of each block in units of 16 bytes
    largest_block: int  # bytes
    shape: tuple[int, int]

    @classmethod
    def from_bitmap(cls, bitmap: BitmapTensor) -> FragmentBitmap:
        """Pack ``bitmap`` (validated here) on the host and return it on the bitmap's device.

        Raises ValueError for values that are not 16 bits wide, or past 32-bit offsets.
        """
        host, core = _host(bitmap), backend.core()
        rows, cols = host.shape
        offsets = torch.zeros(-(-rows // STRIP_ROWS) * -(-cols // BLOCK_COLS) + 1, dtype=torch.int32)
        at = host.bitmask.data_ptr(), host.row_offsets.data_ptr()
        largest = core.fragment_count(at[0], rows, cols, at[1], host.nnz, offsets.data_ptr())
        stream = torch.empty(int(offsets[-1]) * UNIT_BYTES // 2, dtype=host.dtype)
        core.fragment_pack(host.values.data_ptr(), rows, cols, *at, offsets.data_ptr(), stream.data_ptr())
        return cls(stream.to(bitmap.device), offsets.to(bitmap.device), largest, bitmap.shape)

    def to_bitmap(self) -> BitmapTensor:
        """Return the row-major form; exact but for the sign of stored zeros."""
        stream, offsets = self.stream.cpu(), self.offsets.cpu()
        return _unpack(
            self.shape, stream.dtype, self.stream.device,
            lambda v, b, r: backend.core().fragment_unpack(
                stream.data_ptr(), offsets.data_ptr(), *self.shape, v, b, r
            ),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return _nbytes(self)


@dataclass(frozen=True, slots=True, eq=False)
class PairBlocks:
    """Two of four for the sparse tensor cores: blocks of 16 x 64 weights, 128 bytes of positions, 1024 of values.

    Any weight that keeps at most two of every four neighbours in a row fits: 2:4, and also 1:4, 2:8 where the
    two fall so, 1:8, 2:16. Always 1.125 bytes an entry.
    """

    name: ClassVar[str] = "pair"
    stream: Tensor  # [bytes / 2] in the values' dtype, whatever the bits mean
    shape: tuple[int, int]

    @classmethod
    def from_bitmap(cls, bitmap: BitmapTensor) -> PairBlocks:
        """Pack ``bitmap`` (validated here) on the host and return it on the bitmap's device.

        Raises ValueError, naming the first place, when four neighbours keep more than two weights.
        """
        host, core = _host(bitmap), backend.core()
        rows, cols = host.shape
        blocks = -(-rows // STRIP_ROWS) * -(-cols // BLOCK_COLS)
        stream = torch.empty(blocks * core.PAIR_BLOCK_BYTES // 2, dtype=host.dtype)
        core.pair_pack(
            host.values.data_ptr(), rows, cols, host.bitmask.data_ptr(), host.row_offsets.data_ptr(), host.nnz,
            stream.data_ptr(),
        )  # fmt: skip
        return cls(stream.to(bitmap.device), bitmap.shape)

    def to_bitmap(self) -> BitmapTensor:
        """Return the row-major form; exact but for the sign of stored zeros."""
        stream = self.stream.cpu()
        return _unpack(
            self.shape, stream.dtype, self.stream.device,
            lambda v, b, r: backend.core().pair_unpack(stream.data_ptr(), *self.shape, v, b, r),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return _nbytes(self)


def keeps_pairs(bitmap: BitmapTensor) -> bool:
    """Tell whether no group of four neighbouring columns keeps more than two weights."""
    nibbles = torch.stack([bitmap.bitmask & 15, bitmap.bitmask >> 4])
    three_or_more = torch.tensor(
        [bin(code).count("1") > 2 for code in range(16)], device=bitmap.bitmask.device
    )
    return not bool(three_or_more[nibbles.long()].any())


PACKINGS: dict[str, type[DeltaRows] | type[FragmentBitmap] | type[PairBlocks]] = {
    packing.name: packing for packing in (DeltaRows, FragmentBitmap, PairBlocks)
}
