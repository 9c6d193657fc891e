"""Hyperpriors of the prior variances: phi(gamma) = -2 log p(gamma) + const, and what the algorithms ask of it.

Every member is phi(gamma) = w log(gamma + guard) + lam gamma^r, the generalised Gamma family (Li, Dong, Zeng
2025, "Sparsity via hyperpriors in the empirical Bayes framework", arXiv 2511.06235). A term that is concave is
majorised by its tangent, a convex one is kept, so that the fixed point below never raises the objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pysparse.bayes.arrays import Vector, positive
from pysparse.bayes.proximal import prox_linear, prox_log, prox_power
from pysparse.bayes.scalar import convex_root, global_minimum, grid_prox

_GUARD = 1e-10  # of Jeffreys' log gamma: without it the objective has no lower bound at gamma = 0


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """phi(gamma) = log_weight * log(gamma + guard) + weight * gamma^power."""

    log_weight: float = 0.0
    weight: Vector | float = 0.0
    power: float = 1.0
    guard: float = 0.0


class Hyperprior(Protocol):
    """The choice of a hyperprior."""

    @property
    def terms(self) -> Terms:
        """The numbers of phi."""

    def prox(self, v: Vector, step: float) -> Vector:
        """Return argmin over t >= 0 of (t - v)^2 / 2 + step * phi(t), elementwise."""


def is_concave(prior: Hyperprior) -> bool:
    """Tell whether phi is concave, so that a local minimum has at most M non-zeros."""
    terms = prior.terms
    return terms.log_weight >= 0 and (terms.power <= 1 or not np.any(terms.weight))


def is_increasing(prior: Hyperprior) -> bool:
    """Tell whether phi increases strictly, so that a useless variance goes to zero."""
    terms = prior.terms
    return terms.log_weight >= 0 and bool(terms.log_weight > 0 or np.all(np.asarray(terms.weight) > 0))


def value(prior: Hyperprior, gamma: Vector) -> Vector:
    """Return phi(gamma), elementwise."""
    terms = prior.terms
    found = np.asarray(terms.weight * gamma**terms.power, dtype=np.float64)
    if terms.log_weight:
        with np.errstate(divide="ignore"):
            found = found + terms.log_weight * np.log(gamma + terms.guard)
    return found


def slope(prior: Hyperprior, gamma: Vector) -> Vector:
    """Return phi'(gamma), elementwise; infinite at zero where phi is steep there."""
    terms = prior.terms
    found = np.zeros_like(gamma)
    with np.errstate(divide="ignore"):
        if np.any(terms.weight):
            found = found + terms.weight * terms.power * gamma ** (terms.power - 1.0)
        if terms.log_weight:
            found = found + terms.log_weight / (gamma + terms.guard)
    return found


def majorised_minimum(prior: Hyperprior, moment: Vector, g: Vector, gamma: Vector) -> Vector:
    """Return the minimiser t of g t + moment / t + a majoriser of phi at ``gamma``: one step of the fixed point.

    ``moment`` is x^2. Where phi is concave that is |x| / sqrt(g + phi'(gamma)).
    """
    terms = prior.terms
    live = gamma > 0
    tangent, log_convex, convex = np.zeros_like(gamma), 0.0, np.zeros_like(gamma)
    if terms.log_weight >= 0:
        tangent[live] += terms.log_weight / (gamma[live] + terms.guard)
    else:
        log_convex = -terms.log_weight
    weight = np.broadcast_to(np.asarray(terms.weight, dtype=np.float64), gamma.shape)
    if terms.power <= 1:
        tangent[live] += weight[live] * terms.power * gamma[live] ** (terms.power - 1.0)
    else:
        convex = weight * terms.power
    found = np.zeros_like(gamma)
    found[live] = convex_root(g[live] + tangent[live], log_convex, convex[live], terms.power, moment[live])
    return found


def coordinate_minimum(prior: Hyperprior, s: float, q: float, place: int = 0) -> float:
    """Return the global minimiser of log(1 + t s) - q^2 t / (1 + t s) + phi(t) over t >= 0.

    ``s`` and ``q`` are the leave-one-out quantities of coordinate ``place``. Closed forms for the flat and the
    half-Laplace hyperprior, a search with bisection for the others.
    """
    terms = prior.terms
    weight = float(np.asarray(terms.weight).reshape(-1)[place if np.size(terms.weight) > 1 else 0])
    if s <= 0:
        return 0.0
    if not terms.log_weight and terms.power == 1.0:
        if q * q <= s + weight:
            return 0.0
        if weight == 0:
            return (q * q - s) / (s * s)
        root = (-s + np.sqrt(s * s + 4.0 * weight * q * q)) / (2.0 * weight)
        return float((root - 1.0) / s)
    return global_minimum(terms.log_weight, weight, terms.power, terms.guard, s, q)


@dataclass(frozen=True, slots=True)
class Flat:
    """p = const: classical sparse Bayesian learning (type-II maximum likelihood; Tipping 2001)."""

    @property
    def terms(self) -> Terms:
        """phi = 0."""
        return Terms()

    def prox(self, v: Vector, step: float) -> Vector:
        """Return max(v, 0)."""
        return np.maximum(v, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class HalfLaplace:
    """p ~ exp(-gamma / theta): phi = weight * gamma, weight = 2 / theta, one for all or one a coefficient."""

    weight: Vector | float

    def __post_init__(self) -> None:
        if not np.all(np.isfinite(self.weight)) or np.any(np.asarray(self.weight) < 0):
            raise ValueError(
                f"the weight of a half-Laplace hyperprior is finite and not negative, got {self.weight}"
            )

    @classmethod
    def at_level(cls, kappa: float, column_energy: Vector, noise: float) -> HalfLaplace:
        """Return the hyperprior whose entry test is q^2 > (1 + kappa) s for a column that no other explains.

        Under pure noise q^2 / s is chi-square with one degree of freedom: kappa 2.841, 5.635, 9.828 keep 5, 1,
        0.1 % of useless coefficients. ``column_energy`` is ||a_i||^2 [n], ``noise`` the variance sigma^2.
        """
        return cls(kappa * np.asarray(column_energy, dtype=np.float64) / positive("noise", noise))

    @property
    def terms(self) -> Terms:
        """phi = weight gamma."""
        return Terms(weight=self.weight)

    def prox(self, v: Vector, step: float) -> Vector:
        """Return max(v - step * weight, 0)."""
        return prox_linear(v, step * self.weight)


@dataclass(frozen=True, slots=True)
class HalfGeneralizedGaussian:
    """p ~ exp(-(gamma / theta)^power): phi = weight * gamma^power, weight = 2 / theta^power, power in (0, 2]."""

    power: float
    weight: float

    def __post_init__(self) -> None:
        positive("the weight of a half-generalised Gaussian", self.weight)
        if not 0.0 < self.power <= 2.0:
            raise ValueError(f"the power of a half-generalised Gaussian is in (0, 2], got {self.power}")

    @property
    def terms(self) -> Terms:
        """phi = weight gamma^power."""
        return Terms(weight=self.weight, power=self.power)

    def prox(self, v: Vector, step: float) -> Vector:
        """Return the prox of a power."""
        return prox_power(v, step * self.weight, self.power)


@dataclass(frozen=True, slots=True)
class GeneralizedGamma:
    """p ~ gamma^(r b - 1) exp(-(gamma / theta)^r): r = ``power``, b = ``shape``, theta = ``scale``.

    r b > 1 pushes every variance away from zero: no exact zeros. r b < 1 has a pole at zero, which ``guard``
    takes away: log(gamma + guard).
    """

    power: float
    shape: float
    scale: float
    guard: float = _GUARD

    def __post_init__(self) -> None:
        for name in ("shape", "scale", "guard"):
            positive(f"{name} of a Gamma hyperprior", getattr(self, name))
        if not 0.0 < self.power <= 2.0:
            raise ValueError(f"the power of a generalised Gamma is in (0, 2], got {self.power}")

    @property
    def terms(self) -> Terms:
        """phi = -2 (r b - 1) log gamma + 2 (gamma / theta)^r."""
        log_weight = -2.0 * (self.power * self.shape - 1.0)
        guard = self.guard if log_weight > 0 else 0.0
        return Terms(log_weight, 2.0 / self.scale**self.power, self.power, guard)

    def prox(self, v: Vector, step: float) -> Vector:
        """Return the prox by a search over a grid with bisection."""
        terms = self.terms
        return grid_prox(v, step, terms.log_weight, float(terms.weight), terms.power, terms.guard)


@dataclass(frozen=True, slots=True)
class Gamma:
    """p ~ gamma^(shape - 1) exp(-gamma / scale): the generalised Gamma with power 1."""

    shape: float
    scale: float
    guard: float = _GUARD

    def __post_init__(self) -> None:
        GeneralizedGamma(1.0, self.shape, self.scale, self.guard)

    @property
    def terms(self) -> Terms:
        """phi = -2 (shape - 1) log gamma + 2 gamma / scale."""
        return GeneralizedGamma(1.0, self.shape, self.scale, self.guard).terms

    def prox(self, v: Vector, step: float) -> Vector:
        """Return the prox: the linear term shifts v, the logarithm has two stationary points."""
        terms = self.terms
        shifted = np.asarray(v, dtype=np.float64) - step * terms.weight
        if terms.log_weight >= 0:
            return prox_log(shifted, step * terms.log_weight, terms.guard)
        return (shifted + np.sqrt(shifted**2 - 4.0 * step * terms.log_weight)) / 2.0


@dataclass(frozen=True, slots=True)
class Jeffreys:
    """p ~ 1 / (gamma + guard): phi = 2 log(gamma + guard). Without the guard only local minima mean anything."""

    guard: float = _GUARD

    def __post_init__(self) -> None:
        positive("guard of Jeffreys' hyperprior", self.guard)

    @property
    def terms(self) -> Terms:
        """phi = 2 log(gamma + guard)."""
        return Terms(log_weight=2.0, guard=self.guard)

    def prox(self, v: Vector, step: float) -> Vector:
        """Return the prox of a logarithm."""
        return prox_log(v, 2.0 * step, self.guard)
