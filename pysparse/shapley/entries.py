"""Shapley values of the entries of embedding tables, over a data set of samples (Tran et al. 2024, Shaver).

A sample reads one row a field; only these entries are its players, so one random order of them costs fields * cols
evaluations of the head, and all other entries of the table add nothing. The data set's game is the mean of the
samples' games. Removals go from all entries present to none. With players "field" a field's row goes as a whole:
fields evaluations an order, one value a row.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pysparse.ops import (
    DeepHead,
    EntryDraw,
    EntrySamples,
    EntryTotals,
    fm_shapley,
    fm_shapley_cuda,
    head_shapley,
    head_shapley_cuda,
)
from pysparse.ops.shapley_entries import Players, check_players
from pysparse.shapley.game import check_budget
from pysparse.shapley.sampling import Progress
from pysparse.shapley.state import read_state, write_state

Array = NDArray[np.float64]
ErrorKind = Literal["population", "permutation"]
_SAVE_SECONDS = 30.0


class Walker(Protocol):
    """A model whose logit can be followed while entries are removed one by one."""

    def __call__(self, samples: EntrySamples, draw: EntryDraw, totals: EntryTotals) -> None:
        """Add the marginals of ``samples``, in the orders that ``draw`` says, to ``totals``."""

    def fingerprint(self) -> str:
        """Return what tells this model from others, for the state of a run."""


@dataclass(frozen=True, slots=True)
class FactorisationMachine:
    """logit = offset + sum over columns of the products of all pairs of a sample's entries (Rendle 2010)."""

    device: int | None = None  # the CPU, or the CUDA device of this number (the same sums, bit for bit)

    def __call__(self, samples: EntrySamples, draw: EntryDraw, totals: EntryTotals) -> None:
        """Add the marginals of ``samples``."""
        if self.device is None:
            fm_shapley(samples, draw, totals)
        else:
            fm_shapley_cuda(samples, draw, totals, self.device)

    def fingerprint(self) -> str:
        """Return the name: all parameters are in the samples."""
        return "fm"


@dataclass(frozen=True, slots=True, eq=False)
class DeepModel:
    """A deep head over the embeddings: DeepFM, DCN-v2 or DCN-Mix (:class:`pysparse.ops.DeepHead`)."""

    head: DeepHead
    device: int | None = None  # the CPU, or the CUDA device of this number (the same to rounding)

    def __call__(self, samples: EntrySamples, draw: EntryDraw, totals: EntryTotals) -> None:
        """Add the marginals of ``samples``."""
        if self.device is None:
            head_shapley(samples, draw, self.head, totals)
        else:
            head_shapley_cuda(samples, draw, self.head, totals, self.device)

    def fingerprint(self) -> str:
        """Return a digest of all parameters; a GPU's bits are not the CPU's, so a run stays where it began."""
        inputs = self.head.mlp.weights[0].shape[1] if self.head.mlp and self.head.mlp.weights else 0
        if self.head.crosses is not None:
            inputs = self.head.crosses.bias.shape[1]
        arguments = self.head.arguments(inputs)
        place = "" if self.device is None else "cuda"
        total = hashlib.sha256(f"{arguments.shape!r}{place}".encode())
        total.update(arguments.widths.tobytes())
        for array in arguments.arrays:
            total.update(array.tobytes())
        return total.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class EntryShapley:
    """Values of all entries of a table, or of its rows: [rows, cols], or [rows, 1] of players "field"."""

    mean: Array  # float64: what the mean log loss grows by without the player, on average over orders
    stderr: Array  # float64, as the run's ``se`` says
    samples: int  # (sample, order or pair of orders) drawn
    evaluations: int  # of the head
    passes: int  # whole passes over the data
    seed: int
    ratio: float  # largest standard error over the spread of the means


@dataclass(frozen=True, slots=True)
class EntryRun:
    """How much and in what pieces; but for ``stop`` none of these changes a bit of what is estimated."""

    budget: int  # evaluations of the head
    seed: int = 0
    antithetic: bool = True  # an order and its reverse: exact for interactions of order 2
    stop: float | None = None  # end after a whole pass with the ratio below this
    batch_size: int = 1 << 16  # samples between two looks at progress and state
    state: str | Path | None = None
    progress: Progress | None = None
    players: Players = "entry"  # "field": a field's row goes as a whole, and its value is one number
    # "population": the error of a mean over independent samples, which counts how samples differ, too (the paper's
    # code). "permutation": of the orders alone, for these samples: each visit draws twice, and an entry's error is
    # the root of the sum over visits of the squared differences of both marginals, over the number of draws.
    se: ErrorKind = "population"

    def __post_init__(self) -> None:
        check_players(self.players)
        if self.se not in ("population", "permutation"):
            raise ValueError(f"se is 'population' or 'permutation', got {self.se!r}")
        if check_budget(self.budget) < 1 or self.batch_size < 1:
            raise ValueError(f"budget and batch_size are at least 1, got {self.budget} and {self.batch_size}")
        if self.stop is not None and not self.stop > 0.0:
            raise ValueError(f"stop is a positive ratio, got {self.stop}")

    @property
    def draws(self) -> int:
        """Draws of a visit to a sample: two where their difference is the error."""
        return 2 if self.se == "permutation" else 1

    def draw(self, first: int, visit: int) -> EntryDraw:
        """Return the draws of the ``visit``-th visit to samples from ``first`` on."""
        return EntryDraw(
            self.seed, first, self.draws * visit, self.antithetic, self.players, twice=self.draws == 2
        )

    def totals(self, samples: EntrySamples) -> EntryTotals:
        """Return totals of nothing yet."""
        rows, cols = samples.table.shape
        return EntryTotals(rows, self.draw(0, 0).per_field(cols))


def cost_of_a_draw(players: int, antithetic: bool) -> int:
    """Return the evaluations of a draw: all present, and after each removal; twice for a pair, but for both ends."""
    return 2 * players if antithetic else players + 1


def players_of_a_sample(samples: EntrySamples, run: EntryRun) -> int:
    """Return the number of entries that a sample reads, or of its rows."""
    return len(samples.base) * run.draw(0, 0).per_field(samples.base.shape[1])


def cost_of_a_visit(samples: EntrySamples, run: EntryRun) -> int:
    """Return the evaluations of one visit to a sample."""
    return run.draws * cost_of_a_draw(players_of_a_sample(samples, run), run.antithetic)


def plan_entries(samples: EntrySamples, run: EntryRun) -> int:
    """Return how many visits the budget allows; ValueError when it does not allow one to each sample."""
    cost, count = cost_of_a_visit(samples, run), len(samples.ids)
    if count == 0:
        raise ValueError("there are no samples")
    if run.budget < cost * count:
        raise ValueError(
            f"one pass over {count} samples of {players_of_a_sample(samples, run)} players takes {cost * count} "
            f"evaluations, the budget is {run.budget}"
        )
    return run.budget // cost


def entry_shapley(walker: Walker, samples: EntrySamples, run: EntryRun) -> EntryShapley:
    """Estimate the values of all entries of the table, or of all rows.

    Visit i goes to sample i mod N for the (i div N)-th time, with the random order of that sample and visit (two
    orders, or pairs, with the standard errors "permutation"). The
    result does not depend on ``batch_size``, threads or interruptions. Memory: the table and 24 bytes an entry.
    Raises ValueError for bad samples (ids, labels, values), a budget below one pass, and a state that is damaged
    or belongs to another run.
    """
    total = plan_entries(samples, run)
    totals = run.totals(samples)
    journal = _Journal(walker, samples, run)
    done = journal.load(totals)
    count = len(samples.ids)
    while done < total:
        visit, first = divmod(done, count)
        if first == 0 and visit > 0 and run.stop is not None and _summary(totals, done, run)[2] < run.stop:
            break
        size = min(run.batch_size, count - first, total - done)
        walker(samples.part(first, first + size), run.draw(first, visit), totals)
        done += size
        journal.save(totals, done, force=done == total)
        if run.progress is not None:
            run.progress("samples", done, total)
    return entry_values(totals, done, samples, run)


def entry_values(totals: EntryTotals, done: int, samples: EntrySamples, run: EntryRun) -> EntryShapley:
    """Return what ``totals`` of the first ``done`` visits of ``run`` say, however these were shared out."""
    mean, stderr, ratio = _summary(totals, done, run)
    evaluations = done * cost_of_a_visit(samples, run)
    passes = done // len(samples.ids) * run.draws
    return EntryShapley(mean, stderr, done * run.draws, evaluations, passes, run.seed, ratio)


def score_shard(walker: Walker, samples: EntrySamples, draw: EntryDraw, rows: tuple[int, int]) -> EntryTotals:
    """Return the totals of samples ``rows[0]`` to ``rows[1]`` of the data set alone, for :meth:`EntryTotals.merge`.

    ``draw.first`` is the number of the data set's first sample in ``samples``. Shards may be made anywhere and in
    any order: merged, they are the totals of one process, bit for bit.
    """
    begin, end = rows
    if not 0 <= begin <= end <= len(samples.ids):
        raise ValueError(f"rows {begin} to {end} are not within 0 to {len(samples.ids)}")
    totals = EntryTotals(len(samples.table), draw.per_field(samples.table.shape[1]))
    walker(samples.part(begin, end), replace(draw, first=draw.first + begin), totals)
    return totals


def _summary(totals: EntryTotals, visits: int, run: EntryRun) -> tuple[Array, Array, float]:
    count = visits * run.draws
    mean, square = totals.mean(count), totals.mean_square(count)
    if (
        run.se == "permutation"
    ):  # a difference has twice the variance of a draw: its square, halved, is one of two
        stderr = np.sqrt(square / count)
    else:
        stderr = np.sqrt(np.maximum(0.0, square - mean**2) / max(1, count - 1))
    spread = float(mean.max() - mean.min())
    worst = float(stderr.max())
    return mean, stderr, worst / spread if spread > 0.0 else (0.0 if worst == 0.0 else math.inf)


class _Journal:
    """The state of a run on disk, if one is wished."""

    def __init__(self, walker: Walker, samples: EntrySamples, run: EntryRun) -> None:
        self._path = run.state
        self._clock: Callable[[], float] = time.monotonic
        self._saved = self._clock()
        self._identity: dict[str, Any] = {}
        if run.state is not None:
            self._identity = identity_of(walker, samples, run)

    def load(self, totals: EntryTotals) -> int:
        """Fill ``totals`` and return how many draws they hold; 0 when there is no state yet."""
        if self._path is None or not Path(self._path).exists():
            return 0
        arrays = read_state(self._path, self._identity)
        done = arrays.pop("done", np.zeros(0))
        if done.shape != (1,) or done[0] < 0:
            raise ValueError(f"{self._path} is damaged: it does not say how many samples it holds")
        totals.load(arrays)
        return int(done[0])

    def save(self, totals: EntryTotals, done: int, force: bool) -> None:
        """Write the state when it is time."""
        if self._path is None or not (force or self._clock() - self._saved >= _SAVE_SECONDS):
            return
        write_state(self._path, self._identity, {**totals.arrays(), "done": np.array([done])})
        self._saved = self._clock()


def identity_of(walker: Walker, samples: EntrySamples, run: EntryRun) -> dict[str, Any]:
    """Return what the bits of an estimation depend on, for its state on disk."""
    return {
        "walker": walker.fingerprint(),
        "samples": _digest(samples),
        "seed": run.seed,
        "antithetic": run.antithetic,
        "players": run.players,
        "se": run.se,
    }


def _digest(samples: EntrySamples) -> str:
    total = hashlib.sha256()
    for array in (samples.table, samples.base, samples.ids, samples.labels, samples.offset):
        if array is not None:
            total.update(f"{array.dtype} {array.shape}".encode())
            total.update(array.data)
    return total.hexdigest()
