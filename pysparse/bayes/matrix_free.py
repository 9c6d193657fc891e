"""The fixed point at image size: conjugate gradients instead of factors, random draws instead of diagonals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pysparse.bayes.arrays import positive
from pysparse.bayes.hyperpriors import Hyperprior, is_increasing, majorised_minimum, slope
from pysparse.bayes.maps import LinearMap, OperatorMap, check_adjoint

_DEAD = 1e-10
_SURE = 0.5  # posterior over prior variance: below it the data rule
_INVISIBLE = 1e-2  # of the largest variance: one below it that still falls ...
_FALLING = 0.95  # ... by this factor a step or faster is a zero at the end


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """How exactly."""

    iterations: int = 25
    tolerance: float = 1e-3  # of the change of gamma, relative
    probes: int = 8  # draws of the model's own y, from the same random numbers in all iterations
    cg_tolerance: float = 1e-3  # of the residual, relative
    cg_iterations: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "tolerance", "probes", "cg_tolerance", "cg_iterations"):
            positive(name, getattr(self, name))


@dataclass(frozen=True, slots=True, eq=False)
class OperatorSolution:
    """What was found; arrays of the kind that came in."""

    x: Any  # posterior mean, [n]
    gamma: Any  # prior variances, [n]
    variance: Any  # posterior variances, estimated by the draws, [n]
    g: Any  # the estimate of diag(A^T Sigma^-1 A), [n]
    changes: tuple[float, ...]  # of gamma, relative, an iteration each
    data: tuple[float, ...]  # y^T Sigma^-1 y at each iteration
    cg_steps: int
    converged: bool
    seconds: float

    @property
    def support(self) -> Any:
        """Which coefficients are not zero, bool [n]."""
        return self.gamma > 0


def conjugate_gradients(
    product: Callable[[Any], Any],
    divide: Callable[[Any], Any],
    right: Any,
    start: Any,
    tolerance: float,
    limit: int,
) -> tuple[Any, int]:
    """Solve ``product(u) = right`` for every row of [k, M] at once; return the solutions and the steps made.

    ``divide`` is the preconditioner. Ends when all residuals are below ``tolerance`` of their right-hand sides.
    """
    u = start.copy()
    left = right - product(u)
    wished = tolerance**2 * (right**2).sum(axis=1)
    scaled = divide(left)
    direction, energy = scaled.copy(), (left * scaled).sum(axis=1)
    for step in range(limit):
        if bool(((left**2).sum(axis=1) <= wished).all()):
            return u, step
        image = product(direction)
        length = energy / np.maximum((direction * image).sum(axis=1), 1e-300)
        u += length[:, None] * direction
        left -= length[:, None] * image
        scaled = divide(left)
        fresh = (left * scaled).sum(axis=1)
        direction = scaled + (fresh / np.maximum(energy, 1e-300))[:, None] * direction
        energy = fresh
    return u, limit


def solve_operator(
    operator: Any,
    target: Any,
    prior: Hyperprior,
    noise: float,
    settings: OperatorSettings | None = None,
    callback: Callable[[int, Any], None] | None = None,
) -> OperatorSolution:
    """Run the fixed point gamma <- |x| / sqrt(g + phi') without a matrix.

    ``operator`` is a :class:`pysparse.bayes.maps.LinearMap` or a scipy LinearOperator [M, n], ``target`` y [M],
    ``noise`` sigma^2. (sigma^2 I + A Gamma A^T) u = y by conjugate gradients. g is the mean square of
    A^T Sigma^-1 y_k over draws y_k = A Gamma^(1/2) xi_k + sigma eta_k of the model: their covariance is
    A^T Sigma^-1 A, so the estimate is positive and off by sqrt(2 / probes), relatively, whatever the columns
    share; Hutchinson's product of signs may turn negative there, which lets a variance explode. Where the data
    rule, gamma g = 1 - (posterior variance) / gamma, the variance from the same draws, is closer still.
    ``callback(i, x)`` sees every posterior mean.
    Raises ValueError when the adjoint is wrong (a dot test), y is not finite or does not fit, sigma^2 is not
    positive, or a column is zero under a hyperprior that says nothing of it.
    """
    began, chosen = time.perf_counter(), OperatorSettings() if settings is None else settings
    state = _State(
        operator if hasattr(operator, "column_energy") else OperatorMap(operator),
        target,
        prior,
        noise,
        chosen,
    )
    changes: list[float] = []
    data: list[float] = []
    converged = False
    while len(changes) < chosen.iterations and not converged:
        x = state.refresh()
        data.append(float((state.target * state.u[0]).sum()))
        if callback is not None:
            callback(len(changes), x)
        changes.append(state.move(x))
        converged = changes[-1] <= chosen.tolerance
    x = state.refresh()
    gamma = state.cleaned()
    return OperatorSolution(
        x * (gamma > 0), gamma, state.variance * (gamma > 0), state.g, tuple(changes), tuple(data),
        state.steps, converged, time.perf_counter() - began,
    )  # fmt: skip


class _State:
    """The variances and the solutions of the linear systems, which the next iteration starts from."""

    def __init__(
        self, linear: LinearMap, target: Any, prior: Hyperprior, noise: float, settings: OperatorSettings
    ) -> None:
        self.linear, self.prior, self.settings = linear, prior, settings
        self.noise = positive("the noise variance sigma^2", noise)
        if tuple(target.shape) != (linear.samples,):
            raise ValueError(f"y has shape {tuple(target.shape)}, the operator gives {(linear.samples,)}")
        if not bool(np.isfinite(target).all()):
            raise ValueError(
                f"{int((~np.isfinite(target)).sum())} of {linear.samples} entries of y are NaN or infinite"
            )
        xp = np if isinstance(target, np.ndarray) else __import__(type(target).__module__.split(".")[0])
        check_adjoint(linear, xp)
        self.target = target
        self.limit = linear.column_energy() / self.noise  # the largest that g can be
        zero = int((self.limit == 0).sum())
        if zero and not is_increasing(prior):
            raise ValueError(
                f"{zero} columns of A are zero and {type(prior).__name__} says nothing of their variance"
            )
        draw = np.random.default_rng(settings.seed)
        self.xi = xp.asarray(draw.standard_normal((settings.probes, linear.size)))
        self.eta = xp.asarray(draw.standard_normal((settings.probes, linear.samples)) * self.noise**0.5)
        self.u = xp.zeros((settings.probes + 1, linear.samples))
        level = linear.first_level(target, self.noise)
        self.gamma = xp.where(self.limit > 0, level, 0.0)
        self.g, self.z, self.steps = self.limit, self.limit * 0.0, 0
        self.variance = self.gamma

    def refresh(self) -> Any:
        """Solve for the present variances; set g and z, return the posterior mean."""
        level = float(self.gamma.mean())
        draws = self.linear.forward(np.sqrt(self.gamma) * self.xi) + self.eta
        right = np.concatenate([self.target[None], draws])
        self.u, steps = conjugate_gradients(
            lambda u: self.noise * u + self.linear.forward(self.gamma * self.linear.adjoint(u)),
            lambda u: self.linear.divide(u, level, self.noise),
            right, self.u, self.settings.cg_tolerance, self.settings.cg_iterations,
        )  # fmt: skip
        self.steps += steps
        back = self.linear.adjoint(self.u)
        self.z = back[0]
        drawn = (
            np.sqrt(self.gamma) * self.xi
        )  # the draws' own coefficients; what is left of them after y_k is seen
        self.variance = ((drawn - self.gamma * back[1:]) ** 2).mean(axis=0)  # scatters as the posterior does
        share = self.variance / np.maximum(self.gamma, 1e-300)  # 1 - gamma g
        sure = (self.gamma > 0) & (share < _SURE)
        estimate = np.where(
            sure, (1.0 - share) / np.where(sure, self.gamma, 1.0), (back[1:] ** 2).mean(axis=0)
        )
        self.g = np.clip(estimate, 1e-300, np.maximum(self.limit, 1e-300))
        return self.gamma * self.z

    def move(self, x: Any) -> float:
        """Take one step of the fixed point; return the relative change."""
        new = majorised_minimum(self.prior, x**2, self.g, self.gamma)
        new = np.where(new < _DEAD * float(new.max()), 0.0, new)
        change = float(np.sqrt(((new - self.gamma) ** 2).sum() / max(float((new**2).sum()), 1e-300)))
        self.gamma = new
        return change

    def cleaned(self) -> Any:
        """Return the variances without those that are on their way to zero."""
        falling = self.z**2 < _FALLING**2 * (self.g + slope(self.prior, self.gamma))
        return np.where(falling & (self.gamma < _INVISIBLE * float(self.gamma.max())), 0.0, self.gamma)
