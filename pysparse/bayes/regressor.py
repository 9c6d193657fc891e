"""The solver as a scikit-learn estimator."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Self

import numpy as np

from pysparse.bayes.arrays import Matrix, Vector
from pysparse.bayes.extras import extra
from pysparse.bayes.hyperpriors import Flat, HalfGeneralizedGaussian, HalfLaplace, Hyperprior, Jeffreys
from pysparse.bayes.problem import DenseProblem
from pysparse.bayes.solver import Algorithm, Settings, Solution, solve, updated_noise

_base = extra("sklearn.base")
_validation = extra("sklearn.utils.validation")
_HYPERPRIORS = ("flat", "half-laplace", "half-root", "half-gaussian", "jeffreys")
_START_NOISE = 0.1  # of the variance of y
_FIRST_STEPS = 50
_NOISE_ROUNDS = 2
_ROUNDING = 1e-12  # of a column's largest entry: what centring leaves of a constant column


class EBFRegressor(_base.RegressorMixin, _base.BaseEstimator):  # type: ignore[misc, name-defined]
    """Sparse linear regression by hyperpriors on the coefficients' variances, after Li, Dong, Zeng 2025.

    Parameters
    ----------
    hyperprior : "flat", "half-laplace" (default), "half-root" (power 1/2), "half-gaussian", "jeffreys", or an
        object of :mod:`pysparse.bayes.hyperpriors`.
    kappa : float. How much harder than "flat" a coefficient finds it to enter: its test is q^2 > (1 + kappa) s for
        "half-laplace". 0, 2.841, 5.635, 9.828 keep 32, 5, 1, 0.1 % of useless coefficients.
    noise_variance : float or None. sigma^2; None estimates it, which needs more samples than features: with as many
        features or more a fit can explain all of y, the estimate is far too small, and a warning says so.
    algorithm : "mm", "palm", "coordinate" or "reweighted-l1".
    fit_intercept, refit : bool. ``refit`` replaces the shrunken coefficients by least squares on the support.
    max_iter, tol : of the algorithm.

    Attributes
    ----------
    coef_ [n_features], intercept_, gamma_ (prior variances), coef_variance_ (posterior variances),
    noise_variance_, objective_ (one value an iteration), n_iter_, converged_.

    Coefficients are shrunken towards 0, and ``coef_variance_`` does not know of that bias: coef_ +- 1.96
    sqrt(coef_variance_) covers the true coefficient less often than 95 %, the less the larger ``kappa``. ``refit``
    takes most of the bias away.
    """

    def __init__(
        self,
        hyperprior: str | Hyperprior = "half-laplace",
        kappa: float = 2.841,
        noise_variance: float | None = None,
        algorithm: Algorithm = "mm",
        fit_intercept: bool = True,
        refit: bool = False,
        max_iter: int = 500,
        tol: float = 1e-5,
    ) -> None:
        self.hyperprior = hyperprior
        self.kappa = kappa
        self.noise_variance = noise_variance
        self.algorithm = algorithm
        self.fit_intercept = fit_intercept
        self.refit = refit
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any) -> Self:
        """Fit ``X`` [samples, features] and ``y`` [samples]; ValueError for wrong shapes, NaN or settings.

        Warns when the noise is to be estimated from no more samples than features.
        """
        X, y = _validation.validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        if self.kappa < 0:
            raise ValueError(f"kappa is not negative, got {self.kappa}")
        if self.noise_variance is None and X.shape[1] >= X.shape[0]:
            warnings.warn(
                f"{X.shape[1]} features for {X.shape[0]} samples: they can explain all of y, so that the noise is "
                "estimated too small and useless coefficients stay; give noise_variance",
                stacklevel=2,
            )
        center, level = (
            (X.mean(axis=0), float(y.mean())) if self.fit_intercept else (np.zeros(X.shape[1]), 0.0)
        )
        centred, target = X - center, y - level
        alive = np.abs(centred).max(axis=0) > _ROUNDING * np.abs(X).max(axis=0)
        self.coef_, self.gamma_ = np.zeros(X.shape[1]), np.zeros(X.shape[1])
        self.coef_variance_ = np.zeros(X.shape[1])
        self.objective_: tuple[float, ...] = ()
        self.noise_variance_, self.n_iter_, self.converged_ = float(self.noise_variance or 0.0), 0, True
        if alive.any() and np.abs(target).max() > _ROUNDING * max(np.abs(y).max(), 1e-300):
            self._keep(self._solve(centred[:, alive], target), alive)
        self.intercept_ = level - float(center @ self.coef_)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Vector | tuple[Vector, Vector]:
        """Return the predictions [samples]; with ``return_std`` also their standard deviations.

        The deviations take the coefficients as independent given the data, beside the noise.
        """
        _validation.check_is_fitted(self)
        X = _validation.validate_data(self, X, dtype=np.float64, reset=False)
        mean: Vector = X @ self.coef_ + self.intercept_
        if not return_std:
            return mean
        return mean, np.sqrt(X**2 @ self.coef_variance_ + self.noise_variance_)

    def _solve(self, matrix: Matrix, target: Vector) -> Solution:
        problem = DenseProblem(matrix, target)
        settings = Settings(self.algorithm, self.max_iter, self.tol, refit=bool(self.refit))
        if self.noise_variance is not None:
            return solve(problem, self._prior(problem, self.noise_variance), self.noise_variance, settings)
        # The noise sets the weight of the hyperprior, so both are not minimised together: under a heavy weight
        # the joint minimum explains all of y as noise.
        noise = self._first_noise(problem)
        for _ in range(_NOISE_ROUNDS):
            solution = solve(problem, self._prior(problem, noise), noise, settings)
            noise = updated_noise(problem, solution.gamma, problem.moments(solution.gamma, noise), noise)
        return dataclasses.replace(solution, noise=noise)

    def _first_noise(self, problem: DenseProblem) -> float:
        """By the flat hyperprior: the weights of the others are set by the noise."""
        start = _START_NOISE * problem.energy / problem.samples
        return solve(problem, Flat(), start, Settings(max_iterations=_FIRST_STEPS, estimate_noise=True)).noise

    def _prior(self, problem: DenseProblem, noise: float) -> Hyperprior:
        if not isinstance(self.hyperprior, str):
            return self.hyperprior
        if self.hyperprior == "flat":
            return Flat()
        if self.hyperprior == "half-laplace":
            return HalfLaplace.at_level(self.kappa, problem.column_energy, noise)
        if self.hyperprior == "jeffreys":
            return Jeffreys()
        if self.hyperprior not in _HYPERPRIORS:
            raise ValueError(f"hyperprior is one of {', '.join(_HYPERPRIORS)}, got {self.hyperprior!r}")
        typical = problem.energy / problem.samples / float(problem.column_energy.mean())
        power = 0.5 if self.hyperprior == "half-root" else 2.0
        return HalfGeneralizedGaussian(power, max(self.kappa, 1e-12) / typical**power)

    def _keep(self, solution: Solution, alive: Vector) -> None:
        self.coef_[alive], self.gamma_[alive] = solution.x, solution.gamma
        self.coef_variance_[alive], self.noise_variance_ = solution.variance, solution.noise
        self.objective_, self.n_iter_, self.converged_ = (
            solution.objective,
            solution.iterations,
            solution.converged,
        )
