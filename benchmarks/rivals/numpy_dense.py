"""numpy's dense product in fp32 (OpenBLAS): always there, so it also shows that engines in other processes work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ENGINES = {"numpy fp32": "fp32"}
PACKAGES = ("numpy",)
ERROR_BOUND = {"fp32": 1e-4}


def load() -> None:
    """Nothing to look for: the worker has imported numpy already."""


def build(
    variant: str, weight: np.ndarray, x: np.ndarray, threads: int
) -> tuple[Callable[[], np.ndarray], int]:
    held, entry = weight.copy(), np.ascontiguousarray(x.T)  # threads: OMP_NUM_THREADS, set by the parent
    return lambda: (held @ entry).T, held.nbytes
