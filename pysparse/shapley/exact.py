"""Exact values by enumeration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pysparse.shapley.game import Coalitions, Game, check_budget, check_players, evaluate
from pysparse.shapley.sampling import DEFAULTS, Options
from pysparse.shapley.state import Journal
from pysparse.shapley.values import Array, ShapleyValues

MAX_EXACT = 24
_BLOCK = 1 << 12  # coalitions that are summed at once, whatever the batch size


@dataclass(frozen=True, slots=True)
class Exact:
    """All 2^n coalitions, each once, in Gray code order: neighbours differ by one player.

    ``index`` is "shapley" (weights s! (n - s - 1)! / n!) or "banzhaf" (1 / 2^(n - 1)).
    """

    index: str = "shapley"

    def __post_init__(self) -> None:
        if self.index not in ("shapley", "banzhaf"):
            raise ValueError(f"index is 'shapley' or 'banzhaf', got {self.index!r}")

    def plan(self, players: int, budget: int) -> int:
        """Return 2^n; ValueError when that is beyond ``budget`` or n beyond 24."""
        if check_players(players) > MAX_EXACT:
            raise ValueError(
                f"2^{players} coalitions cannot be enumerated; exact values take {MAX_EXACT} players"
            )
        if check_budget(budget) < 1 << players:
            raise ValueError(
                f"exact values of {players} players need {1 << players} evaluations, got {budget}"
            )
        return 1 << players

    def estimate(self, game: Game, budget: int, seed: int = 0, options: Options = DEFAULTS) -> ShapleyValues:
        """Return exact values; ``budget`` must allow 2^n evaluations. ``seed`` plays no part.

        With ``options.state`` an interrupted enumeration goes on; it evaluates nobody once more, to see that the game
        is the same. ``options.control`` is refused: there is no error to reduce.
        """
        if options.control is not None:
            raise ValueError("exact values need no control variate")
        players, total = game.n_players, self.plan(game.n_players, budget)
        values, done = np.zeros(total), np.zeros(1, np.int64)
        journal = Journal(options.state, {"estimator": str(self), "players": players})
        nobody = evaluate(game, gray_coalitions(0, 1, players))[0]
        kept = journal.load({"values": values, "done": done}, [nobody])
        if kept is not None:
            values, done = kept["values"], kept["done"]
        if not 0 <= int(done[0]) <= total:
            raise ValueError(f"{options.state} is damaged: {int(done[0])} of {total} values")
        values[0], first = nobody, max(1, int(done[0]))
        for start in range(first, total, options.batch_size):
            stop = min(start + options.batch_size, total)
            values[start:stop] = evaluate(game, gray_coalitions(start, stop, players))
            if options.progress is not None:
                options.progress("evaluations", stop, total)
            journal.save({"values": values, "done": np.array([stop])}, [nobody], force=stop == total)
        full = int(np.flatnonzero(_gray(0, total) == total - 1)[0])
        return ShapleyValues(
            self._weigh(values, players), np.zeros(players), total, 0, seed, float(values[0]), float(values[full]),
            str(self),
        )  # fmt: skip

    def _weigh(self, values: Array, players: int) -> Array:
        """Return sum over S of v(S) w(|S| - 1) for members and -v(S) w(|S|) for the others."""
        weight = self._weights(players)
        joined, left = np.append(0.0, weight), np.append(weight, 0.0)  # by the size of S
        result = np.zeros(players)
        for start in range(0, len(values), _BLOCK):
            members = gray_coalitions(start, min(start + _BLOCK, len(values)), players)
            size, value = members.sum(axis=1), values[start : start + _BLOCK]
            inside, outside = value * joined[size], value * left[size]
            result += np.where(members, inside[:, None], -outside[:, None]).sum(axis=0)
        return result

    def _weights(self, players: int) -> Array:
        """Return w(s), the weight of a coalition of s others."""
        if self.index == "banzhaf":
            return np.full(players, 0.5 ** (players - 1))
        weight = np.empty(players)
        weight[0] = 1.0 / players
        for s in range(1, players):
            weight[s] = weight[s - 1] * s / (players - s)
        return weight


def _gray(start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    numbers = np.arange(start, stop, dtype=np.int64)
    return numbers ^ (numbers >> 1)


def gray_coalitions(start: int, stop: int, players: int) -> Coalitions:
    """Return the coalitions of numbers ``start`` to ``stop`` in Gray code order, bool [stop - start, players]."""
    members: Coalitions = (_gray(start, stop)[:, None] >> np.arange(players) & 1).astype(np.bool_)
    return members
