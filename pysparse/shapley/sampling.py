"""The loop that all sampling estimators share: units in order, in batches, within a budget of evaluations.

A *unit* is the smallest independent sample: a pair of permutations, a coalition and its complement, and so on. Unit
u draws from the random sequence of number u, and enters the mean as the u-th sample; the batch size, threads and
interruptions therefore change no bit as long as the game itself returns the same bits for a coalition in any batch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysparse.shapley.control import Control
from pysparse.shapley.game import Coalitions, Game, Values, check_budget, check_players, ends, evaluate
from pysparse.shapley.state import read_state, write_state
from pysparse.shapley.values import Array, Moments, ShapleyValues, error_ratio

CHECK_UNITS = 16  # between two looks at the error; fixed, so that where a run stops depends on nothing else
_SAVE_SECONDS = 5.0

Progress = Callable[
    [str, int, int], None
]  # (phase, evaluations done, budget), as pysparse.measure.progress gives


@dataclass(frozen=True, slots=True)
class Options:
    """How an estimation runs; none of these changes the values, but for ``stop`` and ``control``."""

    batch_size: int = 256  # coalitions in a call of the game
    stop: float | None = None  # end when the largest standard error is below this share of the values' spread
    control: Control | None = None  # subtracted from the game, its known values added back
    state: str | Path | None = None  # file of the progress; a run that finds one goes on with it
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {self.batch_size}")
        if self.stop is not None and not self.stop > 0.0:
            raise ValueError(f"stop is a positive ratio, got {self.stop}")


DEFAULTS = Options()


class UnitEstimator(ABC):
    """An estimator that averages independent units, each of the same number of evaluations."""

    index = "shapley"  # which index of power a control variate must know

    @abstractmethod
    def cost(self, players: int) -> int:
        """Return the evaluations of a unit, those of nobody and everybody excluded."""

    @abstractmethod
    def draw(self, players: int, seed: int, first: int, count: int) -> NDArray[Any]:
        """Return what makes units ``first`` to ``first + count``, an array with a row for each."""

    @abstractmethod
    def coalitions(self, drawn: NDArray[Any], unit: NDArray[np.intp], place: NDArray[np.intp]) -> Coalitions:
        """Return the coalitions, bool [R, n], at ``place`` (0 .. cost - 1) in the drawn units numbered ``unit``."""

    @abstractmethod
    def samples(self, drawn: NDArray[Any], values: Array, empty: float, full: float) -> Array:
        """Return a sample of all players' values, float64 [U, n], for each unit's ``values``, [U, cost]."""

    def values_of(self, game: Game, drawn: NDArray[Any], batch_size: int) -> Array:
        """Return the game's values, float64 [U, cost], in calls of at most ``batch_size`` coalitions."""
        units, cost = len(drawn), self.cost(game.n_players)
        values = np.empty(units * cost)
        for start in range(0, len(values), batch_size):
            at = np.arange(start, min(start + batch_size, len(values)))
            values[at] = evaluate(game, self.coalitions(drawn, at // cost, at % cost))
        return values.reshape(units, cost)

    def plan(self, players: int, budget: int) -> int:
        """Return the evaluations that ``budget`` allows: whole units, and the two of nobody and everybody.

        Raises ValueError when there is not enough for one unit, and for what is no whole number.
        """
        cost, budget = self.cost(check_players(players)), check_budget(budget)
        if budget < 2 + cost:
            raise ValueError(
                f"{self} of {players} players needs a budget of {2 + cost} evaluations or more, got {budget}"
            )
        return 2 + (budget - 2) // cost * cost if cost else 2

    def estimate(self, game: Game, budget: int, seed: int = 0, options: Options = DEFAULTS) -> ShapleyValues:
        """Estimate within ``budget`` evaluations of ``game``.

        Raises ValueError for a budget below one unit or not a whole number, for values that are not finite, and for a
        state that is damaged or belongs to another estimation.
        """
        self.plan(game.n_players, budget)
        run = _Run(self, game, seed, options)
        return run.go(budget)


class _Run:
    """One estimation in progress."""

    def __init__(self, estimator: UnitEstimator, game: Game, seed: int, options: Options) -> None:
        self.estimator, self.options, self.seed = estimator, options, seed
        self.game, self.offset = _controlled(game, options.control, estimator.index)
        self.original = ends(game)
        self.empty, self.full = ends(self.game) if options.control else self.original
        self.moments = Moments.zero(game.n_players)
        self._saved = time.monotonic()
        if options.state is not None and Path(options.state).exists():
            self._resume(options.state)

    def go(self, budget: int) -> ShapleyValues:
        """Take units until the budget or the wished error is reached."""
        cost = self.estimator.cost(self.game.n_players)
        units = (budget - 2) // cost if cost else 1
        self._tell(budget)
        while self.moments.count < units and not self._precise():
            count = self.moments.count
            to_check = CHECK_UNITS - count % CHECK_UNITS
            tile = min(max(1, self.options.batch_size // max(1, cost)), units - count, to_check)
            drawn = self.estimator.draw(self.game.n_players, self.seed, count, tile)
            values = self.estimator.values_of(self.game, drawn, self.options.batch_size)
            self.moments.add(self.estimator.samples(drawn, values, self.empty, self.full))
            self._tell(budget)
            self._save(time.monotonic() - self._saved >= _SAVE_SECONDS)
        self._save(True)
        return self._result()

    def _precise(self) -> bool:
        stop, count = self.options.stop, self.moments.count
        if stop is None or count == 0 or count % CHECK_UNITS:
            return False
        return error_ratio(self.moments.mean + self.offset, self.moments.stderr()) < stop

    def _evaluations(self) -> int:
        return 2 + self.moments.count * self.estimator.cost(self.game.n_players)

    def _result(self) -> ShapleyValues:
        certain = self.estimator.cost(self.game.n_players) == 0  # a single player: all is known
        stderr = np.zeros(self.game.n_players) if certain else self.moments.stderr()
        return ShapleyValues(
            self.moments.mean + self.offset,
            stderr,
            self._evaluations(),
            self.moments.count,
            self.seed,
            *self.original,
            str(self.estimator),
        )

    def _tell(self, budget: int) -> None:
        if self.options.progress is not None:
            self.options.progress("evaluations", self._evaluations(), budget)

    def _identity(self) -> dict[str, Any]:
        control = self.options.control
        return {
            "estimator": str(self.estimator),
            "players": self.game.n_players,
            "seed": self.seed,
            "control": None if control is None else control.fingerprint(),
        }

    def _save(self, due: bool) -> None:
        if self.options.state is None or not due:
            return
        scalars = {"count": np.array([self.moments.count]), "ends": np.array([self.empty, self.full])}
        arrays = {"mean": self.moments.mean, "squares": self.moments.squares, **scalars}
        write_state(self.options.state, self._identity(), arrays)
        self._saved = time.monotonic()

    def _resume(self, path: str | Path) -> None:
        """Go on after the last unit that was counted; the state says which that was."""
        arrays = read_state(path, self._identity())
        mean, squares, count, saved = (
            _take(arrays, name, path) for name in ("mean", "squares", "count", "ends")
        )
        if not (
            mean.shape == squares.shape == self.moments.mean.shape and count.shape == (1,) and count[0] >= 0
        ):
            raise ValueError(f"{path} is damaged: {len(mean)} means of {self.game.n_players} players")
        if not np.allclose(saved, [self.empty, self.full], rtol=1e-6, atol=1e-12):
            raise ValueError(
                f"{path} belongs to another game: its values of nobody and everybody were {saved.tolist()}, "
                f"this game's are {[self.empty, self.full]}"
            )
        self.empty, self.full = map(float, saved)
        self.moments = Moments(mean.astype(np.float64), squares.astype(np.float64), int(count[0]))


def _take(arrays: dict[str, NDArray[Any]], name: str, path: str | Path) -> NDArray[Any]:
    if name not in arrays or not np.isfinite(arrays[name]).all():
        raise ValueError(f"{path} is damaged: '{name}' is missing or not finite")
    return arrays[name]


@dataclass(frozen=True, slots=True)
class _Difference:
    """A game without its control variate."""

    game: Game
    control: Control

    @property
    def n_players(self) -> int:
        return self.game.n_players

    def __call__(self, coalitions: Coalitions) -> Values:
        return evaluate(self.game, coalitions) - self.control(coalitions)


def _controlled(game: Game, control: Control | None, index: str) -> tuple[Game, Array]:
    if control is None:
        return game, np.zeros(game.n_players)
    if control.n_players != game.n_players:
        raise ValueError(f"the control variate has {control.n_players} players, the game {game.n_players}")
    if index != "shapley" and index not in control.indices:
        raise ValueError(f"the control variate knows its {', '.join(control.indices)} values, not {index}")
    return _Difference(game, control), control.values
