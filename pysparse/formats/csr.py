"""Compressed sparse rows: the exchange format with SciPy, CuPy and torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.bitmap import VALUE_DTYPES, BitmapTensor, check_matrix

_INDEX_LIMIT = 2**31  # col_indices are int32


@dataclass(frozen=True, slots=True, eq=False)
class CsrTensor:
    """A sparse matrix as row offsets, column indices and values, columns ascending within a row."""

    row_offsets: Tensor  # int64 [R + 1]
    col_indices: Tensor  # int32 [nnz]
    values: Tensor  # [nnz] float32 | bfloat16 | float16
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, weight: Tensor, keep: Tensor | None = None) -> CsrTensor:
        """Pack ``weight`` [R, C]; ``keep`` (bool, True survives) defaults to ``weight != 0``.

        Raises ValueError for another rank or dtype, or for 2**31 columns and more.
        """
        check_matrix(weight, keep)
        return cls.from_bitmap(BitmapTensor.from_dense(weight, keep))

    @classmethod
    def from_bitmap(cls, bitmap: BitmapTensor) -> CsrTensor:
        """Turn mask bits into column indices; the values are shared, not copied."""
        rows, cols = bitmap.shape
        if cols >= _INDEX_LIMIT:
            raise ValueError(f"column indices are int32: {cols} columns do not fit")
        total = torch.tensor([bitmap.nnz], dtype=torch.int64, device=bitmap.device)
        row_offsets = torch.cat([bitmap.row_offsets, total])
        if backend.available() and bitmap.device.type == "cpu":
            col_indices = torch.empty(bitmap.nnz, dtype=torch.int32)
            bitmask = bitmap.bitmask.contiguous()
            backend.core().csr_indices(
                bitmask.data_ptr(), rows, cols, row_offsets.data_ptr(), bitmap.nnz, col_indices.data_ptr()
            )
        else:
            col_indices = bitmap.keep_mask().nonzero()[:, 1].to(torch.int32)
        return cls(row_offsets, col_indices, bitmap.values, bitmap.shape)

    def to_dense(self) -> Tensor:
        """Return the dense matrix [R, C] with exact values."""
        dense = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        rows = torch.repeat_interleave(
            torch.arange(self.shape[0], device=dense.device), self.row_offsets.diff()
        )
        dense[rows, self.col_indices.long()] = self.values
        return dense

    @classmethod
    def from_scipy(cls, matrix: Any) -> CsrTensor:
        """Take any scipy.sparse matrix or array (float32 or float64 values; float64 is rounded to float32)."""
        csr = matrix.tocsr().sorted_indices()
        csr.sum_duplicates()
        result = cls(
            torch.from_numpy(csr.indptr.astype("int64")),
            torch.from_numpy(csr.indices.astype("int32")),
            torch.from_numpy(csr.data.astype("float32")),
            (int(csr.shape[0]), int(csr.shape[1])),
        )
        result.validate()
        return result

    def to_scipy(self) -> Any:
        """Return a scipy.sparse.csr_array; bfloat16 and float16 values widen to float32."""
        from scipy.sparse import csr_array

        values = self.values.detach().float().cpu().numpy()
        return csr_array(
            (values, self.col_indices.cpu().numpy(), self.row_offsets.cpu().numpy()), shape=self.shape
        )

    @classmethod
    def from_torch(cls, matrix: Tensor) -> CsrTensor:
        """Take a torch tensor of layout ``torch.sparse_csr``; ValueError for another layout."""
        if matrix.layout != torch.sparse_csr:
            raise ValueError(f"expected a tensor of layout torch.sparse_csr, got {matrix.layout}")
        shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        result = cls(matrix.crow_indices().long(), matrix.col_indices().int(), matrix.values(), shape)
        result.validate()
        return result

    def to_torch(self) -> Tensor:
        """Return a torch tensor of layout ``torch.sparse_csr`` that shares the values."""
        return torch.sparse_csr_tensor(
            self.row_offsets, self.col_indices.long(), self.values, size=self.shape
        )

    def validate(self) -> None:
        """Raise ValueError, naming the first offence, unless offsets and indices stay inside the matrix."""
        rows, cols = self.shape
        if self.values.dtype not in VALUE_DTYPES or self.values.dim() != 1:
            raise ValueError(
                f"values must be a float vector, got {self.values.dtype} {tuple(self.values.shape)}"
            )
        if self.row_offsets.shape != (rows + 1,):
            raise ValueError(f"row_offsets must have {rows + 1} entries, got {tuple(self.row_offsets.shape)}")
        if self.col_indices.shape != self.values.shape:
            raise ValueError(f"{self.col_indices.numel()} column indices for {self.values.numel()} values")
        first, last = int(self.row_offsets[0]), int(self.row_offsets[-1])
        if first != 0 or last != self.nnz or bool((self.row_offsets.diff() < 0).any()):
            raise ValueError(f"row_offsets must ascend from 0 to {self.nnz}, got {first}..{last}")
        if self.nnz:
            lowest, highest = int(self.col_indices.min()), int(self.col_indices.max())
            if lowest < 0 or highest >= cols:
                raise ValueError(f"column indices must lie in [0, {cols}), got {lowest}..{highest}")
        row_starts = torch.zeros(self.nnz + 1, dtype=torch.bool, device=self.values.device)
        row_starts[self.row_offsets] = True
        if self.nnz and bool(((self.col_indices.diff() <= 0) & ~row_starts[1 : self.nnz]).any()):
            raise ValueError("column indices must ascend within each row, without repetition")

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return sum(t.numel() * t.element_size() for t in (self.row_offsets, self.col_indices, self.values))

    @property
    def density(self) -> float:
        """Stored values over all entries; 0 for an empty matrix."""
        return self.nnz / max(1, self.shape[0] * self.shape[1])
