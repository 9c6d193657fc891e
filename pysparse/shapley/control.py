"""Control variates: games with known values that resemble the one to be estimated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pysparse import ops
from pysparse.shapley.game import Coalitions, Game, Values, evaluate

Array = NDArray[np.float64]
_PURPOSE = 0x5172  # of the random words of a fit: not those of any estimator


class Control(Protocol):
    """A game whose values are known: v - control is estimated, and the control's values are added back."""

    @property
    def n_players(self) -> int:
        """How many players there are."""

    @property
    def values(self) -> Array:
        """The exact values of all players, float64 [n_players]."""

    @property
    def indices(self) -> tuple[str, ...]:
        """The indices of power that ``values`` are: "shapley", "banzhaf"."""

    def __call__(self, coalitions: Coalitions) -> Values:
        """Return the values of ``coalitions``, float64 [B]."""

    def fingerprint(self) -> str:
        """Return what tells this control variate from others, for the state of a run."""


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """v(z) = constant + sum_i linear_i z_i + sum_{i<j} pairs_ij z_i z_j.

    Shapley and Banzhaf values coincide: linear_i + 1/2 sum_j pairs_ij.
    """

    constant: float
    linear: Array  # [n]
    pairs: Array  # [n, n], symmetric, zero diagonal

    def __post_init__(self) -> None:
        n = len(self.linear)
        if (
            self.pairs.shape != (n, n)
            or not np.array_equal(self.pairs, self.pairs.T)
            or self.pairs.diagonal().any()
        ):
            raise ValueError(f"pairs is a symmetric matrix [{n}, {n}] with a zero diagonal")

    @property
    def n_players(self) -> int:
        """How many players there are."""
        return len(self.linear)

    @property
    def values(self) -> Array:
        """The exact values, float64 [n]."""
        known: Array = self.linear + 0.5 * self.pairs.sum(axis=1)
        return known

    @property
    def indices(self) -> tuple[str, ...]:
        """Both indices: they are the same for games of interaction order 2."""
        return ("shapley", "banzhaf")

    def __call__(self, coalitions: Coalitions) -> Values:
        """Return the values of ``coalitions``, float64 [B]."""
        z = coalitions.astype(np.float64)
        result: Values = self.constant + z @ self.linear + 0.5 * ((z @ self.pairs) * z).sum(axis=1)
        return result

    def fingerprint(self) -> str:
        """Return a digest of the coefficients."""
        parts = (np.float64(self.constant).tobytes(), self.linear.tobytes(), self.pairs.tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()


def fit_quadratic(
    game: Game, budget: int, seed: int = 0, batch_size: int = 256, ridge: float = 1e-6
) -> Quadratic:
    """Fit a :class:`Quadratic` to ``budget`` random coalitions by ridge regression; players join with chance 1/2.

    The fit uses other coalitions than any estimator, so that an estimate with it stays unbiased. ``budget`` is to be
    added to the evaluations of the estimate. Raises ValueError for a budget below the n (n + 1) / 2 + 1 coefficients.
    """
    n = game.n_players
    upper = np.triu_indices(n, 1)
    unknowns = 1 + n + len(upper[0])
    if budget < unknowns:
        raise ValueError(f"{unknowns} coefficients of {n} players need {unknowns} evaluations, got {budget}")
    z = ops.draw_words(seed, 0, budget, n, purpose=_PURPOSE) >> 31 != 0
    values = np.concatenate([evaluate(game, z[at : at + batch_size]) for at in range(0, budget, batch_size)])
    wide = z.astype(np.float64)
    design = np.concatenate([np.ones((budget, 1)), wide, wide[:, upper[0]] * wide[:, upper[1]]], axis=1)
    normal = design.T @ design
    normal[np.diag_indices(unknowns)] += ridge * budget
    solution = np.linalg.solve(normal, design.T @ values)
    pairs = np.zeros((n, n))
    pairs[upper] = solution[1 + n :]
    return Quadratic(float(solution[0]), solution[1 : 1 + n].copy(), pairs + pairs.T)
