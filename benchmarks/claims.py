"""A claim: a figure that a benchmark must reach, whether it does or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """A figure that a benchmark must reach: at least ``bound``, or at most when ``at_most``."""

    text: str
    benchmark: str
    bound: float
    figure: Callable[[Row], float | None]  # of a row that is meant, else None
    at_most: bool = False
    pinned: bool = False  # of runs whose threads were bound to cores: a protocol of its own

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def median(spread: Row | None) -> float | None:
    return None if spread is None else float(spread["median"])
