"""Sampling estimators, as units of :mod:`pysparse.shapley.sampling`. All are unbiased."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysparse import ops
from pysparse.shapley.game import Coalitions, Game, Orders, WalkingGame, as_real, check_finite
from pysparse.shapley.sampling import UnitEstimator
from pysparse.shapley.values import Array

_SIZES = 2  # purposes of random words beside permutations (0) and coalitions (1)
_LEVELS = 3
_WORDS = 2.0**32


@dataclass(frozen=True, slots=True)
class Permutation(UnitEstimator):
    """Players join in a random order; each is credited with what it adds (Castro et al. 2009, "ApproShapley").

    ``antithetic`` also lets them join in the reverse order: the pair is exact for games of interaction order 2, and
    its error is smaller for nearly all others (Mitchell et al. 2022). Shares out v(everybody) - v(nobody) exactly.
    A :class:`WalkingGame` goes from one coalition to the next by itself.
    """

    antithetic: bool = True

    def cost(self, players: int) -> int:
        """Return n - 1 evaluations, or twice as many."""
        return (players - 1) * (2 if self.antithetic else 1)

    def draw(self, players: int, seed: int, first: int, count: int) -> NDArray[Any]:
        """Return the orders, int32 [count, n]."""
        return ops.draw_permutations(seed, first, count, players)

    def coalitions(self, drawn: NDArray[Any], unit: NDArray[np.intp], place: NDArray[np.intp]) -> Coalitions:
        """Return the first place + 1 players of an order, or of its reverse."""
        players = drawn.shape[1]
        joined = np.argsort(drawn, axis=1)[unit]  # who joins when
        backwards = place >= players - 1
        joined[backwards] = players - 1 - joined[backwards]
        members: Coalitions = joined <= (place % max(1, players - 1))[:, None]
        return members

    def values_of(self, game: Game, drawn: NDArray[Any], batch_size: int) -> Array:
        """Return the values along the orders, by walking where the game can."""
        if not isinstance(game, WalkingGame):
            return UnitEstimator.values_of(self, game, drawn, batch_size)
        along = [_walk(game, drawn)]
        if self.antithetic:
            along.append(_walk(game, np.ascontiguousarray(drawn[:, ::-1])))
        return np.concatenate(along, axis=1)

    def samples(self, drawn: NDArray[Any], values: Array, empty: float, full: float) -> Array:
        """Return what each player added, or the mean of both directions."""
        players = drawn.shape[1]
        forward = _marginals(drawn, values[:, : players - 1], empty, full)
        if not self.antithetic:
            return forward
        backward = _marginals(drawn[:, ::-1], values[:, players - 1 :], empty, full)
        mean: Array = 0.5 * (forward + backward)
        return mean


def _walk(game: WalkingGame, orders: Orders) -> Array:
    values = as_real(game.walk(orders))
    if values.shape != (len(orders), orders.shape[1] + 1):
        raise ValueError(f"the game walked to shape {values.shape} along {orders.shape} orders")
    bad = ~np.isfinite(values)
    if bad.any():
        order, step = divmod(int(bad.argmax()), values.shape[1])
        members = np.zeros((1, orders.shape[1]), dtype=np.bool_)
        members[0, orders[order, :step]] = True
        check_finite(values[order, step : step + 1], members)
    return values[:, 1:-1]


def _marginals(orders: NDArray[Any], inner: Array, empty: float, full: float) -> Array:
    ends = np.broadcast_to([empty, full], (len(orders), 2))
    steps = np.diff(np.concatenate([ends[:, :1], inner, ends[:, 1:]], axis=1), axis=1)
    result = np.empty_like(steps)
    np.put_along_axis(result, orders.astype(np.intp), steps, axis=1)
    return result


@dataclass(frozen=True, slots=True)
class PositionStratified(UnitEstimator):
    """All n rotations of a random order: each player joins once at each position (Castro et al. 2017, stratified).

    The spread between positions is gone from the error; a unit costs n (n - 1) evaluations.
    """

    def cost(self, players: int) -> int:
        """Return n (n - 1) evaluations."""
        return players * (players - 1)

    def draw(self, players: int, seed: int, first: int, count: int) -> NDArray[Any]:
        """Return the orders, int32 [count, n]."""
        return ops.draw_permutations(seed, first, count, players)

    def coalitions(self, drawn: NDArray[Any], unit: NDArray[np.intp], place: NDArray[np.intp]) -> Coalitions:
        """Return the players from position ``place // (n - 1)`` on, around the end, place % (n - 1) + 1 of them."""
        players = drawn.shape[1]
        rotation, size = place // max(1, players - 1), place % max(1, players - 1) + 1
        joined = (np.argsort(drawn, axis=1)[unit] - rotation[:, None]) % players
        members: Coalitions = joined < size[:, None]
        return members

    def samples(self, drawn: NDArray[Any], values: Array, empty: float, full: float) -> Array:
        """Return the mean of what each player added over the rotations."""
        players = drawn.shape[1]
        total = np.zeros((len(drawn), players))
        for rotation, inner in enumerate(np.split(values, players, axis=1)):
            total += _marginals(np.roll(drawn, -rotation, axis=1), inner, empty, full)
        mean: Array = total / players
        return mean


@dataclass(frozen=True, slots=True)
class Owen(UnitEstimator):
    """The multilinear extension (Owen 1972): phi_i is the integral over q of E[v(S_q + i) - v(S_q - i)].

    S_q holds each player with chance q. A unit is a level q, drawn uniformly, one coalition S_q and its complement,
    which is one of level 1 - q (Okhrati and Lipani 2021): each of the two, and each of them with one player more or
    less. A unit costs 2 (n + 1) evaluations. What is shared out is v(everybody) - v(nobody) in expectation only.
    """

    def cost(self, players: int) -> int:
        """Return 2 (n + 1) evaluations."""
        return 2 * (players + 1)

    def draw(self, players: int, seed: int, first: int, count: int) -> NDArray[Any]:
        """Return the coalitions, bool [count, n]."""
        levels = self._levels(seed, first, count)
        members: NDArray[Any] = ops.draw_words(seed, first, count, players) < levels
        return members

    def _levels(self, seed: int, first: int, count: int) -> NDArray[Any]:
        return ops.draw_words(seed, first, count, 1, purpose=_LEVELS)

    def coalitions(self, drawn: NDArray[Any], unit: NDArray[np.intp], place: NDArray[np.intp]) -> Coalitions:
        """Return a coalition or its complement, with one player changed but for the first."""
        players = drawn.shape[1]
        members: Coalitions = drawn[unit] ^ (place > players)[:, None]
        changed = place % (players + 1) - 1
        rows = np.flatnonzero(changed >= 0)
        members[rows, changed[rows]] ^= True
        return members

    def samples(self, drawn: NDArray[Any], values: Array, empty: float, full: float) -> Array:
        """Return v(S + i) - v(S - i), the mean of both coalitions."""
        players = drawn.shape[1]
        sign = np.where(drawn, 1.0, -1.0)
        one, other = values[:, : players + 1], values[:, players + 1 :]
        return 0.5 * sign * ((one[:, :1] - one[:, 1:]) - (other[:, :1] - other[:, 1:]))


@dataclass(frozen=True, slots=True)
class Banzhaf(Owen):
    """The Banzhaf value, another index: what a player adds to a coalition that others join with chance 1/2.

    More robust to noise when data are valued (Wang and Jia 2023); it shares out no given total.
    """

    index = "banzhaf"

    def _levels(self, seed: int, first: int, count: int) -> NDArray[Any]:
        return np.full((count, 1), 1 << 31, dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class KernelSHAP(UnitEstimator):
    """Weighted least squares over coalitions (Lundberg and Lee 2017), with the exact matrix A = E[z z^T].

    That makes it unbiased (Covert and Lee 2021). A unit is a coalition of a size s drawn by 1 / (s (n - s)) and its
    complement: 2 evaluations. Shares out v(everybody) - v(nobody) exactly.
    """

    def cost(self, players: int) -> int:
        """Return 2 evaluations, none for a single player."""
        return 2 if players > 1 else 0

    def draw(self, players: int, seed: int, first: int, count: int) -> NDArray[Any]:
        """Return the coalitions, bool [count, n]."""
        if players == 1:
            return np.ones((count, 1), dtype=np.bool_)
        words = ops.draw_words(seed, first, count, 2, purpose=_SIZES).astype(np.float64)
        uniform = (words[:, 0] + words[:, 1] / _WORDS) / _WORDS
        sizes = np.arange(1, players)
        chance = np.cumsum(1.0 / (sizes * (players - sizes)))
        size = 1 + np.searchsorted(chance[:-1] / chance[-1], uniform, side="right")
        members: NDArray[Any] = (
            np.argsort(ops.draw_permutations(seed, first, count, players), axis=1) < size[:, None]
        )
        return members

    def coalitions(self, drawn: NDArray[Any], unit: NDArray[np.intp], place: NDArray[np.intp]) -> Coalitions:
        """Return the coalition, or its complement."""
        members: Coalitions = drawn[unit] ^ (place == 1)[:, None]
        return members

    def samples(self, drawn: NDArray[Any], values: Array, empty: float, full: float) -> Array:
        """Return A^-1 (b - 1 (1^T A^-1 b - D) / (1^T A^-1 1)) for each pair's b = mean of z (v(z) - v(nobody))."""
        players = drawn.shape[1]
        if players == 1:
            return np.full((len(drawn), 1), full - empty)
        z = drawn.astype(np.float64)
        b = 0.5 * (z * (values[:, :1] - empty) + (1.0 - z) * (values[:, 1:] - empty))
        # A has 1/2 on the diagonal and one number elsewhere: orthogonally to the ones vector its inverse is a
        # factor, and along that vector the total is given.
        scale = 1.0 / (0.5 - pair_chance(players))
        shared: Array = scale * (b - b.mean(axis=1, keepdims=True)) + (full - empty) / players
        return shared


def pair_chance(players: int) -> float:
    """Return the chance that two given players are both in a coalition of Shapley's kernel; n is 2 or more."""
    s = np.arange(1, players, dtype=np.float64)
    both = float((1.0 / (players - s[1:]) * (s[1:] - 1)).sum())
    return both / (players * (players - 1) * float((1.0 / (s * (players - s))).sum()))
