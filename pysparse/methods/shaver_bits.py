"""Fewer bits for the values that Shaver keeps: an even grid of 4, 8 or 16 bits, and a file of the codes."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pysparse.formats.embedding import EmbeddingTable
from pysparse.formats.tensor_file import read_tensors, write_tensors
from pysparse.nn import SparseEmbedding
from pysparse.nn.ctr import CtrModel

FORMAT = "pysparse-embedding-affine-1"
_BITS = (4, 8, 16)
_ARRAYS = ("codes", "bitmask", "codebook", "field_rows")


@dataclass(frozen=True, slots=True, eq=False)
class AffineValues:
    """Values on an even grid of 2^bits steps between the smallest and the largest one."""

    codes: NDArray[Any]  # uint8 or uint16 [nnz]; two 4-bit codes a byte, the first in the low half
    scale: float
    zero_point: float
    bits: int
    count: int

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ValueError(f"bits is one of {_BITS}, got {self.bits}")
        dtype = np.uint16 if self.bits == 16 else np.uint8
        wanted = (self.count + 1) // 2 if self.bits == 4 else self.count
        if self.codes.dtype != dtype or self.codes.shape != (wanted,):
            raise ValueError(
                f"codes of {self.count} values in {self.bits} bits are {np.dtype(dtype).name} [{wanted}], "
                f"got {self.codes.dtype} {list(self.codes.shape)}"
            )
        if not np.isfinite([self.scale, self.zero_point]).all() or not self.scale > 0.0:
            raise ValueError(f"scale is positive, zero_point finite, got {self.scale} and {self.zero_point}")

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and zero point."""
        return self.codes.nbytes + 16

    def values(self) -> NDArray[np.float32]:
        """Return (code - zero_point) * scale, float32 [nnz]."""
        codes = self.codes
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=1).ravel()[: self.count]
        return ((codes.astype(np.float64) - self.zero_point) * self.scale).astype(np.float32)


def affine_values(values: NDArray[np.float32], bits: int) -> AffineValues:
    """Round ``values`` to 4, 8 or 16 bits by one scale and zero point a table: at most one step from where they were.

    Raises ValueError for other bits and for values that are not finite.
    """
    if bits not in _BITS:
        raise ValueError(f"bits is one of {_BITS}, got {bits}")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} values are not finite")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    top = 2**bits - 1
    scale = (high - low) / top if high > low else (abs(low) or 1.0)
    zero_point = float(np.trunc(-low / scale))
    codes = np.clip(np.rint(values.astype(np.float64) / scale + zero_point), 0, top)
    packed = codes.astype(np.uint16 if bits == 16 else np.uint8)
    if bits == 4:
        pairs = np.pad(packed, (0, packed.size % 2)).reshape(-1, 2)
        packed = pairs[:, 0] | (pairs[:, 1] << 4)
    return AffineValues(packed, scale, zero_point, bits, values.size)


def quantise_embedding(model: CtrModel, bits: int) -> tuple[CtrModel, AffineValues]:
    """Return a copy of a packed model whose kept values are those of ``bits`` bits, and the codes.

    Lookups read float values, rounded to the grid; :func:`save_affine` writes the codes.
    """
    if not isinstance(model.embedding, SparseEmbedding):
        raise TypeError(f"only a packed table is quantised, got {type(model.embedding).__name__}")
    table = model.embedding.table
    codes = affine_values(table.values.float().cpu().numpy(), bits)
    result = copy.deepcopy(model)
    rounded = torch.from_numpy(codes.values()).to(table.values)
    result.embedding = SparseEmbedding(
        EmbeddingTable(rounded, table.bitmask, table.codebook, table.field_rows, table.dims)
    )
    return result, codes


def save_affine(path: str | os.PathLike[str], embedding: SparseEmbedding, bits: int) -> None:
    """Write a packed table with its values in ``bits`` bits, as safetensors, beside and then renamed."""
    table = embedding.table
    codes = affine_values(table.values.float().cpu().numpy(), bits)
    arrays = {name: getattr(table, name) for name in _ARRAYS[1:]}
    metadata = {
        "format": FORMAT, "dims": str(table.dims), "bits": str(bits), "count": str(codes.count),
        "scale": codes.scale.hex(), "zero_point": codes.zero_point.hex(),
        "per_field": str(int(embedding.per_field)),
    }  # fmt: skip
    write_tensors(path, {"codes": torch.from_numpy(codes.codes), **arrays}, metadata)


def load_affine(path: str | os.PathLike[str]) -> SparseEmbedding:
    """Read what :func:`save_affine` wrote. Raises ValueError, naming the offence, for a file that is not sound."""
    arrays, metadata = read_tensors(path, FORMAT, _ARRAYS)
    try:
        numbers = {name: int(metadata[name]) for name in ("dims", "bits", "count", "per_field")}
        scale, zero_point = (float.fromhex(metadata[name]) for name in ("scale", "zero_point"))
    except KeyError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    codes = AffineValues(arrays.pop("codes").numpy(), scale, zero_point, numbers["bits"], numbers["count"])
    values = torch.from_numpy(codes.values()).to(arrays["codebook"].dtype)
    return SparseEmbedding(EmbeddingTable(values, **arrays, dims=numbers["dims"]), numbers["per_field"] == 1)
