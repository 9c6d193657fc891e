"""What a call on a CUDA device is expected to take: lines fitted to the report of a GPU run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from pysparse import backend

# Bytes per entry at density p. Delta: 2.5 a weight, and fillers over gaps of more than 16 columns, whose share is
# that of random zeros. Fragment: 2 a weight, 1/8 of mask, 1/64 of alignment and place. Pair: 1 of values, 1/8 of
# places.
_BYTES: dict[str, Callable[[float], float]] = {
    "cublas": lambda p: 2.0,
    "delta": lambda p: 2.5 * p / (1 - (1 - p) ** 16) if p else 0.0,
    "fragment": lambda p: 2 * p + 0.141,
    "pair": lambda p: 1.125,
}


def bytes_per_entry(kernel: str, density: float) -> float:
    """Return the bytes that ``kernel`` reads per entry of a weight; "cublas" is the dense one in 16 bits."""
    return _BYTES[kernel](density)


@dataclass(frozen=True, slots=True)
class DeviceCosts:
    """Microseconds of a call = c0 + c1 * megabytes + c2 * million entries, for each kernel and number of tokens."""

    gpu: str  # where they were measured
    lines: dict[str, dict[int, tuple[float, float, float]]]  # kernel -> tokens -> (c0, c1, c2)

    def microseconds(self, kernel: str, tokens: int, shape: tuple[int, int], density: float) -> float:
        """Predict one call; numbers of tokens between measured ones cost what the next one costs.

        Infinity where the kernel was measured for fewer tokens only.
        """
        lines = self.lines[kernel]
        measured = min((count for count in lines if count >= tokens), default=0)
        if not measured:
            return float("inf")
        call, megabyte, mega = lines[measured]
        entries = shape[0] * shape[1] / 1e6
        return call + entries * (megabyte * bytes_per_entry(kernel, density) + mega)

    def pays_to(self, kernel: str, shape: tuple[int, int], density: float, gain: float) -> int:
        """Return up to how many tokens ``kernel`` is expected to be ``gain`` times as fast as the dense product."""
        last = 0
        for tokens in sorted(self.lines["cublas"]):
            dense = self.microseconds("cublas", tokens, shape, density)
            if self.microseconds(kernel, tokens, shape, density) * gain > dense:
                break
            last = tokens
        return last


@cache
def device_costs() -> DeviceCosts:
    """Return the costs that the committed report of a GPU run holds."""
    report = json.loads(backend.CUDA_REPORT.read_text())
    lines = {
        kernel: {int(tokens): (line[0], line[1], line[2]) for tokens, line in by_tokens.items()}
        for kernel, by_tokens in report["costs"].items()
    }
    return DeviceCosts(report["gpu"], lines)
