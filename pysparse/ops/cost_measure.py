"""Time every way on two weights: the table that :class:`pysparse.ops.costs.Costs` predicts from."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse import backend
from pysparse.ops.costs import SHAPES, Costs, Table
from pysparse.ops.ways import WAYS, Run, Weight

logger = logging.getLogger("pysparse")

_TINY = (16, 16)  # its time is the cost of a call as such
_LEAST_ROUNDS = 4
_SECONDS = 5.0  # for one dtype; a round that has begun is finished
_CALLS = 200  # on the tiny weight

Place = tuple[str, int, int, int]  # way, index in SHAPES, index of the line, index in the way's tokens


@dataclass(frozen=True, slots=True)
class _Sample:
    place: Place
    run: Run
    x: Tensor


def measure(dtype: torch.dtype) -> Costs:
    """Time every way for values of ``dtype`` with the threads and the instruction set in force.

    Each figure is the fastest of some rounds, since other programs only ever add to a time. Weights are cold, as
    a model's are: a round goes through all of them for one number of tokens after the other, and together they
    are several times as large as the last-level cache.
    """
    start = time.perf_counter()
    with torch.no_grad():
        samples = _samples(dtype)
        fastest = dict.fromkeys((sample.place for sample in samples), float("inf"))
        rounds = 0
        while rounds < _LEAST_ROUNDS or time.perf_counter() - start < _SECONDS:
            for sample in samples:
                begin = time.perf_counter()
                sample.run(sample.x)
                fastest[sample.place] = min(fastest[sample.place], time.perf_counter() - begin)
            rounds += 1
        call = _call_seconds(dtype)
    logger.info("measured %s in %.1f s, %d rounds", dtype, time.perf_counter() - start, rounds)
    return Costs(call, {way: _table(way, fastest) for way in WAYS}, backend.num_threads())


def _samples(dtype: torch.dtype) -> list[_Sample]:
    """Return what a round times, in its order: by tokens, so that every weight is cold when its turn comes."""
    generator = torch.Generator().manual_seed(0)
    longest = max(count for way in WAYS.values() for count in way.tokens)
    inputs = [torch.randn(longest, cols, generator=generator).to(dtype) for _, cols in SHAPES]
    samples = [
        _Sample((name, size, line, index), run, inputs[size][:count])
        for name, size, line, run in _prepared(dtype, generator)
        for index, count in enumerate(WAYS[name].tokens)
    ]
    return sorted(samples, key=lambda sample: len(sample.x))  # stable: ways and weights keep their order


def _prepared(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, int, int, Run]]:
    """Yield every way over every weight that it is measured on, as (way, size, line, what is timed)."""
    drawn = [_draw(shape, dtype, generator) for shape in SHAPES]
    weights: dict[tuple[int, float, bool], Weight] = {}
    for name, way in WAYS.items():
        for line, density in enumerate(way.densities):
            for size in range(len(SHAPES)):
                place = size, density, way.by_pattern
                if place not in weights:
                    weights[place] = Weight.zeroed(*drawn[size], density, way.by_pattern)
                yield name, size, line, way.prepare(weights[place])


def _draw(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return normal values of ``dtype``, and uniform chances of staying."""
    return torch.randn(shape, generator=generator).to(dtype), torch.rand(shape, generator=generator)


def _call_seconds(dtype: torch.dtype) -> dict[str, float]:
    """Return the seconds of a call on a weight so small that nothing else counts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TINY[1], generator=generator).to(dtype)
    drawn = _draw(_TINY, dtype, generator)
    weights = {by_pattern: Weight.zeroed(*drawn, 0.5, by_pattern) for by_pattern in (False, True)}
    return {name: _fastest(way.prepare(weights[way.by_pattern]), x) for name, way in WAYS.items()}


def _fastest(run: Run, x: Tensor) -> float:
    best = float("inf")
    for _ in range(_CALLS):
        start = time.perf_counter()
        run(x)
        best = min(best, time.perf_counter() - start)
    return best


def _table(way: str, fastest: dict[Place, float]) -> Table:
    """Arrange the figures of ``way``; those of our own kernels without what other programs added."""
    lines = len(WAYS[way].densities)
    counts = range(len(WAYS[way].tokens))
    table = [
        [[fastest[way, size, line, index] for index in counts] for line in range(lines)]
        for size in range(len(SHAPES))
    ]
    if way == "torch":  # its times need not grow with the tokens: it changes its method
        return tuple(tuple(map(tuple, half)) for half in table)
    return tuple(cleaned(half) for half in table)


def cleaned(table: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    """Lower each time to the least of more tokens and higher density: less work does not cost more."""
    rows, cols = len(table), len(table[0])
    return tuple(
        tuple(min(table[i][j] for i in range(row, rows) for j in range(col, cols)) for col in range(cols))
        for row in range(rows)
    )
