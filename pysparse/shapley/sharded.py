"""Values of embedding entries with the samples shared out over processes by Ray; the bits are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysparse.calib.extras import optional
from pysparse.ops import EntryDraw, EntrySamples, EntryTotals
from pysparse.shapley.entries import (
    EntryRun,
    EntryShapley,
    Walker,
    entry_values,
    identity_of,
    plan_entries,
    score_shard,
)
from pysparse.shapley.state import read_state, write_state


@dataclass(frozen=True, slots=True)
class Shards:
    """How a pass over the data is shared out."""

    count: int  # pieces of a pass
    in_flight: int = 4  # pieces asked for at once; each brings back 24 bytes an entry
    retries: int = 3  # of a piece whose worker died; -1 for ever
    threads: int = 1  # of a worker, and the CPUs that it reserves

    def __post_init__(self) -> None:
        if min(self.count, self.in_flight, self.threads) < 1 or self.retries < -1:
            raise ValueError(f"count, in_flight and threads are at least 1, retries at least -1, got {self}")


def entry_shapley_on_ray(
    walker: Walker, samples: EntrySamples, run: EntryRun, shards: Shards
) -> EntryShapley:
    """Estimate as :func:`entry_shapley`, bit for bit, with ``shards.count`` pieces of each pass as Ray tasks.

    Starts Ray on this machine unless it runs. A worker that dies is replaced and its piece made again; a piece counts
    once, when its totals are merged. ``run.state`` is written after every piece, so a driver that dies goes on, too;
    it belongs to this number of shards. Raises what :func:`entry_shapley` raises, and ModuleNotFoundError without Ray.
    """
    ray = optional("ray", "ray")
    total, size = plan_entries(samples, run), len(samples.ids)
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    shared = (ray.put(walker), ray.put(samples))
    totals, journal = run.totals(samples), _Journal(walker, samples, run, shards)
    finished, draws = journal.load(totals, -(-total // size)), 0
    while draws < total:
        visit = draws // size
        in_pass = min(size, total - draws)
        pieces = [piece for piece in _pieces(in_pass, shards.count) if not finished[visit, piece[0]]]
        for piece, arrays in _results(ray, shared, run.draw(0, visit), pieces, shards):
            part = run.totals(samples)
            part.load(arrays)
            totals.merge(part)
            finished[visit, piece] = 1
            journal.save(totals, finished)
        draws += in_pass
        if run.progress is not None:
            run.progress("samples", draws, total)
        if run.stop is not None and entry_values(totals, draws, samples, run).ratio < run.stop:
            break
    return entry_values(totals, draws, samples, run)


def _pieces(samples: int, count: int) -> list[tuple[int, int, int]]:
    edges = [samples * piece // count for piece in range(count + 1)]
    return [(piece, edges[piece], edges[piece + 1]) for piece in range(count)]


def _results(
    ray: Any, shared: tuple[Any, Any], draw: EntryDraw, pieces: list[tuple[int, int, int]], shards: Shards
) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """Yield the arrays of each piece as it comes, with a bounded number of them under way."""
    task = ray.remote(_totals_of).options(
        max_retries=shards.retries,
        num_cpus=shards.threads,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(shards.threads)}},
    )
    waiting = list(reversed(pieces))
    running: dict[Any, int] = {}
    while waiting or running:
        while waiting and len(running) < shards.in_flight:
            piece, begin, end = waiting.pop()
            running[task.remote(*shared, draw, (begin, end))] = piece
        (ready,), _ = ray.wait(list(running), num_returns=1)
        yield running.pop(ready), ray.get(ready)


def _totals_of(
    walker: Walker, samples: EntrySamples, draw: EntryDraw, rows: tuple[int, int]
) -> dict[str, NDArray[Any]]:
    """What a worker does."""
    return score_shard(walker, samples, draw, rows).arrays()


class _Journal:
    """Totals on disk, with which pieces of which passes they hold."""

    def __init__(self, walker: Walker, samples: EntrySamples, run: EntryRun, shards: Shards) -> None:
        self._path = None if run.state is None else Path(run.state)
        self._shards = shards.count
        self._identity = (
            {} if run.state is None else {**identity_of(walker, samples, run), "shards": shards.count}
        )

    def load(self, totals: EntryTotals, passes: int) -> NDArray[np.uint8]:
        """Fill ``totals`` and return which pieces they hold, [passes, shards]; none when there is no state yet."""
        finished = np.zeros((passes, self._shards), np.uint8)
        if self._path is None or not self._path.exists():
            return finished
        arrays = read_state(self._path, self._identity)
        found = arrays.pop("finished", finished[:0])
        if found.dtype != np.uint8 or found.shape != finished.shape:
            raise ValueError(f"{self._path} holds passes {found.shape}, this run has {finished.shape}")
        totals.load(arrays)
        return found

    def save(self, totals: EntryTotals, finished: NDArray[np.uint8]) -> None:
        """Write totals and pieces together, if there is a place for them."""
        if self._path is not None:
            write_state(self._path, self._identity, {**totals.arrays(), "finished": finished})
