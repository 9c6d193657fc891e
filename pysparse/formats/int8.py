"""int8 values under a bitmap: one float32 scale per row, or per row and group of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.bitmap import BitmapTensor
from pysparse.formats.tiled import TILE_ROWS

MAX_COLS = 65536  # 65536 columns x 255 x 127 < 2**31: no 32-bit sum of products can overflow
QUAD_COLS = 4
BYTE_PADDING = 64  # int8 values behind the last one that a full vector load may touch
LEVELS = 127  # symmetric: -127 to 127


def check_group(cols: int, group_size: int | None) -> int:
    """Return the columns that share a scale; ValueError unless ``group_size`` is a positive multiple of 4."""
    if cols > MAX_COLS:
        raise ValueError(
            f"{cols} columns: beyond {MAX_COLS} a 32-bit sum of int8 products could overflow; keep bfloat16 values"
        )
    if group_size is None:
        return max(1, cols)
    if not 0 < group_size <= MAX_COLS or group_size % QUAD_COLS:
        raise ValueError(
            f"group_size is a positive multiple of {QUAD_COLS} inputs up to {MAX_COLS}, got {group_size}"
        )
    return group_size


def quantize_dense(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Quantise float ``weight`` [R, C]: int8 [R, C] and float32 scales [R, ceil(C / group)], ties to even."""
    scales = group_maxima(weight.float(), group) / LEVELS
    return codes_of(weight, scales, group), scales


def group_maxima(weight: Tensor, group: int) -> Tensor:
    """Return the largest magnitude of each row's groups of columns, [R, ceil(C / group)]."""
    return _grouped(weight, group).abs().amax(dim=2)


def codes_of(weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """Return the nearest whole multiples of given scales, int8 [R, C]; ties to even, beyond 127 clamped."""
    padded = _grouped(weight.float(), group)
    quantized = (padded / scales.unsqueeze(2)).round().clamp(-LEVELS, LEVELS)
    quantized = quantized.masked_fill((scales == 0).unsqueeze(2), 0)
    return quantized.to(torch.int8).flatten(1)[:, : weight.shape[1]]


def _grouped(weight: Tensor, group: int) -> Tensor:
    rows, cols = weight.shape
    groups = _groups(cols, group)
    return torch.nn.functional.pad(weight, (0, groups * group - cols)).view(rows, groups, group)


def check_finite(values: Tensor) -> None:
    """Raise ValueError when a value is NaN or infinite, which no scale can represent."""
    if values.numel() == 0 or all(bool(bound.isfinite()) for bound in values.aminmax()):
        return  # one pass: a NaN is both the least and the largest
    wrong = int((~torch.isfinite(values)).sum())
    raise ValueError(f"{wrong} weights are NaN or infinite: int8 has no value for them")


def _groups(cols: int, group: int) -> int:
    return max(1, -(-cols // group))


def _check_scales(scales: Tensor, rows: int, cols: int, group: int) -> None:
    wanted = (rows, _groups(cols, group))
    if scales.dtype != torch.float32 or tuple(scales.shape) != wanted:
        raise ValueError(f"scales must be float32 {wanted}, got {scales.dtype} {tuple(scales.shape)}")
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise ValueError("scales must be finite and not negative")


@dataclass(frozen=True, slots=True, eq=False)
class Int8Bitmap:
    """A pruned matrix in int8, row-major: weight = value * scale of its row and group of inputs.

    Quantised symmetrically from the pruned weight, scale = largest magnitude / 127, round to nearest even.
    A kept weight that rounds to 0 stays kept; a row (or group) of zeros has scale 0.
    """

    values: Tensor  # int8 [nnz], row-major
    bitmask: Tensor  # uint8 [R, ceil(C/8)], as in BitmapTensor
    row_offsets: Tensor  # int64 [R]
    scales: Tensor  # float32 [R, G], G = ceil(C / group_size)
    group_size: int  # inputs that share a scale; C where a row has one scale
    shape: tuple[int, int]

    @classmethod
    def from_bitmap(
        cls, bitmap: BitmapTensor, group_size: int | None = None, scales: Tensor | None = None
    ) -> Int8Bitmap:
        """Quantise a validated ``bitmap``; ``group_size`` None gives one scale a row.

        With ``scales`` [R, G], float32, these are taken as they are, and weights beyond 127 of them clamped.
        Raises ValueError for a NaN or infinite weight, more than 65536 columns, a group size that is no
        positive multiple of 4, or scales of another shape or type, negative or not finite.
        """
        rows, cols = bitmap.shape
        group = check_group(cols, group_size)
        check_finite(bitmap.values)
        if scales is not None:
            _check_scales(scales, rows, cols, group)
        if not (backend.available() and bitmap.device.type == "cpu"):
            dense = bitmap.to_dense()
            found = group_maxima(dense.float(), group) / LEVELS if scales is None else scales
            values = codes_of(dense, found, group)[bitmap.keep_mask()]
            return cls(values, bitmap.bitmask, bitmap.row_offsets, found, group, bitmap.shape)
        source = bitmap.values.float().contiguous()
        bitmask, row_offsets = bitmap.bitmask.contiguous(), bitmap.row_offsets.contiguous()
        values = torch.empty(bitmap.nnz, dtype=torch.int8)
        given = {} if scales is None else {"scales_given": True}
        found = torch.empty(rows, _groups(cols, group)) if scales is None else scales.contiguous()
        backend.core().int8_quantize(
            source.data_ptr(), rows, cols, bitmask.data_ptr(), row_offsets.data_ptr(), bitmap.nnz, group,
            values.data_ptr(), found.data_ptr(), **given,
        )  # fmt: skip
        return cls(values, bitmask, row_offsets, found, group, bitmap.shape)

    @classmethod
    def from_dense(
        cls, weight: Tensor, keep: Tensor | None = None, group_size: int | None = None
    ) -> Int8Bitmap:
        """Quantise a dense ``weight`` [R, C]; ``keep`` as in :meth:`BitmapTensor.from_dense`."""
        return cls.from_bitmap(BitmapTensor.from_dense(weight, keep), group_size)

    def to_bitmap(self, dtype: torch.dtype = torch.float32) -> BitmapTensor:
        """Dequantise: each value is the float32 product of its int8 and its scale, rounded once to ``dtype``."""
        rows, cols = self.shape
        if backend.available() and self.device.type == "cpu":
            values, scales = torch.empty(self.nnz), self.scales.contiguous()
            backend.core().int8_dequantize(
                self.values.data_ptr(), scales.data_ptr(), rows, cols, self.bitmask.data_ptr(),
                self.row_offsets.data_ptr(), self.nnz, self.group_size, values.data_ptr(),
            )  # fmt: skip
        else:
            keep = BitmapTensor(self.values, self.bitmask, self.row_offsets, self.shape).keep_mask()
            spread = self.scales.repeat_interleave(self.group_size, dim=1)[:, :cols]
            values = self.values.float() * spread[keep]
        return BitmapTensor(values.to(dtype), self.bitmask, self.row_offsets, self.shape)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantised matrix [R, C]."""
        return self.to_bitmap(dtype).to_dense()

    def validate(self) -> None:
        """Raise ValueError, naming the first offence, unless every array agrees with every other."""
        rows, cols = self.shape
        group = check_group(cols, None if self.group_size >= cols else self.group_size)
        if self.values.dtype != torch.int8 or self.values.dim() != 1:
            raise ValueError(
                f"values must be an int8 vector, got {self.values.dtype} {tuple(self.values.shape)}"
            )
        _check_scales(self.scales, rows, cols, group)
        placeholder = torch.empty(1).expand(self.nnz)  # the mask is checked against a count of values
        BitmapTensor(placeholder, self.bitmask, self.row_offsets, self.shape).validate()

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the four arrays."""
        return sum(t.nbytes for t in (self.values, self.bitmask, self.row_offsets, self.scales))

    @property
    def device(self) -> torch.device:
        """Device of the arrays."""
        return self.values.device


@dataclass(frozen=True, slots=True, eq=False)
class TiledInt8:
    """The kernels' packing of :class:`Int8Bitmap`: tiles of 16 rows x 4 columns, a 64-bit mask word a cell.

    Bit ``4 * r + c`` of ``masks[t, q]`` says that weight (16 t + r, 4 q + c) is stored; values follow in bit
    order. ``row_sums`` undo the offset of 128 that makes a quantised input unsigned.
    """

    values: Tensor  # int8 [nnz + BYTE_PADDING], tail zero
    masks: Tensor  # int64 [T, ceil(C/4)], T = ceil(R/16)
    tile_offsets: Tensor  # int64 [T + 1]
    scales: Tensor  # float32 [G, 16 T]
    row_sums: Tensor  # int32 [G, 16 T]
    group_size: int
    shape: tuple[int, int]

    @classmethod
    def from_int8(cls, bitmap: Int8Bitmap) -> TiledInt8:
        """Repack a validated ``bitmap``; nothing is dropped. RuntimeError without the compiled core."""
        rows, cols = bitmap.shape
        tiles, groups = -(-rows // TILE_ROWS), bitmap.scales.shape[1]
        values = torch.zeros(bitmap.nnz + BYTE_PADDING, dtype=torch.int8)
        masks = torch.empty(tiles, -(-cols // QUAD_COLS), dtype=torch.int64)
        tile_offsets = torch.empty(tiles + 1, dtype=torch.int64)
        row_sums = torch.empty(groups, tiles * TILE_ROWS, dtype=torch.int32)
        source, bitmask = bitmap.values.contiguous(), bitmap.bitmask.contiguous()
        row_offsets = bitmap.row_offsets.contiguous()
        backend.core().int8_tile_pack(
            source.data_ptr(), rows, cols, bitmask.data_ptr(), row_offsets.data_ptr(), bitmap.nnz,
            bitmap.group_size, values.data_ptr(), masks.data_ptr(), tile_offsets.data_ptr(), row_sums.data_ptr(),
        )  # fmt: skip
        scales = torch.zeros(groups, tiles * TILE_ROWS)
        scales[:, :rows] = bitmap.scales.T
        return cls(values, masks, tile_offsets, scales, row_sums, bitmap.group_size, bitmap.shape)

    def to_int8(self) -> Int8Bitmap:
        """Return the row-major form; exact inverse of :meth:`from_int8`."""
        rows, cols = self.shape
        values = torch.empty(self.nnz, dtype=torch.int8)
        bitmask = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8)
        row_offsets = torch.empty(rows, dtype=torch.int64)
        backend.core().int8_tile_unpack(
            self.values.data_ptr(), rows, cols, self.masks.data_ptr(), self.tile_offsets.data_ptr(), self.nnz,
            values.data_ptr(), bitmask.data_ptr(), row_offsets.data_ptr(),
        )  # fmt: skip
        scales = self.scales[:, :rows].T.contiguous()
        return Int8Bitmap(values, bitmask, row_offsets, scales, self.group_size, self.shape)

    @property
    def nnz(self) -> int:
        """Number of stored values, padding not counted."""
        return self.values.numel() - BYTE_PADDING

    @property
    def nbytes(self) -> int:
        """Bytes of the five arrays, padding included."""
        return sum(t.nbytes for t in (self.values, self.masks, self.tile_offsets, self.scales, self.row_sums))
