"""How a pruned weight is kept: which values, and what says where they belong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, Int8Bitmap, Int8Grid, NMInt8, NMTensor, TiledInt8
from pysparse.formats.int8 import check_finite, check_group
from pysparse.formats.nm import MAX_GROUP
from pysparse.ops import Compact

RowMajor = BitmapTensor | Int8Bitmap  # as on disk

_GRID = "int8_grid"
_TIE = 1.02  # at the same bytes fixed places are read faster than counted ones


@dataclass(frozen=True, slots=True)
class Packing:
    """A choice of values and places; the default keeps the weight's own dtype under a bitmap.

    ``values="int8"`` keeps int8 values with a float32 scale per row, or per row and ``group_size`` consecutive
    inputs (a positive multiple of 4, e.g. 128), and quantises tokens to ``activation_bits`` (8 or 16).
    ``pattern="n:m"`` (n KEPT of every m consecutive inputs, m up to 64) keeps compact indices in place of the
    mask. Raises ValueError for anything else, and for a group size without int8 values.
    """

    values: str | None = None
    pattern: str | None = None
    group_size: int | None = None
    activation_bits: int = 8

    def __post_init__(self) -> None:
        if self.values not in (None, "int8"):
            raise ValueError(f'values is "int8" or None, got {self.values!r}')
        if self.pattern is not None and parse_pattern(self.pattern)[1] > MAX_GROUP:
            raise ValueError(f"pattern {self.pattern} must keep n of m with 1 <= n < m <= {MAX_GROUP}")
        if self.group_size is not None:
            if self.values is None:
                raise ValueError(
                    f'group_size={self.group_size} needs values="int8": other values have no scales'
                )
            check_group(1, self.group_size)
        if type(self.activation_bits) is not int or self.activation_bits not in ops.ACTIVATION_BITS:
            raise ValueError(f"activation_bits is 8 or 16, got {self.activation_bits}")

    @property
    def is_plain(self) -> bool:
        """Tell whether this is a bitmap of the weight's own values, which SparseLinear holds."""
        return self.values is None and self.pattern is None

    def check(self, weight: Tensor) -> None:
        """Raise ValueError where ``weight`` [R, C] cannot be kept so, before anything is changed.

        That is a group that keeps more than n, a NaN or infinite weight in int8, or too many columns for it.
        """
        if self.values is not None:
            check_group(weight.shape[1], self.group_size)
            check_finite(weight)
        if self.pattern is not None:
            check_pattern(weight != 0, self.pattern)

    def fitted(self, shape: tuple[int, int], nnz: int, dtype: torch.dtype) -> Packing:
        """Return this packing, without the pattern where compact indices do not pay for such a weight.

        They do where a vector kernel reads them and they take no more bytes than a mask would.
        """
        if self.pattern is None:
            return self
        n, m = parse_pattern(self.pattern)
        word = dtype.itemsize if self.values is None else 1
        values, indices = backend.core().nm_sizes(n, m, *shape, word)
        indices -= backend.core().nm_sizes(n, m, 0, 0, word)[1]  # the padding, which a mask has too
        mask = nnz * word + shape[0] * ((shape[1] + 7) // 8)
        pays = backend.core().nm_has_vector_kernel(n, m) and values * word + indices <= _TIE * mask
        return self if pays else replace(self, pattern=None)

    def quantized(self, rows: RowMajor, grid: Int8Grid | None = None) -> RowMajor:
        """Return ``rows`` with the values that this packing keeps; int8 values are left as they are.

        Weights that lie on ``grid``, if this packing's groups are the grid's, keep its scales.
        """
        if self.values is None or isinstance(rows, Int8Bitmap):
            return rows
        if grid is not None and grid.group_size == check_group(rows.shape[1], self.group_size):
            known = Int8Bitmap.from_bitmap(rows, self.group_size, grid.scales.to(rows.device))
            if torch.equal(known.to_bitmap(rows.dtype).values, rows.values):
                return known
        return Int8Bitmap.from_bitmap(rows, self.group_size)

    def pack(self, rows: RowMajor, grid: Int8Grid | None = None) -> Compact:
        """Pack a validated row-major weight for the kernels; ``grid`` as in :meth:`quantized`.

        Raises ValueError for the plain packing, and, naming the first, for a group that keeps more than the
        pattern; RuntimeError without the compiled core.
        """
        rows = self.quantized(rows, grid)
        if self.pattern is None:
            if isinstance(rows, BitmapTensor):
                raise ValueError(
                    'give values="int8", a pattern such as "2:4", or both; else use SparseLinear'
                )
            return TiledInt8.from_int8(rows)
        n, m = parse_pattern(self.pattern)
        return (
            NMInt8.from_int8(rows, n, m) if isinstance(rows, Int8Bitmap) else NMTensor.from_bitmap(rows, n, m)
        )

    @classmethod
    def of(cls, weight: Compact, activation_bits: int = 8) -> Packing:
        """Return the packing that a packed weight is in."""
        matrix = weight.matrix if isinstance(weight, NMInt8) else weight
        pattern = None if isinstance(matrix, TiledInt8) else f"{matrix.n}:{matrix.m}"
        if isinstance(weight, NMTensor):
            return cls(None, pattern)
        group = weight.group_size if weight.group_size < weight.shape[1] else None
        return cls("int8", pattern, group, activation_bits)


def grid_of(linear: nn.Module) -> Int8Grid | None:
    """Return the int8 grid that the weight of a linear layer was pruned to, if it was."""
    grid: Int8Grid | None = getattr(linear, _GRID, None)
    return grid


def set_grid(linear: nn.Module, grid: Int8Grid | None) -> None:
    """Note the grid that a weight was pruned to, or with None that it was not.

    A plain attribute: a conversion of the model to another dtype must not round the scales.
    """
    if grid is not None:
        setattr(linear, _GRID, grid)
    elif hasattr(linear, _GRID):
        delattr(linear, _GRID)


def row_major(weight: Compact) -> RowMajor:
    """Return a packed weight as it goes to disk."""
    return weight.to_bitmap() if isinstance(weight, NMTensor) else weight.to_int8()


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return (n, m) of "n:m", n KEPT of m consecutive inputs; ValueError for anything else."""
    kept, _, group = str(pattern)[:16].partition(":")
    if not (kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group)):
        raise ValueError(f'pattern is "unstructured" or "n:m" with n kept of m, got "{str(pattern)[:40]}"')
    return int(kept), int(group)


def check_pattern(keep: Tensor, pattern: str) -> None:
    """Raise ValueError, naming the first, where a group of the mask ``keep`` [R, C] keeps more than n of m."""
    n, m = parse_pattern(pattern)
    cols = keep.shape[1] - keep.shape[1] % m
    counts = keep[:, :cols].unflatten(1, (-1, m)).sum(dim=2) if cols else torch.zeros(0, 1)
    offences = (counts > n).nonzero()
    if offences.numel():
        row, index = offences[0].tolist()
        raise ValueError(
            f"pattern {pattern} keeps {n} of {m}, but {len(offences)} groups keep more: "
            f"row {row}, columns {index * m} to {index * m + m - 1} keep {int(counts[row, index])}"
        )
