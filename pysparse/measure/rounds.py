"""Interleaved rounds: what makes two timings on a shared machine comparable."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def percentile(samples: Sequence[float], q: float) -> float:
    """Return the ``q``-th percentile (0..100) of ``samples``, linear between neighbours."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median with the 10th and 90th percentile, and how many samples they stand on."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise ``samples``."""
        return cls(statistics.median(samples), percentile(samples, 10), percentile(samples, 90), len(samples))


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Run the block with ``count`` torch threads (None: as they are) and yield the number in force."""
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise ValueError(f"threads={count} must be at least 1")
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def queue_wait_seconds() -> float:
    """Return how long this process's threads have waited for a core so far (Linux; 0.0 elsewhere).

    The wait during a timing tells what the load average cannot: whether *these* threads were held up.
    """
    total = 0
    for entry in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(entry.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that has just ended
            continue
    return total / 1e9


@dataclass(frozen=True, slots=True)
class RoundRobin(Generic[T]):
    """Results of interleaved rounds, by engine name, in round order."""

    results: dict[str, list[T]]
    waits: dict[str, list[float]]  # per round: seconds that threads waited for a core


def round_robin(
    engines: Mapping[str, Callable[[], T]],
    rounds: int,
    warmup: int = 1,
    on_round: Callable[[int, int], None] | None = None,
) -> RoundRobin[T]:
    """Call each engine once a round: A B C, B C A, C A B, ...; the first ``warmup`` rounds are thrown away.

    Turning the order each round keeps one engine from always running on another's warm or throttled core.
    """
    if not engines:
        raise ValueError("no engine to run")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds} must be at least 1 and warmup={warmup} at least 0")
    names = list(engines)
    results: dict[str, list[T]] = {name: [] for name in names}
    waits: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            waited = queue_wait_seconds()
            result = engines[name]()
            if index >= warmup:
                results[name].append(result)
                waits[name].append(queue_wait_seconds() - waited)
        if on_round is not None:
            on_round(index + 1, warmup + rounds)
    return RoundRobin(results, waits)


def ratios(baseline: Sequence[float], candidate: Sequence[float]) -> Spread:
    """Return the spread of ``baseline[i] / candidate[i]``: over 1 means the candidate is faster.

    Per-round ratios cancel what slows both of a round's neighbours; a ratio of medians does not.
    """
    return Spread.of([b / c for b, c in zip(baseline, candidate, strict=True)])
