"""The numbers that int8 values with fixed scales can hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.formats.int8 import LEVELS, check_finite, check_group, group_maxima


@dataclass(frozen=True, slots=True, eq=False)
class Int8Grid:
    """Whole multiples, -127 to 127, of a scale for each row (and group of inputs) of a matrix [R, C].

    Weights that a method has rounded to it while pruning are packed with these very scales
    (:meth:`pysparse.formats.Int8Bitmap.from_bitmap`), so that nothing is rounded twice.
    """

    scales: Tensor  # float32 [R, G], G = ceil(C / group_size)
    group_size: int  # inputs that share a scale; C where a row has one scale

    @classmethod
    def of(cls, weight: Tensor, group_size: int | None = None) -> Int8Grid:
        """Return the grid that just spans ``weight`` [R, C]; ``group_size`` None gives one scale a row.

        Raises ValueError for a NaN or infinite weight, more than 65536 columns, or a group size that is no
        positive multiple of 4.
        """
        group = check_group(weight.shape[1], group_size)
        check_finite(weight)
        return cls(group_maxima(weight.float(), group) / LEVELS, group)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """Return the points nearest to the ``values`` [R] of one column, float32; ties to even."""
        scale = self.scales[:, column // self.group_size]
        codes = (values / scale).round().clamp(-LEVELS, LEVELS)
        return torch.where(scale == 0, 0.0, codes * scale)
