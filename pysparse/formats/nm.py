"""n of every m consecutive inputs kept: values at fixed places, and the bits that say where each belongs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.bitmap import VALUE_DTYPES, BitmapTensor
from pysparse.formats.int8 import Int8Bitmap
from pysparse.formats.tiled import TILE_ROWS

MAX_GROUP = 64


def _array(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


@dataclass(frozen=True, slots=True, eq=False)
class NMTensor:
    """A matrix of which each row keeps at most n of every m consecutive inputs, for any n < m <= 64.

    Tiles of 16 rows; a step is 16 rows x P kept values (P = 4 for int8, else 2), a block the fewest groups
    of m that fill whole steps. ``values`` hold [tile][step][row][P]; ``indices`` hold, for each value of a
    block, ceil(log2 m) bits: its place in its group, lowest bits first, kept weights ascending. Columns that
    fill no group are stored densely in steps of their own at the end of the tile. A group that keeps fewer
    than n repeats its last index under zeros; one that keeps none has indices 1, 0, 0, ...

    Exact both ways, with one exception: where n is 1, and in the columns at the end, a kept +0.0 cannot be
    told from nothing and comes back as not kept.
    """

    values: Tensor  # float32 | bfloat16 | float16 | int8, flat
    indices: Tensor  # uint8, flat, 64 bytes of padding at the end
    n: int
    m: int
    shape: tuple[int, int]  # (R, C) = (out_features, in_features)

    @classmethod
    def from_bitmap(cls, bitmap: BitmapTensor, n: int, m: int) -> NMTensor:
        """Pack a ``bitmap`` on the CPU.

        Raises ValueError for an impossible pattern, arrays that contradict each other, or, naming the first,
        a group that keeps more than n; RuntimeError without the compiled core.
        """
        rows, cols = bitmap.shape
        word = bitmap.values.element_size()
        value_count, index_count = backend.core().nm_sizes(n, m, rows, cols, word)
        values = torch.empty(value_count, dtype=bitmap.dtype)
        indices = torch.zeros(index_count, dtype=torch.uint8)
        source, bitmask = bitmap.values.contiguous(), bitmap.bitmask.contiguous()
        row_offsets = bitmap.row_offsets.contiguous()
        backend.core().nm_pack(
            source.data_ptr(), word, n, m, rows, cols, bitmask.data_ptr(), row_offsets.data_ptr(), bitmap.nnz,
            values.data_ptr(), indices.data_ptr(),
        )  # fmt: skip
        return cls(values, indices, n, m, bitmap.shape)

    @classmethod
    def from_dense(cls, weight: Tensor, n: int, m: int, keep: Tensor | None = None) -> NMTensor:
        """Pack ``weight`` [R, C]; ``keep`` as in :meth:`BitmapTensor.from_dense`. Raises as from_bitmap."""
        return cls.from_bitmap(BitmapTensor.from_dense(weight, keep), n, m)

    def _arguments(self) -> tuple[tuple[int, int], tuple[int, int], int, int, int, int, int]:
        word = self.values.element_size()
        return _array(self.values), _array(self.indices), word, self.n, self.m, *self.shape

    def to_bitmap(self) -> BitmapTensor:
        """Return the row-major form, after :meth:`validate`."""
        self.validate()
        rows, cols = self.shape
        bitmask = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8)
        row_offsets = torch.empty(rows, dtype=torch.int64)
        nnz = backend.core().nm_unpack_mask(*self._arguments(), bitmask.data_ptr(), row_offsets.data_ptr())
        values = torch.empty(nnz, dtype=self.dtype)
        backend.core().nm_unpack_values(*self._arguments(), row_offsets.data_ptr(), values.data_ptr())
        return BitmapTensor(values, bitmask, row_offsets, self.shape)

    def to_dense(self) -> Tensor:
        """Return the dense matrix [R, C] with exact values."""
        return self.to_bitmap().to_dense()

    def validate(self) -> None:
        """Raise ValueError unless both arrays have the pattern's sizes and every index lies in its group."""
        if self.values.dtype not in (*VALUE_DTYPES, torch.int8) or self.values.dim() != 1:
            raise ValueError(
                f"values must be a float or int8 vector, got {self.values.dtype} {tuple(self.values.shape)}"
            )
        if self.indices.dtype != torch.uint8 or self.indices.dim() != 1:
            raise ValueError(
                f"indices must be a uint8 vector, got {self.indices.dtype} {tuple(self.indices.shape)}"
            )
        backend.core().nm_validate(*self._arguments())

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays, padding included."""
        return self.values.nbytes + self.indices.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype


@dataclass(frozen=True, slots=True, eq=False)
class NMInt8:
    """An :class:`NMTensor` of int8 values with a float32 scale per row, or per row and group of inputs."""

    matrix: NMTensor  # int8
    scales: Tensor  # float32 [G, 16 T], T = ceil(R/16): a tile's scales side by side
    row_sums: Tensor  # int32 [G, 16 T]: undo the offset of 128 of a quantised input
    group_size: int  # inputs that share a scale

    @classmethod
    def from_int8(cls, bitmap: Int8Bitmap, n: int, m: int) -> NMInt8:
        """Pack a quantised ``bitmap``. Raises as NMTensor.from_bitmap, and for a group of inputs that is no
        multiple of the pattern's block (8 for 2:4 and 4:8, 16 for 1:4 and 2:8, 32 for 1:8 and 2:16)."""
        source = BitmapTensor(bitmap.values, bitmap.bitmask, bitmap.row_offsets, bitmap.shape)
        matrix = NMTensor.from_bitmap(source, n, m)
        block = backend.core().nm_block_cols(n, m, 1)
        if bitmap.scales.shape[1] > 1 and bitmap.group_size % block:
            raise ValueError(f"group_size={bitmap.group_size} is no multiple of {block}, a block of {n}:{m}")
        return cls.from_matrix(matrix, bitmap.scales, bitmap.group_size)

    @classmethod
    def from_matrix(cls, matrix: NMTensor, scales: Tensor, group_size: int) -> NMInt8:
        """Join packed int8 values with row-major ``scales`` [R, G]. ValueError for sizes that do not fit."""
        rows, cols = matrix.shape
        wanted = (rows, max(1, -(-cols // max(1, group_size))))
        if scales.dtype != torch.float32 or tuple(scales.shape) != wanted:
            raise ValueError(f"scales must be float32 {wanted}, got {scales.dtype} {tuple(scales.shape)}")
        matrix.validate()
        padded = torch.zeros(wanted[1], -(-rows // TILE_ROWS) * TILE_ROWS)
        padded[:, :rows] = scales.T
        return cls(matrix, padded, _row_sums(matrix, group_size), group_size)

    @classmethod
    def from_dense(
        cls, weight: Tensor, n: int, m: int, keep: Tensor | None = None, group_size: int | None = None
    ) -> NMInt8:
        """Quantise and pack ``weight`` [R, C]."""
        return cls.from_int8(Int8Bitmap.from_dense(weight, keep, group_size), n, m)

    def to_int8(self) -> Int8Bitmap:
        """Return the row-major form; the inverse of :meth:`from_int8` within the limits of NMTensor."""
        bitmap = self.matrix.to_bitmap()
        scales = self.scales[:, : self.shape[0]].T.contiguous()
        return Int8Bitmap(
            bitmap.values, bitmap.bitmask, bitmap.row_offsets, scales, self.group_size, self.shape
        )

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantised matrix [R, C]."""
        return self.to_int8().to_dense(dtype)

    def validate(self) -> None:
        """Raise ValueError, naming the first offence, unless every array agrees with every other."""
        self.matrix.validate()
        if self.matrix.dtype != torch.int8:
            raise ValueError(f"values must be int8, got {self.matrix.dtype}")
        self.to_int8().validate()
        if not torch.equal(self.row_sums, _row_sums(self.matrix, self.group_size)):
            raise ValueError("row_sums are not the sums of the values")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.matrix.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the four arrays, padding included."""
        return self.matrix.nbytes + self.scales.nbytes + self.row_sums.nbytes


def _row_sums(matrix: NMTensor, group_size: int) -> Tensor:
    rows, cols = matrix.shape
    sums = torch.empty(max(1, -(-cols // group_size)), -(-rows // TILE_ROWS) * TILE_ROWS, dtype=torch.int32)
    backend.core().nm_row_sums(
        _array(matrix.values), _array(matrix.indices), matrix.n, matrix.m, rows, cols, group_size, sums.data_ptr()
    )  # fmt: skip
    return sums
