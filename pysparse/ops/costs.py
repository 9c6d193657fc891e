"""What each way to compute a linear layer costs on this machine, and which one is taken.

Which way is fastest depends on CPU, instruction set, threads, dtype, density, shape and tokens, so it is
measured once, in some seconds per dtype (``cost_measure``), and kept on disk (``cost_cache``). Decisions are
functions of that table alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from pysparse.ops.ways import SECOND, WAYS, Way

SHAPES = (
    (1024, 768),
    (2048, 4096),
)  # (out, in) of the measured weights: a small layer, and one beyond the caches
Table = tuple[
    tuple[tuple[float, ...], ...], ...
]  # seconds by [SHAPES][densities of the way][tokens of the way]


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds of every way, for one dtype, instruction set and number of threads."""

    call: dict[str, float]  # seconds of a call on a tiny weight
    seconds: dict[str, Table]
    threads: int

    def predict(self, way: str, shape: tuple[int, int], density: float, tokens: int) -> float:
        """Return the seconds that ``way`` takes for ``tokens`` rows and a ``shape`` = (out, in) weight.

        Between and beyond the two measured weights time is a straight line in the number of entries; below the
        smaller one it falls to that of a call as such. Infinity where the way does not take so many tokens.
        """
        found = WAYS[way]
        if not found.takes(tokens):
            return float("inf")
        small, large = (self._measured(way, index, density, tokens) for index in range(2))
        sizes = [rows * cols for rows, cols in SHAPES]
        size = shape[0] * shape[1]
        call = min(self.call[way], small)
        if size <= sizes[0]:
            seconds = call + (small - call) * size / sizes[0]
        else:
            slope = max(0.0, large - small) / (sizes[1] - sizes[0])
            seconds = small + slope * (size - sizes[0])
        return seconds * _waiting(found, shape[0], tokens, self.threads)

    def _measured(self, way: str, index: int, density: float, tokens: int) -> float:
        found, lines = WAYS[way], self.seconds[way][index]
        at = [_at_tokens(found, line, tokens) for line in lines]
        seconds = along(found.densities, at, density)
        return seconds / _waiting(found, SHAPES[index][0], tokens, self.threads)


def _waiting(way: Way, rows: int, tokens: int, threads: int) -> float:
    """Return by what factor the time grows because some threads have no task left while the last ones run."""
    if way.task is None:
        return 1.0
    tasks = -(-rows // way.task[0]) * -(-tokens // way.task[1])
    return -(-tasks // threads) * threads / max(1, tasks)


def _at_tokens(way: Way, line: Sequence[float], tokens: int) -> float:
    """Return the seconds for ``tokens`` from a line of measured ones: whole steps, and a part of the next."""
    rest = tokens % way.step
    whole = tokens - rest
    if way.step == 1 or tokens <= way.step:
        return along(way.tokens, line, -(-tokens // way.grain) * way.grain)
    first = way.tokens.index(way.step)  # from here on whole steps are measured
    points, values = way.tokens[first:], line[first:]
    base = along(points, values, whole)
    if rest == 0:
        return base
    part = along(way.tokens, line, -(-rest // way.grain) * way.grain) / values[0]
    return base + part * (along(points, values, whole + way.step) - base)


def along(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """Interpolate linearly; the first value below the points, above them the line of their upper half."""
    if at <= points[0] or len(points) == 1:
        return values[0]
    index = min(bisect_right(points, at), len(points) - 1)
    other = index - 1 if at <= points[-1] else min(len(points) // 2, index - 1)
    slope = (values[index] - values[other]) / (points[index] - points[other])
    return values[index] + slope * (at - points[index])


@dataclass(frozen=True, slots=True)
class Choice:
    """The way that a layer computes a number of tokens, and what the others were expected to take."""

    way: str
    seconds: dict[str, float]  # predicted, by way; empty where nothing was measured
    reason: str

    def __str__(self) -> str:
        times = ", ".join(f"{way} {1e3 * seconds:.3g} ms" for way, seconds in self.seconds.items())
        return f"{self.way}: {self.reason}" + (f" ({times})" if times else "")


def choose(
    costs: Costs,
    shape: tuple[int, int],
    density: float,
    tokens: int,
    ways: Sequence[str],
    margin: float,
) -> Choice:
    """Take the fastest of ``ways``; one that needs a second packing must win by the factor ``margin``.

    ``ways`` holds at least one that reads the packing which the layer has anyway.
    """
    seconds = {way: costs.predict(way, shape, density, tokens) for way in ways}
    held = min((way for way in ways if WAYS[way].packing not in SECOND), key=seconds.__getitem__)
    best = min(ways, key=seconds.__getitem__)
    if best != held and seconds[held] < margin * seconds[best]:
        return Choice(held, seconds, f"within {margin - 1:.0%} of {best}, without its packing")
    return Choice(best, seconds, "fastest by measured costs")
