"""Vectors and matrices that are checked before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Flags = NDArray[np.bool_]


def finite_array(name: str, values: ArrayLike, dimensions: int) -> NDArray[np.float64]:
    """Return ``values`` as float64; ValueError when the dimensions are wrong, empty, NaN or infinite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise ValueError(f"{name} has {dimensions} dimensions, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: shape {array.shape}")
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{bad} of {array.size} entries of {name} are NaN or infinite")
    return array


def positive(name: str, value: Any) -> float:
    """Return ``value`` as a float; ValueError unless it is finite and above 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is a number above 0, got {value!r}") from None
    if not 0.0 < number < float("inf"):
        raise ValueError(f"{name} is a number above 0, got {value!r}")
    return number
