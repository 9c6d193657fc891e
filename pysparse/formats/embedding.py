"""A pruned embedding table: kept values, one mask bit an entry, and a codebook that stands in for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.formats.bitmap import VALUE_DTYPES, check_matrix, pack_bits, unpack_bits


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingTable:
    """Rows of several fields one below the other, pruned entry by entry.

    Entry (v, k) is ``values``'s next when its bit is set and ``codebook[f, k]`` otherwise, f being the field of row v:
    the field-aware codebook of Shaver (arXiv 2411.13052, section 3.3). A plain table has one field and a codebook of
    zeros. The same arrays go to disk. Immutable; :meth:`validate` checks what did not come from :meth:`from_dense`.
    """

    values: Tensor  # [nnz] float32 | bfloat16 | float16, row by row
    bitmask: Tensor  # uint8 [rows, ceil(dims/8)], least significant bit first, tail bits zero
    codebook: Tensor  # [fields, dims], of the values' dtype
    field_rows: Tensor  # int64 [fields + 1], on the CPU: where each field's rows begin, then their number
    dims: int

    @classmethod
    def from_dense(
        cls, weight: Tensor, keep: Tensor | None = None, *, field_sizes: Sequence[int] | None = None,
        codebook: Tensor | None = None,
    ) -> EmbeddingTable:  # fmt: skip
        """Pack ``weight`` [rows, dims]; ``keep`` (bool, True survives) defaults to ``weight != 0``.

        ``field_sizes`` are the rows of each field (one field by default), ``codebook`` [fields, dims] what stands in
        for pruned entries (zeros by default). Raises ValueError for shapes, dtypes or sizes that do not fit.
        """
        check_matrix(weight, keep)
        weight = weight.detach()
        keep = weight != 0 if keep is None else keep.to(weight.device)
        sizes = [weight.shape[0]] if field_sizes is None else [int(size) for size in field_sizes]
        if min(sizes, default=0) < 0 or sum(sizes) != weight.shape[0]:
            raise ValueError(f"field_sizes {sizes} must be rows that add up to {weight.shape[0]}")
        shape = (len(sizes), weight.shape[1])
        codes = weight.new_zeros(shape) if codebook is None else codebook.detach().to(weight)
        if tuple(codes.shape) != shape:
            raise ValueError(f"codebook must be {shape} (fields, dims), got {tuple(codes.shape)}")
        field_rows = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
        return cls(weight[keep], pack_bits(keep), codes.clone(), field_rows, weight.shape[1])

    def to_dense(self) -> Tensor:
        """Return the table [rows, dims] as lookups see it: kept values, and the codebook everywhere else."""
        sizes = self.field_rows.diff().to(self.codebook.device)
        dense = self.codebook.repeat_interleave(sizes, dim=0)
        dense[self.keep_mask()] = self.values
        return dense

    def keep_mask(self) -> Tensor:
        """Return the bool mask [rows, dims], True where a value is stored."""
        return unpack_bits(self.bitmask, self.dims)

    def validate(self) -> None:
        """Raise ValueError, naming the first offence, unless every array agrees with every other."""
        if self.values.dim() != 1 or self.values.dtype not in VALUE_DTYPES:
            raise ValueError(
                f"values must be a float vector, got {self.values.dtype} {tuple(self.values.shape)}"
            )
        self._validate_fields()
        wanted = (self.rows, (self.dims + 7) // 8)
        if self.bitmask.dtype != torch.uint8 or tuple(self.bitmask.shape) != wanted:
            raise ValueError(
                f"bitmask must be uint8 {wanted}, got {self.bitmask.dtype} {tuple(self.bitmask.shape)}"
            )
        bits = unpack_bits(self.bitmask, 8 * wanted[1])
        if bool(bits[:, self.dims :].any()):
            raise ValueError(f"bitmask has bits set beyond column {self.dims - 1}")
        if int(bits.sum()) != self.values.numel():
            raise ValueError(f"bitmask keeps {int(bits.sum())} values, but {self.values.numel()} are stored")

    def _validate_fields(self) -> None:
        starts = self.field_rows
        if starts.dtype != torch.int64 or starts.dim() != 1 or starts.numel() < 2:
            raise ValueError(
                f"field_rows must be int64 [fields + 1], got {starts.dtype} {tuple(starts.shape)}"
            )
        if int(starts[0]) != 0 or bool((starts.diff() < 0).any()):
            raise ValueError(f"field_rows must rise from 0, got {starts.tolist()[:8]}")
        wanted = (starts.numel() - 1, self.dims)
        if tuple(self.codebook.shape) != wanted or self.codebook.dtype != self.values.dtype:
            raise ValueError(
                f"codebook must be {self.values.dtype} {wanted}, got {self.codebook.dtype} {tuple(self.codebook.shape)}"
            )

    @property
    def rows(self) -> int:
        """Number of embeddings."""
        return int(self.field_rows[-1])

    @property
    def fields(self) -> int:
        """Number of fields."""
        return self.field_rows.numel() - 1

    @property
    def density(self) -> float:
        """Share of entries that are stored."""
        return self.values.numel() / max(1, self.rows * self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in (self.values, self.bitmask, self.codebook, self.field_rows))
