"""Row-major values with one mask bit per weight: the format that goes to disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse import backend

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_matrix(weight: Tensor, keep: Tensor | None) -> None:
    """Raise ValueError unless ``weight`` is a 2-D float matrix and ``keep`` a bool mask of its shape."""
    if weight.dim() != 2:
        raise ValueError(f"a sparse matrix has 2 dimensions, got shape {tuple(weight.shape)}")
    if weight.dtype not in VALUE_DTYPES:
        raise ValueError(f"values are one of float32, bfloat16, float16; got {weight.dtype}")
    if keep is not None and (keep.dtype != torch.bool or keep.shape != weight.shape):
        raise ValueError(
            f"keep is a bool mask of shape {tuple(weight.shape)}; got {keep.dtype} {tuple(keep.shape)}"
        )


def pack_bits(keep: Tensor) -> Tensor:
    """Pack bool [R, C] into uint8 [R, ceil(C/8)], least significant bit first, tail bits zero."""
    rows, cols = keep.shape
    padded = torch.nn.functional.pad(keep, (0, -cols % 8)).view(rows, (cols + 7) // 8, 8)
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (padded * place).sum(dim=2, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor, cols: int) -> Tensor:
    """Undo :func:`pack_bits`: uint8 [R, ceil(C/8)] to bool [R, C]."""
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bitmask.device)
    return (bitmask.unsqueeze(2) & place).ne(0).flatten(1)[:, :cols]


def _fits_core(tensor: Tensor) -> bool:
    return backend.available() and tensor.device.type == "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class BitmapTensor:
    """A sparse matrix as packed mask bits and the kept values, in row-major order.

    The same arrays are written to disk, so any tool can read them with ten lines of NumPy:
    column ``j`` of a row is bit ``j % 8`` of byte ``j // 8``.
    """

    values: Tensor  # [nnz] float32 | bfloat16 | float16
    bitmask: Tensor  # uint8 [R, ceil(C/8)], least significant bit first, tail bits zero
    row_offsets: Tensor  # int64 [R]: index of each row's first value (no final total)
    shape: tuple[int, int]  # (R, C) = (out_features, in_features)

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor | None = None) -> BitmapTensor:
        """Pack ``weight`` [R, C]; ``keep`` (bool, True survives) defaults to ``weight != 0``.

        A kept zero is stored like any value. Without ``keep``, -0.0 counts as zero and comes back as +0.0.
        Raises ValueError for another rank or dtype, or a mask of another shape.
        """
        check_matrix(weight, keep)
        weight = weight.detach().contiguous()
        keep = weight != 0 if keep is None else keep.to(weight.device).contiguous()
        rows, cols = weight.shape
        if not _fits_core(weight):
            counts = keep.sum(dim=1)
            return cls(weight[keep], pack_bits(keep), counts.cumsum(0) - counts, (rows, cols))
        bitmask = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8)
        row_offsets = torch.empty(rows, dtype=torch.int64)
        nnz = backend.core().bitmap_pack_mask(
            keep.data_ptr(), rows, cols, bitmask.data_ptr(), row_offsets.data_ptr()
        )
        values = torch.empty(nnz, dtype=weight.dtype)
        backend.core().bitmap_gather(
            weight.data_ptr(), weight.element_size(), rows, cols, bitmask.data_ptr(), row_offsets.data_ptr(),
            values.data_ptr(), nnz,
        )  # fmt: skip
        return cls(values, bitmask, row_offsets, (rows, cols))

    def to_dense(self) -> Tensor:
        """Return the dense matrix [R, C] with exact values and +0.0 where nothing is kept."""
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if _fits_core(self.values):
            backend.core().bitmap_scatter(
                self.values.data_ptr(), self.values.element_size(), *self.shape, self.bitmask.data_ptr(),
                self.row_offsets.data_ptr(), self.nnz, dense.data_ptr(),
            )  # fmt: skip
        else:
            dense[self.keep_mask()] = self.values
        return dense

    def keep_mask(self) -> Tensor:
        """Return the bool mask [R, C], True where a value is stored."""
        return unpack_bits(self.bitmask, self.shape[1])

    def validate(self) -> None:
        """Raise ValueError, naming the first offence, unless every array agrees with every other.

        Nothing is read through an index before that index has been checked, so this is safe on a
        file from a stranger.
        """
        rows, cols = self.shape
        if rows < 0 or cols < 0:
            raise ValueError(f"shape must not be negative, got {self.shape}")
        if self.values.dim() != 1 or self.values.dtype not in VALUE_DTYPES:
            raise ValueError(
                f"values must be a float vector, got {self.values.dtype} {tuple(self.values.shape)}"
            )
        wanted = (rows, (cols + 7) // 8)
        if self.bitmask.dtype != torch.uint8 or tuple(self.bitmask.shape) != wanted:
            raise ValueError(
                f"bitmask must be uint8 {wanted} for a {rows} x {cols} matrix, "
                f"got {self.bitmask.dtype} {tuple(self.bitmask.shape)}"
            )
        if self.row_offsets.dtype != torch.int64 or tuple(self.row_offsets.shape) != (rows,):
            raise ValueError(
                f"row_offsets must be int64 ({rows},), got {self.row_offsets.dtype} {tuple(self.row_offsets.shape)}"
            )
        self._validate_bits()

    def _validate_bits(self) -> None:
        rows, cols = self.shape
        if _fits_core(self.bitmask) and _fits_core(self.values):
            bitmask, row_offsets = self.bitmask.contiguous(), self.row_offsets.contiguous()
            backend.core().bitmap_validate(bitmask.data_ptr(), rows, cols, row_offsets.data_ptr(), self.nnz)
            return
        bits = unpack_bits(self.bitmask, self.bitmask.shape[1] * 8)
        if bool(bits[:, cols:].any()):
            raise ValueError(f"bitmask has bits set beyond column {cols - 1}")
        counts = bits.sum(dim=1)
        wrong = (self.row_offsets != counts.cumsum(0) - counts).nonzero()
        if wrong.numel():
            row = int(wrong[0])
            raise ValueError(
                f"row_offsets[{row}] is {int(self.row_offsets[row])}, but the bits of the rows before it "
                f"count {int(counts[:row].sum())}"
            )
        if int(counts.sum()) != self.nnz:
            raise ValueError(f"bitmask keeps {int(counts.sum())} values, but {self.nnz} are stored")

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.bitmask, self.row_offsets))

    @property
    def density(self) -> float:
        """Stored values over all entries; 0 for an empty matrix."""
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @property
    def sparsity(self) -> float:
        """Fraction of entries that are not stored."""
        return 1.0 - self.density

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the arrays."""
        return self.values.device
