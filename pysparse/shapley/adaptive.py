"""Estimators that look at the values to save evaluations: truncated walks, and the best k players."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysparse import ops
from pysparse.shapley.game import Game, check_budget, check_players, ends, evaluate
from pysparse.shapley.sampling import CHECK_UNITS, DEFAULTS, Options
from pysparse.shapley.state import Journal
from pysparse.shapley.values import Array, Moments, ShapleyValues, error_ratio

Orders = NDArray[np.int32]


def _refuse_control(options: Options, what: str) -> None:
    if options.control is not None:
        raise ValueError(f"{what} takes no control variate")


@dataclass(frozen=True, slots=True)
class Truncated:
    """Walks that end when little is left to gain (Ghorbani and Zou 2019, Data Shapley).

    A player joins while |v(joined) - v(everybody)| >= ``tolerance``; those after it are credited with 0. Biased by
    at most ``tolerance`` in the sum. The evaluations of a walk are not known before.
    """

    tolerance: float

    def __post_init__(self) -> None:
        if not self.tolerance >= 0.0:
            raise ValueError(f"tolerance is 0 or more, got {self.tolerance}")

    def plan(self, players: int, budget: int) -> int:
        """Return the most evaluations that ``budget`` allows; ValueError when it may not be enough for one walk."""
        if check_budget(budget) < 1 + check_players(players):
            raise ValueError(f"{self} of {players} players needs a budget of {1 + players}, got {budget}")
        return budget

    def estimate(self, game: Game, budget: int, seed: int = 0, options: Options = DEFAULTS) -> ShapleyValues:
        """Start walks for as long as a whole one fits into what is left of ``budget``, or until the error is small.

        Raises ValueError for a budget below one walk and a state that is damaged or of another estimation.
        """
        _refuse_control(options, "a truncated estimation")
        self.plan(game.n_players, budget)
        n = game.n_players
        empty, full = known = ends(game)
        if n == 1 or abs(empty - full) < self.tolerance:  # every walk is the same and costs nothing
            mean = np.full(n, full - empty if n == 1 and abs(empty - full) >= self.tolerance else 0.0)
            return ShapleyValues(mean, np.zeros(n), 2, 0, seed, empty, full, str(self))
        journal = Journal(options.state, {"estimator": str(self), "players": n, "seed": seed})
        moments, used, longest = Moments.zero(n), 2, n - 1
        kept = journal.load(_arrays(moments, used), known)
        if kept is not None:
            moments = Moments(kept["mean"], kept["squares"], int(kept["count"][0]))
            used = int(kept["used"][0])
        while budget - used >= longest and not _precise(moments, options):
            to_check = CHECK_UNITS - moments.count % CHECK_UNITS
            count = min(options.batch_size, (budget - used) // longest, to_check)
            orders = ops.draw_permutations(seed, moments.count, count, n)
            samples, evaluations = self._walk(game, orders, empty, full)
            moments.add(samples)
            used += evaluations
            if options.progress is not None:
                options.progress("evaluations", used, budget)
            journal.save(_arrays(moments, used), known)
        journal.save(_arrays(moments, used), known, force=True)
        return ShapleyValues(
            moments.mean, moments.stderr(), used, moments.count, seed, empty, full, str(self)
        )

    def _walk(self, game: Game, orders: Orders, empty: float, full: float) -> tuple[Array, int]:
        """Return what each player added in each walk, and the evaluations; walks go side by side, a player a step."""
        walks, players = orders.shape
        members = np.zeros((walks, players), dtype=np.bool_)
        before, samples, evaluations = np.full(walks, empty), np.zeros((walks, players)), 0
        for step in range(players):
            on = np.flatnonzero(np.abs(before - full) >= self.tolerance)
            if step == players - 1:
                after = np.full(len(on), full)  # known
            else:
                members[on, orders[on, step]] = True
                after = evaluate(game, members[on]) if len(on) else np.empty(0)
                evaluations += len(on)
            samples[on, orders[on, step]] = after - before[on]
            before[on] = after
            if not len(on):
                break
        return samples, evaluations


@dataclass(frozen=True, slots=True, eq=False)
class TopPlayers:
    """The players that seem to be the best."""

    players: NDArray[np.intp]  # [k], best first
    values: ShapleyValues  # of all players; those decided early have larger errors
    counts: NDArray[np.int64]  # [n], samples of each player
    undecided: NDArray[np.intp]  # players whose interval still held the boundary when the budget ended


@dataclass(frozen=True, slots=True)
class TopK:
    """Which k players have the largest values: a bandit (Ghorbani and Zou 2020, Neuron Shapley).

    After each round of ``round_size`` antithetic pairs a player whose interval of ``width`` standard errors lies
    clear of the boundary between the k-th and the next value is decided, and no longer sampled: a pair then
    evaluates only coalitions beside undecided players.
    """

    k: int
    width: float = 3.0
    round_size: int = 16

    def __post_init__(self) -> None:
        if self.k < 1 or self.width <= 0.0 or self.round_size < 2:
            raise ValueError(f"k >= 1, width > 0 and round_size >= 2, got {self}")

    def find(self, game: Game, budget: int, seed: int = 0, options: Options = DEFAULTS) -> TopPlayers:
        """Sample until all players are decided or the next round does not fit into ``budget``.

        Raises ValueError for a budget below one round, for k not below the number of players, and for a state that is
        damaged or of another search.
        """
        _refuse_control(options, "a search for the best players")
        if options.stop is not None:
            raise ValueError("a search for the best players stops when all are decided, by its width")
        n = check_players(game.n_players)
        if self.k >= n:
            raise ValueError(f"k={self.k} is not below the number of players, {n}")
        round_cost = 2 * (n - 1) * self.round_size
        if check_budget(budget) < 2 + round_cost:
            raise ValueError(f"{self} of {n} players needs a budget of {2 + round_cost}, got {budget}")
        empty, full = known = ends(game)
        journal = Journal(options.state, {"estimator": str(self), "players": n, "seed": seed})
        tally, used, first = _Tally.zero(n), 2, 0
        active = np.ones(n, dtype=np.bool_)
        kept = journal.load(
            {**tally.arrays(), "active": active, "used": _one(used), "first": _one(first)}, known
        )
        if kept is not None:
            tally = _Tally(kept["mean"], kept["squares"], kept["count"])
            active, used, first = kept["active"], int(kept["used"][0]), int(kept["first"][0])
        while active.any() and budget - used >= _round_cost(active, self.round_size):
            orders = ops.draw_permutations(seed, first, self.round_size, n)
            first += self.round_size
            samples, evaluations = _pairs_of(game, orders, active, (empty, full), options.batch_size)
            used += evaluations
            tally.add(samples, active)
            active &= ~self._decided(tally)
            if options.progress is not None:
                options.progress("evaluations", used, budget)
            journal.save(
                {**tally.arrays(), "active": active, "used": _one(used), "first": _one(first)},
                known,
                force=True,
            )
        mean, error = tally.mean, tally.stderr()
        best = np.argsort(-mean, kind="stable")[: self.k]
        values = ShapleyValues(mean, error, used, first, seed, empty, full, str(self))
        return TopPlayers(best, values, tally.count, np.flatnonzero(active))

    def _decided(self, tally: _Tally) -> NDArray[np.bool_]:
        ranked = np.sort(tally.mean)[::-1]
        boundary = 0.5 * (ranked[self.k - 1] + ranked[self.k])
        clear: NDArray[np.bool_] = np.abs(tally.mean - boundary) > self.width * tally.stderr()
        return clear


@dataclass(slots=True)
class _Tally:
    """Moments with a count for each player."""

    mean: Array
    squares: Array
    count: NDArray[np.int64]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"mean": self.mean, "squares": self.squares, "count": self.count}

    @classmethod
    def zero(cls, players: int) -> _Tally:
        return cls(np.zeros(players), np.zeros(players), np.zeros(players, dtype=np.int64))

    def add(self, samples: Array, active: NDArray[np.bool_]) -> None:
        for sample in samples:
            self.count += active
            delta = np.where(active, sample - self.mean, 0.0)
            self.mean += delta / np.maximum(1, self.count)
            self.squares += delta * np.where(active, sample - self.mean, 0.0)

    def stderr(self) -> Array:
        return np.sqrt(self.squares / np.maximum(1, self.count - 1) / np.maximum(1, self.count))


def _one(number: int) -> NDArray[np.int64]:
    return np.array([number], np.int64)


def _arrays(moments: Moments, used: int) -> dict[str, NDArray[Any]]:
    return {
        "mean": moments.mean, "squares": moments.squares, "count": _one(moments.count), "used": _one(used)
    }  # fmt: skip


def _precise(moments: Moments, options: Options) -> bool:
    """Tell whether the error is as small as wished; looked at after each CHECK_UNITS walks."""
    if options.stop is None or moments.count == 0 or moments.count % CHECK_UNITS:
        return False
    return error_ratio(moments.mean, moments.stderr()) < options.stop


def _round_cost(active: NDArray[np.bool_], pairs: int) -> int:
    """Return the most that a round can cost: two coalitions beside each active player, in each direction."""
    n = len(active)
    return 2 * pairs * min(n - 1, 2 * int(active.sum()))


def _pairs_of(
    game: Game, orders: Orders, active: NDArray[np.bool_], known: tuple[float, float], batch_size: int
) -> tuple[Array, int]:
    """Return what active players added on average over an order and its reverse, and the evaluations."""
    total, evaluations = np.zeros(orders.shape), 0
    for directed in (orders, orders[:, ::-1]):
        joined = np.argsort(directed, axis=1)
        values = np.full((len(orders), orders.shape[1] + 1), np.nan)
        values[:, 0], values[:, -1] = known
        beside = active[directed]  # positions of active players: coalitions before and after are needed
        needed = np.zeros(values.shape, dtype=np.bool_)
        needed[:, :-1] |= beside
        needed[:, 1:] |= beside
        needed[:, [0, -1]] = False
        row, size = np.nonzero(needed)
        for start in range(0, len(row), batch_size):
            part = slice(start, start + batch_size)
            values[row[part], size[part]] = evaluate(game, joined[row[part]] < size[part][:, None])
        evaluations += len(row)
        steps = np.where(beside, np.diff(values, axis=1), 0.0)
        total += np.take_along_axis(steps, joined, axis=1)
    return 0.5 * total, evaluations
