"""The kernels' packing of a bitmap: tiles of 16 rows, streamed along pairs of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.bitmap import BitmapTensor, pack_bits

TILE_ROWS = 16
PADDING = 32  # values behind the last one that a full vector load may touch


@dataclass(frozen=True, slots=True, eq=False)
class TiledBitmap:
    """A sparse matrix in tiles of 16 rows x 2 columns, one 32-bit mask word per such cell.

    Bit ``2 * r + c`` of ``masks[t, p]`` says that weight (16 t + r, 2 p + c) is stored; values follow in
    bit order, cell after cell along the row, tile after tile. One expand instruction then fills a
    512-bit register with the pairs that one widening dot product consumes, for bf16 and (in two
    halves) for fp32 alike, so a dtype change never needs a new packing.
    """

    values: Tensor  # [nnz + PADDING], tail zero
    masks: Tensor  # int32 [T, ceil(C/2)], T = ceil(R/16)
    tile_offsets: Tensor  # int64 [T + 1]: index of each tile's first value, and the total
    shape: tuple[int, int]

    @classmethod
    def from_bitmap(cls, bitmap: BitmapTensor) -> TiledBitmap:
        """Repack a validated ``bitmap``; nothing is dropped or reordered within a row."""
        rows, cols = bitmap.shape
        tiles, pairs = -(-rows // TILE_ROWS), -(-cols // 2)
        if not (backend.available() and bitmap.device.type == "cpu"):
            return cls._from_bitmap_torch(bitmap, tiles, pairs)
        values = torch.zeros(bitmap.nnz + PADDING, dtype=bitmap.dtype)
        masks = torch.empty(tiles, pairs, dtype=torch.int32)
        tile_offsets = torch.empty(tiles + 1, dtype=torch.int64)
        bitmask, row_offsets = bitmap.bitmask.contiguous(), bitmap.row_offsets.contiguous()
        source = bitmap.values.contiguous()
        backend.core().tile_pack(
            source.data_ptr(), source.element_size(), rows, cols, bitmask.data_ptr(), row_offsets.data_ptr(),
            bitmap.nnz, values.data_ptr(), masks.data_ptr(), tile_offsets.data_ptr(),
        )  # fmt: skip
        return cls(values, masks, tile_offsets, bitmap.shape)

    @classmethod
    def _from_bitmap_torch(cls, bitmap: BitmapTensor, tiles: int, pairs: int) -> TiledBitmap:
        rows, cols = bitmap.shape
        pad = (0, 2 * pairs - cols, 0, TILE_ROWS * tiles - rows)
        keep, dense = (
            torch.nn.functional.pad(t, pad)
            .view(tiles, TILE_ROWS, pairs, 2)
            .permute(0, 2, 1, 3)
            .reshape(tiles, pairs, 32)
            for t in (bitmap.keep_mask(), bitmap.to_dense())
        )
        place = torch.ones(32, dtype=torch.int64, device=keep.device) << torch.arange(32, device=keep.device)
        words = (keep * place).sum(dim=2)  # int64; wraps to the same 32 bits below
        masks = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        counts = keep.sum(dim=(1, 2))
        tile_offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(torch.nn.functional.pad(dense[keep], (0, PADDING)), masks, tile_offsets, bitmap.shape)

    def to_bitmap(self) -> BitmapTensor:
        """Return the row-major form; exact inverse of :meth:`from_bitmap`."""
        rows, cols = self.shape
        if not (backend.available() and self.values.device.type == "cpu"):
            keep, dense = self._to_dense_torch()
            counts = keep.sum(dim=1)
            return BitmapTensor(dense[keep], pack_bits(keep), counts.cumsum(0) - counts, self.shape)
        values = torch.empty(self.nnz, dtype=self.values.dtype)
        bitmask = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8)
        row_offsets = torch.empty(rows, dtype=torch.int64)
        backend.core().tile_unpack(
            self.values.data_ptr(), self.values.element_size(), rows, cols, self.masks.data_ptr(),
            self.tile_offsets.data_ptr(), self.nnz, values.data_ptr(), bitmask.data_ptr(), row_offsets.data_ptr(),
        )  # fmt: skip
        return BitmapTensor(values, bitmask, row_offsets, self.shape)

    def _to_dense_torch(self) -> tuple[Tensor, Tensor]:
        rows, cols = self.shape
        tiles, pairs = self.masks.shape
        shifts = torch.arange(32, device=self.masks.device)
        cells = ((self.masks.to(torch.int64).unsqueeze(2) >> shifts) & 1).bool()  # [T, pairs, 32]
        dense = torch.zeros(cells.shape, dtype=self.values.dtype, device=self.values.device)
        dense[cells] = self.values[: self.nnz]
        keep, dense = (
            t.view(tiles, pairs, TILE_ROWS, 2)
            .permute(0, 2, 1, 3)
            .reshape(tiles * TILE_ROWS, 2 * pairs)[:rows, :cols]
            for t in (cells, dense)
        )
        return keep.contiguous(), dense.contiguous()

    @property
    def nnz(self) -> int:
        """Number of stored values, padding not counted."""
        return self.values.numel() - PADDING

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays, padding included."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.masks, self.tile_offsets))
