"""Sparsity by hyperpriors: minimise y^T Sigma^-1 y + log det Sigma + sum phi(gamma_i) over gamma >= 0."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pysparse.bayes.arrays import Flags, Vector, positive
from pysparse.bayes.hyperpriors import (
    HalfLaplace,
    Hyperprior,
    is_concave,
    is_increasing,
    majorised_minimum,
    slope,
    value,
)
from pysparse.bayes.problem import Moments, Problem, least_squares, residual
from pysparse.bayes.steps import CoordinateDescent, Palm, ReweightedL1

Algorithm = Literal["mm", "palm", "coordinate", "reweighted-l1"]
_DEAD = 1e-10  # of the largest variance: below it a variance is zero for the rest of the run
_INVISIBLE = 1e-6
_NOISE_FLOOR = 1e-10  # of ||y||^2 / M


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, how exactly, and by which algorithm."""

    algorithm: Algorithm = "mm"
    max_iterations: int = 500
    tolerance: float = 1e-5  # of the change of gamma, relative
    kkt_tolerance: float = 1e-3
    estimate_noise: bool = False
    refit: bool = False  # least squares on the support, without the shrinkage
    backtracking: bool = True  # PALM only

    def __post_init__(self) -> None:
        if self.algorithm not in ("mm", "palm", "coordinate", "reweighted-l1"):
            raise ValueError(
                f"algorithm is 'mm', 'palm', 'coordinate' or 'reweighted-l1', got {self.algorithm!r}"
            )
        positive("max_iterations", self.max_iterations)
        positive("tolerance", self.tolerance)
        positive("kkt_tolerance", self.kkt_tolerance)


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What was found."""

    x: Vector  # posterior mean, or the refit, [n]
    gamma: Vector  # prior variances, exactly zero off the support, [n]
    variance: Vector  # posterior variances of the coefficients, [n]
    noise: float  # sigma^2
    objective: tuple[float, ...]  # the start's first
    kkt: float  # largest scaled violation of the optimality conditions
    iterations: int
    converged: bool
    seconds: float

    @property
    def support(self) -> Flags:
        """Which coefficients are not zero, bool [n]."""
        return self.gamma > 0


def objective(problem: Problem, prior: Hyperprior, gamma: Vector, noise: float) -> float:
    """Return L(gamma), all constants of the data's part included."""
    found = problem.moments(gamma, noise)
    return found.data + found.log_det + float(value(prior, gamma).sum())


def gradient(problem: Problem, prior: Hyperprior, gamma: Vector, noise: float) -> Vector:
    """Return dL/dgamma = g - z^2 + phi'(gamma), [n]."""
    found = problem.moments(gamma, noise)
    return found.g - found.z**2 + slope(prior, gamma)


def kkt_residual(found: Moments, prior: Hyperprior, gamma: Vector) -> float:
    """Return the largest violation of the optimality conditions, each scaled by its own terms.

    On the support z^2 = g + phi'(gamma); off it z^2 <= g + phi'(0+).
    """
    steep = slope(prior, gamma)
    judged = np.isfinite(steep)  # where phi'(0+) is infinite, zero satisfies its condition
    g, square, steep = found.g[judged], found.z[judged] ** 2, steep[judged]
    off = (square - g - steep) / np.maximum(g + np.abs(steep) + square, 1e-300)
    return float(np.max(np.where(gamma[judged] > 0, np.abs(off), np.maximum(off, 0.0)), initial=0.0))


def dense_start(problem: Problem) -> Vector:
    """Return the same variance for all, by which the prior explains the energy of y; zero for zero columns."""
    energy = problem.column_energy
    mean = float(energy.mean())
    level = problem.energy / problem.samples / mean if mean > 0 else 0.0
    return np.where(energy > 0, max(level, 1e-300), 0.0)


def largest_weight(problem: Problem, noise: float) -> float:
    """Return the half-Laplace weight from which on gamma = 0 satisfies the optimality conditions."""
    entry = (problem.correlation / noise) ** 2 - problem.column_energy / noise
    return max(float(entry.max()), 0.0)


def solve(
    problem: Problem,
    prior: Hyperprior,
    noise: float,
    settings: Settings | None = None,
    start: Vector | None = None,
) -> Solution:
    """Minimise the evidence objective of ``problem`` under ``prior`` and noise variance ``noise`` = sigma^2.

    ``start`` [n] defaults to equal variances, for coordinate descent to zero. With ``estimate_noise`` the noise is
    a start, and updated along. Zero columns keep gamma = 0 under an increasing phi. Raises ValueError for noise
    that is not positive, a start that does not fit, and zero columns under a hyperprior that says nothing of them.
    """
    began = time.perf_counter()
    chosen = Settings() if settings is None else settings
    noise = positive("the noise variance sigma^2", noise)
    gamma = _start(problem, prior, chosen, start)
    step = _step(problem, prior, chosen)
    found = problem.moments(gamma, noise)
    history, converged, done = [_level(found, prior, gamma)], False, 0
    while done < chosen.max_iterations and not converged:
        done += 1
        new = step(gamma, found, noise)
        new[new < _DEAD * new.max(initial=0.0)] = 0.0
        still = float(np.linalg.norm(new - gamma)) <= chosen.tolerance * float(np.linalg.norm(new))
        gamma = new
        if chosen.estimate_noise:
            noise = updated_noise(problem, gamma, problem.moments(gamma, noise), noise)
        found = problem.moments(gamma, noise)
        history.append(_level(found, prior, gamma))
        converged = still and kkt_residual(found, prior, _visible(gamma)) <= chosen.kkt_tolerance
    gamma, found = _without_useless(problem, prior, gamma, found, noise)
    history.append(_level(found, prior, gamma))
    x = np.where(gamma > 0, gamma * found.z, 0.0)
    return Solution(
        least_squares(problem, gamma > 0) if chosen.refit else x, gamma,
        np.maximum(gamma - gamma**2 * found.g, 0.0), noise, tuple(history), kkt_residual(found, prior, gamma),
        done, converged, time.perf_counter() - began,
    )  # fmt: skip


def path(
    problem: Problem, noise: float, count: int = 20, ratio: float = 1e-3, settings: Settings | None = None
) -> Iterator[tuple[float, Solution]]:
    """Yield (weight, solution) for half-Laplace weights from the largest that matters down to ``ratio`` of it.

    By coordinate descent, each solution the next one's start. At the first weight all variances are zero.
    """
    if count < 2 or not 0.0 < ratio < 1.0:
        raise ValueError(f"a path has at least 2 weights and a ratio in (0, 1), got {count} and {ratio}")
    top = largest_weight(problem, positive("the noise variance sigma^2", noise))
    if top == 0.0:
        raise ValueError("no column is worth a variance at this noise: the path is empty")
    given = Settings() if settings is None else settings
    chosen = dataclasses.replace(given, algorithm="coordinate")
    gamma = np.zeros(problem.size)
    for weight in top * np.geomspace(1.0, ratio, count):
        solution = solve(problem, HalfLaplace(float(weight)), noise, chosen, gamma)
        gamma = solution.gamma
        yield float(weight), solution


def _level(found: Moments, prior: Hyperprior, gamma: Vector) -> float:
    return found.data + found.log_det + float(value(prior, gamma).sum())


def _visible(gamma: Vector) -> Vector:
    """Zeros are approached slowly: what is below a millionth of the largest counts as one."""
    return np.where(gamma < _INVISIBLE * gamma.max(initial=0.0), 0.0, gamma)


def _without_useless(
    problem: Problem, prior: Hyperprior, gamma: Vector, found: Moments, noise: float
) -> tuple[Vector, Moments]:
    """Set the variances to zero that are on their way there, unless that raises the objective."""
    falling = found.z**2 < found.g + slope(prior, gamma)
    cleaned = np.where(falling, _visible(gamma), gamma)
    if np.array_equal(cleaned, gamma):
        return gamma, found
    after = problem.moments(cleaned, noise)
    if _level(after, prior, cleaned) <= _level(found, prior, gamma):
        return cleaned, after
    return gamma, found


def _start(problem: Problem, prior: Hyperprior, settings: Settings, start: Vector | None) -> Vector:
    zero = np.flatnonzero(problem.column_energy == 0)
    if len(zero) and not is_increasing(prior):
        raise ValueError(
            f"columns {zero[:5].tolist()} of A are zero and {type(prior).__name__} says nothing about their variance: "
            "drop them, or use an increasing hyperprior"
        )
    if start is None:
        return np.zeros(problem.size) if settings.algorithm == "coordinate" else dense_start(problem)
    gamma = np.array(start, dtype=np.float64)
    if gamma.shape != (problem.size,) or not np.all(np.isfinite(gamma)) or np.any(gamma < 0):
        raise ValueError(
            f"a start is {problem.size} finite variances, none negative, got shape {gamma.shape}"
        )
    return gamma


def _step(
    problem: Problem, prior: Hyperprior, settings: Settings
) -> Callable[[Vector, Moments, float], Vector]:
    if settings.algorithm == "palm":
        return Palm(problem, prior, settings.backtracking)
    if settings.algorithm == "coordinate":
        return CoordinateDescent(problem, prior)
    if settings.algorithm == "reweighted-l1":
        if not is_concave(prior):
            raise ValueError(f"re-weighted l1 needs a concave phi, that of {prior} is not")
        return ReweightedL1(problem, prior)
    return lambda gamma, found, noise: majorised_minimum(prior, (gamma * found.z) ** 2, found.g, gamma)


def updated_noise(problem: Problem, gamma: Vector, found: Moments, noise: float) -> float:
    """One EM step of sigma^2; it means something when M exceeds the support."""
    left = residual(problem, gamma * found.z)
    estimate = (left + noise * float((gamma * found.g).sum())) / problem.samples
    return max(estimate, _NOISE_FLOOR * problem.energy / problem.samples, 1e-300)
