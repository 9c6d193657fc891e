"""Random permutations and words for Shapley estimation: by counting, so that order and threads change nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pysparse import backend

SEEDS = 1 << 64


def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the four 32-bit words of Philox4x32-10 for a 64-bit key and four 32-bit counters (Salmon et al. 2011)."""
    result: tuple[int, int, int, int] = backend.core().philox(key, *counter)
    return result


def draw_words(
    seed: int, first: int, rows: int, cols: int, *, visit: int = 0, purpose: int = 1
) -> NDArray[np.uint32]:
    """Return uniform 32-bit words, uint32 [rows, cols]; row r is that of sample ``first + r``, whatever the rest.

    ``purpose`` separates sequences that must not repeat one another; 0 is that of :func:`draw_permutations`.
    Raises ValueError for counters out of range (2^40 samples, 2^23 visits) or a seed outside [0, 2^64).
    """
    words = np.empty((rows, cols), dtype=np.uint32)
    backend.core().shapley_words(_seed(seed), _first(first), visit, purpose, rows, cols, words.ctypes.data)
    return words


def draw_permutations(
    seed: int, first: int, rows: int, players: int, *, visit: int = 0, purpose: int = 0
) -> NDArray[np.int32]:
    """Return uniform permutations of 0 .. players - 1, int32 [rows, players], as :func:`draw_words` does.

    Fisher-Yates by words of Philox with Lemire's rejection: exactly uniform, and the same on every device.
    """
    orders = np.empty((rows, players), dtype=np.int32)
    backend.core().shapley_permutations(
        _seed(seed), _first(first), visit, purpose, rows, players, orders.ctypes.data
    )
    return orders


def _seed(seed: int) -> int:
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed {seed} is not in [0, 2^64)")
    return seed


def _first(first: int) -> int:
    if first < 0:
        raise ValueError(f"sample {first} is negative")
    return first
