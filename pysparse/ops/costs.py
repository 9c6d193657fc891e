"""What each way to compute a sparse linear layer costs on this machine, and which one is taken.

The ways differ in what they hold of the weight. "bitmap" (the decode kernel, 16 tokens at a time) and
"unpack" (rows unpacked into the cache, then torch's product) need nothing beside the tiled bitmap; "pairs"
(arithmetic on stored weights only) and "dense" (our kernel for few tokens, torch's product for many) need
a second packing. Which is fastest depends on CPU, instruction set, threads, dtype, density and tokens, so it
is measured: once, in about a second per dtype, on one weight, and kept on disk (``cost_cache``).
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats import BitmapTensor, ColumnPairs, TiledBitmap
from pysparse.ops import linear

logger = logging.getLogger("pysparse")

HELD = ("bitmap", "unpack")  # ways that need no second packing
SECOND = ("pairs", "dense")  # ways that are a second packing
DENSITIES = (0.1, 0.3, 0.5, 0.9)
TOKENS: dict[str, tuple[int, ...]] = {
    "bitmap": (1, 4, 16, 32, 64),
    "unpack": (16, 64, 256),
    "pairs": (32, 64, 256),
    "dense": (1, 4, 16, 32, 64, 256),
}
_SHAPE = (1024, 4096)  # of the weight that is measured: beyond the second-level caches, yet quick
_TINY = (16, 16)  # its time is the cost of a call as such
_ROUNDS = (8, 40)  # at least, at most
_STEADY_ROUNDS = 4  # without a time that improved by more than 2 %: other programs are out of the figures
_TILE = 32  # tokens that the pair kernel rounds up to
_PAIR_ROWS = 256  # of one task of the pair kernel


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds of every way, for one dtype, instruction set and number of threads."""

    call: dict[str, float]  # seconds of a call on a tiny weight
    per_weight: dict[str, tuple[tuple[float, ...], ...]]  # seconds per entry, [DENSITIES][TOKENS[way]]
    threads: int

    def predict(self, way: str, shape: tuple[int, int], density: float, tokens: int) -> float:
        """Return the seconds that ``way`` takes for ``tokens`` rows and a ``shape`` = (out, in) weight."""
        rows, cols = shape
        share = 1.0
        if way == "pairs":
            tokens = -(-tokens // _TILE) * _TILE
            tasks = -(-rows // _PAIR_ROWS) * -(-tokens // 64)
            share = -(-tasks // self.threads) * self.threads / max(1, tasks)  # threads that wait for the last
        unit = _along(
            DENSITIES, [_along(TOKENS[way], line, tokens) for line in self.per_weight[way]], density
        )
        return self.call[way] + unit * rows * cols * share


def _along(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """Interpolate linearly between points; in proportion above the last, but no less than a quarter below."""
    if at >= points[-1]:
        return values[-1] * at / points[-1]
    index = min(max(bisect_right(points, at), 1), len(points) - 1)
    low, high = points[index - 1], points[index]
    slope = (values[index] - values[index - 1]) / (high - low)
    return max(values[index - 1] + slope * (at - low), 0.25 * values[0])


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
    margin: float = 1.05,
) -> Choice:
    """Take the fastest of ``ways``; a second packing must beat the ways without one by the factor ``margin``."""
    seconds = {way: costs.predict(way, shape, density, tokens) for way in ways}
    held = min((way for way in ways if way in HELD), key=seconds.__getitem__)
    best = min(ways, key=seconds.__getitem__)
    if best in SECOND and seconds[held] < margin * seconds[best]:
        return Choice(held, seconds, f"within {margin - 1:.0%} of {best}, without its packing")
    return Choice(best, seconds, "fastest by measured costs")


def second_packing(costs: Costs, shape: tuple[int, int], density: float) -> str:
    """Return the second packing that serves a layer better over 32 to 512 tokens: one is enough memory."""
    counts = (32, 64, 128, 256, 512)

    def regret(way: str) -> float:
        return sum(
            costs.predict(way, shape, density, n) / min(costs.predict(other, shape, density, n) for other in SECOND)
            for n in counts
        )  # fmt: skip

    return min(SECOND, key=regret)


def measure(dtype: torch.dtype) -> Costs:
    """Time every way for values of ``dtype`` with the threads and the instruction set in force."""
    start = time.perf_counter()
    with torch.no_grad():
        call = {
            way: _fastest({way: run})[way] for way, run in _runs(_TINY, 0.5, dtype, one_size=True).items()
        }
        entries = _SHAPE[0] * _SHAPE[1]
        tables: dict[str, list[list[float]]] = {way: [] for way in TOKENS}
        for density in DENSITIES:
            seconds = _fastest(_runs(_SHAPE, density, dtype))
            for way, counts in TOKENS.items():
                tables[way].append([max(0.0, seconds[f"{way} {n}"] - call[way]) / entries for n in counts])
    logger.info("measured the linear kernels for %s in %.1f s", dtype, time.perf_counter() - start)
    return Costs(call, {way: _cleaned(table) for way, table in tables.items()}, backend.num_threads())


def _cleaned(table: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    """Lower each time to the least of more tokens and higher density: less work does not cost more.

    What other programs add to a measured time goes with it.
    """
    rows, cols = len(table), len(table[0])
    return tuple(
        tuple(min(table[i][j] for i in range(row, rows) for j in range(col, cols)) for col in range(cols))
        for row in range(rows)
    )


def _runs(
    shape: tuple[int, int], density: float, dtype: torch.dtype, one_size: bool = False
) -> dict[str, Callable[[], object]]:
    """Return what is timed: every way, at every number of its tokens ("way n") or just at the first."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight *= torch.rand(shape, generator=generator) < density
    tiled = TiledBitmap.from_bitmap(BitmapTensor.from_dense(weight))
    ways: dict[str, Callable[[Tensor], object]] = {
        "bitmap": partial(linear.bitmap_linear_chunks, weight=tiled),
        "unpack": partial(linear.unpacked_linear, weight=tiled),
        "pairs": partial(linear.pairs_linear, weight=ColumnPairs.from_tiled(tiled)),
        "dense": partial(linear.dense_linear, weight=weight),
    }
    x = torch.randn(256, shape[1], generator=generator).to(dtype)
    if one_size:
        return {way: partial(run, x[: TOKENS[way][0]]) for way, run in ways.items()}
    return {f"{way} {n}": partial(run, x[:n]) for way, run in ways.items() for n in TOKENS[way]}


def _fastest(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return each run's fastest time over interleaved rounds: other programs only ever add to it."""
    best = dict.fromkeys(runs, float("inf"))
    steady = 0
    for index in range(_ROUNDS[1]):
        steady += 1
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if seconds < 0.98 * best[name]:
                steady = 0
            best[name] = min(best[name], seconds)
        if steady >= _STEADY_ROUNDS and index + 1 >= _ROUNDS[0]:
            break
    return best
