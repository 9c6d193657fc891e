"""One step of each algorithm beside the fixed point: (gamma, moments, noise) -> gamma, none raises the objective."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pysparse.bayes.arrays import Matrix, Vector
from pysparse.bayes.hyperpriors import Hyperprior, coordinate_minimum, slope
from pysparse.bayes.problem import Moments, Problem, full_moments

_SHRINK = 0.5  # of the step where it was too long
_EAGER = 10.0  # the first step tried, in safe steps
_MARGIN = 1.01  # above the Lipschitz constant
_SWEEPS = 2000  # of the weighted lasso
_LASSO_TOLERANCE = 1e-12


@dataclass(frozen=True, slots=True)
class Palm:
    """Proximal alternating linearised minimisation (Bolte, Sabach, Teboulle 2014) of F(u, gamma), x = gamma u.

    The u-step is exact, u = z, so the gamma-step is a proximal gradient step on the objective itself. The step is
    1 / (1.01 L) with L = 2 ||A diag(u)||^2 / sigma^2, the norm bounded by the trace and the largest row sum; with
    backtracking ten times that is tried first. Differs from the paper: its splitting and steps are not public.
    """

    problem: Problem
    prior: Hyperprior
    backtracking: bool = True

    def __call__(self, gamma: Vector, found: Moments, noise: float) -> Vector:
        """Return the variances after one gamma-step."""
        descent = found.g - found.z**2
        scaled = found.z[:, None] * self.problem.gram * found.z
        norm = min(float(np.trace(scaled)), float(np.abs(scaled).sum(axis=1).max()))
        if norm == 0.0:
            return gamma.copy()
        safe = noise / (2.0 * _MARGIN * norm)
        if not self.backtracking:
            return self.prior.prox(gamma - safe * descent, safe)
        step = _EAGER * safe
        while step > safe:
            new = self.prior.prox(gamma - step * descent, step)
            move = new - gamma
            after = self.problem.moments(new, noise)
            bound = found.data + found.log_det + float(descent @ move) + float(move @ move) / (2.0 * step)
            if after.data + after.log_det <= bound:
                return new
            step *= _SHRINK
        return self.prior.prox(gamma - safe * descent, safe)


@dataclass(frozen=True, slots=True)
class CoordinateDescent:
    """One sweep of exact minimisations, coordinate by coordinate (Tipping and Faul 2003).

    G = A^T Sigma^-1 A and z follow by rank-one updates, n^2 operations each, and are formed anew each sweep.
    """

    problem: Problem
    prior: Hyperprior

    def __call__(self, gamma: Vector, found: Moments, noise: float) -> Vector:
        """Return the variances after one sweep."""
        gamma = gamma.copy()
        full, z = full_moments(self.problem, gamma, noise)
        for i in range(len(gamma)):
            left = 1.0 - gamma[i] * full[i, i]
            s, q = full[i, i] / left, z[i] / left
            new = coordinate_minimum(self.prior, float(s), float(q), i)
            change = new - gamma[i]
            if change == 0.0:
                continue
            factor = change / (1.0 + change * full[i, i])
            column, entry = full[:, i].copy(), z[i]
            full -= factor * np.outer(column, column)
            z -= factor * entry * column
            gamma[i] = new
        return gamma


@dataclass(frozen=True, slots=True)
class ReweightedL1:
    """Fix the slopes, solve the lasso that they weight by 2 sqrt(g + phi'), set gamma = |x| / sqrt(g + phi')."""

    problem: Problem
    prior: Hyperprior

    def __call__(self, gamma: Vector, found: Moments, noise: float) -> Vector:
        """Return the variances after one weighted lasso."""
        live = gamma > 0
        bound = found.g.copy()
        bound[live] += slope(self.prior, gamma)[live]
        weights = np.where(live, np.sqrt(bound), np.inf)
        x = weighted_lasso(
            self.problem.gram, self.problem.correlation, 2.0 * noise * weights, gamma * found.z
        )
        return np.where(live, np.abs(x) / weights, 0.0)


def weighted_lasso(gram: Matrix, correlation: Vector, weights: Vector, start: Vector) -> Vector:
    """Return argmin of x^T H x - 2 b^T x + sum w_i |x_i| by coordinate descent from ``start``.

    An infinite weight fixes its coefficient at zero.
    """
    x = start.copy()
    chosen = np.flatnonzero(np.isfinite(weights) & (np.diag(gram) > 0))
    rest = correlation - gram @ x
    for _ in range(_SWEEPS):
        largest = 0.0
        for i in chosen:
            pull = rest[i] + gram[i, i] * x[i]
            new = np.sign(pull) * max(abs(pull) - weights[i] / 2.0, 0.0) / gram[i, i]
            if new != x[i]:
                rest -= gram[:, i] * (new - x[i])
                largest = max(largest, abs(new - x[i]) * np.sqrt(gram[i, i]))
                x[i] = new
        if largest <= _LASSO_TOLERANCE * np.sqrt(max(float(x @ correlation), 1e-300)):
            break
    return x
