"""The packing for many tokens: blocks of weights whose rows are lists of pairs with 8-bit columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.bitmap import BitmapTensor
from pysparse.formats.tiled import TiledBitmap

BLOCK_ROWS = 256
BLOCK_BYTES = 512  # of a row within a block: 256 columns of bfloat16, 128 of float32
GROUP_ROWS = 4


@dataclass(frozen=True, slots=True, eq=False)
class ColumnPairs:
    """A sparse matrix in blocks of 256 rows x 256 columns (128 in float32), rows as lists of pairs.

    A pair is any two stored weights of a row within the block, one entry of ``values`` and ``indices``: with
    64 tokens of transposed activations in the cache, both columns are loaded, interleaved and consumed by one
    dot product for 16 tokens each. Rows are sorted by their number of pairs and laid four side by side
    (``csrc/include/pysparse/views.h`` has the exact layout), about 3 bytes a bfloat16 weight and 5 a float32.
    """

    values: Tensor  # [entries, 2]
    indices: Tensor  # uint8 [entries, 2]: columns within the block; equal: one weight; falling: none
    row_order: Tensor  # uint8 [C blocks * R rounded up to 4, + 4]: rows within the block, fewest pairs first
    counts: Tensor  # uint8 [C blocks * R / 4]: pairs of the longest row of each group of four
    block_offsets: Tensor  # int64 [blocks + 1]: index of each block's first entry, and the total
    shape: tuple[int, int]

    @classmethod
    def from_tiled(cls, tiled: TiledBitmap) -> ColumnPairs:
        """Repack ``tiled``, exactly. Raises RuntimeError without the compiled core: this is a kernel's format.

        Raises ValueError when masks and offsets contradict each other.
        """
        core = backend.core()
        rows, cols = tiled.shape
        col_blocks = -(-cols * tiled.values.element_size() // BLOCK_BYTES)
        blocks = -(-rows // BLOCK_ROWS) * col_blocks
        slots = -(-rows // GROUP_ROWS) * GROUP_ROWS * col_blocks
        row_order = torch.zeros(slots + GROUP_ROWS, dtype=torch.uint8)
        counts = torch.empty(slots // GROUP_ROWS, dtype=torch.uint8)
        block_offsets = torch.empty(blocks + 1, dtype=torch.int64)
        source = (
            tiled.values.data_ptr(), tiled.values.element_size(), rows, cols, tiled.masks.data_ptr(),
            tiled.tile_offsets.data_ptr(),
        )  # fmt: skip
        plan = row_order.data_ptr(), counts.data_ptr(), block_offsets.data_ptr()
        entries = core.pairs_plan(*source, tiled.nnz, *plan)
        values = torch.empty(entries, 2, dtype=tiled.values.dtype)
        indices = torch.empty(entries, 2, dtype=torch.uint8)
        core.pairs_fill(*source, *plan, values.data_ptr(), indices.data_ptr())
        return cls(values, indices, row_order, counts, block_offsets, tiled.shape)

    def to_bitmap(self) -> BitmapTensor:
        """Return the row-major form, with the very values and mask that were packed."""
        core = backend.core()
        rows, cols = self.shape
        bitmask = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8)
        row_offsets = torch.empty(rows, dtype=torch.int64)
        packed = (
            self.values.data_ptr(), self.values.element_size(), rows, cols, self.indices.data_ptr(),
            self.row_order.data_ptr(), self.counts.data_ptr(), self.block_offsets.data_ptr(),
        )  # fmt: skip
        nnz = core.pairs_mask(*packed, bitmask.data_ptr(), row_offsets.data_ptr())
        values = torch.empty(nnz, dtype=self.values.dtype)
        core.pairs_values(*packed, row_offsets.data_ptr(), values.data_ptr())
        return BitmapTensor(values, bitmask, row_offsets, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the five arrays, padding included."""
        arrays = (self.values, self.indices, self.row_order, self.counts, self.block_offsets)
        return sum(array.numel() * array.element_size() for array in arrays)
