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
CHUNK_GROUPS = 64  # groups of 8 in a run of DeltaRows
NM_GROUPS = (4, 8, 16)  # columns of a group of NMRows


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


@dataclass(frozen=True, slots=True, eq=False)
class NMRows:
    """n of every m neighbouring columns, m of 4, 8 or 16: values, and log2(m) bits for the place of each in its group.

    Costs n / m * (2 + log2(m) / 8) bytes an entry: 0.5625 for 1:4, 0.594 for 2:8, 0.3125 for 2:16. A group that keeps
    fewer is filled up with -0.0, so the sign of a stored zero is lost. Rows are filled up to whole runs of 8 groups.
    """

    name: ClassVar[str] = "nm"
    values: (
        Tensor  # [8 * R * V] bfloat16 | float16: V vectors of 8 entries a row, see NmRows in device_layout.h
    )
    places: Tensor  # uint8 [R * V * log2(m)]: 8 places a vector, lowest bits first; for m = 8 the low 16 bits first
    n: int
    m: int
    shape: tuple[int, int]

    @classmethod
    def from_bitmap(cls, bitmap: BitmapTensor, n: int | None = None, m: int | None = None) -> NMRows:
        """Pack ``bitmap`` (validated here) on the host and return it on the bitmap's device.

        Without ``n`` and ``m`` the pattern of :func:`nm_pattern` is taken. Raises ValueError for values that are not 16
        bits wide, for an impossible pattern, and, naming the first place, when a group keeps more than n weights.
        """
        if (n is None) != (m is None):
            raise ValueError(f"a pattern is both n and m or neither, got n={n}, m={m}")
        host, core = _host(bitmap), backend.core()
        if n is None or m is None:
            found = nm_pattern(host)
            if found is None:
                raise ValueError(
                    "groups of 4, 8 and 16 columns are all kept whole somewhere: no pattern n:m fits"
                )
            n, m = found
        rows, cols = host.shape
        vectors = rows * core.nm_rows_vectors(n, m, cols)
        values = torch.empty(8 * vectors, dtype=host.dtype)
        places = torch.empty(vectors * place_bits(m), dtype=torch.uint8)
        core.nm_rows_pack(
            host.values.data_ptr(), rows, cols, host.bitmask.data_ptr(), host.row_offsets.data_ptr(), host.nnz,
            n, m, values.data_ptr(), places.data_ptr(),
        )  # fmt: skip
        return cls(values.to(bitmap.device), places.to(bitmap.device), n, m, bitmap.shape)

    def to_bitmap(self) -> BitmapTensor:
        """Return the row-major form; exact but for the sign of stored zeros.

        Raises ValueError for arrays of other lengths than the shape asks for, and for places outside the matrix or
        out of order.
        """
        check_nm_sizes(self.values, self.places, self.n, self.m, self.shape)
        values, places = self.values.cpu(), self.places.cpu()
        return _unpack(
            self.shape, values.dtype, self.values.device,
            lambda v, b, r: backend.core().nm_rows_unpack(
                values.data_ptr(), places.data_ptr(), self.n, self.m, *self.shape, v, b, r
            ),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return _nbytes(self)


def chunk_slots(rows: int, groups: int) -> int:
    """Return the length of DeltaRows' ``chunk_cols``, as the core's ``delta_chunk_slots`` does."""
    return groups // CHUNK_GROUPS + rows + 1


def place_bits(m: int) -> int:
    """Return the bits that tell apart the places of a group of ``m`` (a power of two)."""
    return m.bit_length() - 1


def check_nm_sizes(values: Tensor, places: Tensor, n: int, m: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the arrays are as long as ``n`` of ``m`` in a matrix of ``shape`` needs."""
    vectors = shape[0] * backend.core().nm_rows_vectors(n, m, shape[1])
    wanted = (8 * vectors, vectors * place_bits(m))
    if (values.numel(), places.numel()) != wanted:
        raise ValueError(
            f"{n}:{m} of {shape[0]} x {shape[1]} has {wanted[0]} values and {wanted[1]} bytes of places, "
            f"got {values.numel()} and {places.numel()}"
        )


def most_kept(bitmap: BitmapTensor, m: int) -> int:
    """Return how many weights the fullest aligned group of ``m`` (4, 8 or 16) columns keeps."""
    mask = bitmap.bitmask
    if not mask.numel():
        return 0
    pairs = mask - (mask >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)  # two counts a byte
    if m == 4:
        return int(torch.maximum(fours & 15, fours >> 4).max())
    eights = (fours & 15) + (fours >> 4)
    if m == 8:
        return int(eights.max())
    if eights.shape[1] % 2:
        eights = torch.nn.functional.pad(eights, (0, 1))
    return int((eights[:, 0::2] + eights[:, 1::2]).max())


def nm_pattern(bitmap: BitmapTensor) -> tuple[int, int] | None:
    """Return the pattern n:m that ``bitmap`` keeps to and that takes the fewest bytes; of equal ones the smallest m.

    None where groups of 4, 8 and 16 columns are all kept whole somewhere.
    """
    fullest = [(max(1, most_kept(bitmap, m)), m) for m in NM_GROUPS]
    fitting = [(n, m) for n, m in fullest if n < m]
    return min(fitting, key=lambda pattern: nm_bytes(*pattern), default=None)


def nm_bytes(n: int, m: int) -> float:
    """Return the bytes that :class:`NMRows` takes per entry of the matrix."""
    return n / m * (2 + place_bits(m) / 8)


def keeps_pairs(bitmap: BitmapTensor) -> bool:
    """Tell whether no group of four neighbouring columns keeps more than two weights."""
    return most_kept(bitmap, 4) <= 2


PACKINGS: dict[str, type[DeltaRows] | type[FragmentBitmap] | type[PairBlocks] | type[NMRows]] = {
    packing.name: packing for packing in (DeltaRows, FragmentBitmap, PairBlocks, NMRows)
}
