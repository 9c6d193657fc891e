"""Which weights compete in SparseGPT's sweep, on every device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SweepPattern:
    """Which weights compete: those of a block of columns, in a row or in all rows, or n of every m."""

    block: int  # columns; for n:m a multiple of m
    counts: tuple[int, ...] = ()  # unstructured: how many weights go in each block, of a row or of all rows
    joint: bool = False  # unstructured: all rows compete
    n: int = 0  # n:m: kept
    m: int = 0
