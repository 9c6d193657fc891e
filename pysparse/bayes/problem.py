"""The data side of the model: y = A x + e by A itself, or by A^T A and A^T y alone.

With Sigma = sigma^2 I + A diag(gamma) A^T the algorithms need z = A^T Sigma^-1 y, g = diag(A^T Sigma^-1 A),
y^T Sigma^-1 y and log det Sigma. ``noise`` is sigma^2 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from pysparse.bayes.arrays import Flags, Matrix, Vector, finite_array
from pysparse.bayes.extras import extra

_HALF = 0.5  # of gamma g: above it 1 - diag(B^-1) keeps its digits, below it the other form of g does
_RANK = 1e-10  # of the largest diagonal: a pivot below it says that columns are dependent


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What the data say at some prior variances gamma."""

    z: Vector  # A^T Sigma^-1 y, [n]; the posterior mean is gamma * z
    g: Vector  # diagonal of A^T Sigma^-1 A, [n]
    data: float  # y^T Sigma^-1 y
    log_det: float  # log det Sigma


class Problem(Protocol):
    """Data of a linear model."""

    @property
    def size(self) -> int:
        """The number n of coefficients."""

    @property
    def samples(self) -> int:
        """The number M of observations."""

    @property
    def column_energy(self) -> Vector:
        """||a_i||^2, [n]."""

    @property
    def correlation(self) -> Vector:
        """A^T y, [n]."""

    @property
    def energy(self) -> float:
        """||y||^2."""

    @property
    def gram(self) -> Matrix:
        """A^T A, [n, n]."""

    def moments(self, gamma: Vector, noise: float) -> Moments:
        """Return the moments at ``gamma`` [n] and noise variance ``noise``."""


def residual(problem: Problem, x: Vector) -> float:
    """Return ||y - A x||^2."""
    product = problem.gram @ x
    return max(problem.energy - 2.0 * float(problem.correlation @ x) + float(x @ product), 0.0)


def least_squares(problem: Problem, support: Flags) -> Vector:
    """Return the least-squares solution on ``support`` (bool [n]), zero elsewhere.

    Raises ValueError when the columns of the support are linearly dependent: the answer is not unique.
    """
    x = np.zeros(problem.size)
    chosen = np.flatnonzero(support)
    if not len(chosen):
        return x
    part = problem.gram[np.ix_(chosen, chosen)]
    values, vectors = np.linalg.eigh(part)
    if values[0] <= _RANK * values[-1]:
        rank = int((values > _RANK * values[-1]).sum())
        raise ValueError(
            f"the {len(chosen)} columns of the support have rank {rank}: a refit is not unique, keep the posterior mean"
        )
    x[chosen] = vectors @ ((vectors.T @ problem.correlation[chosen]) / values)
    return x


class DenseProblem:
    """y = A x + e with A [M, n] in memory."""

    def __init__(self, matrix: ArrayLike, target: ArrayLike) -> None:
        """Check and keep ``matrix`` A [M, n] and ``target`` y [M]; ValueError for NaN, wrong shapes or emptiness."""
        self.matrix = finite_array("A", matrix, 2)
        self.target = finite_array("y", target, 1)
        if len(self.target) != len(self.matrix):
            raise ValueError(f"A has {len(self.matrix)} rows, y has {len(self.target)} entries")
        self.samples, self.size = self.matrix.shape
        self.column_energy: Vector = np.einsum("mi,mi->i", self.matrix, self.matrix)
        self.correlation: Vector = self.matrix.T @ self.target
        self.energy = float(self.target @ self.target)
        self._gram: Matrix | None = None

    @property
    def gram(self) -> Matrix:
        """A^T A, computed once."""
        if self._gram is None:
            self._gram = self.matrix.T @ self.matrix
        return self._gram

    def moments(self, gamma: Vector, noise: float) -> Moments:
        """By the Cholesky factor of Sigma [M, M], or of B [n, n] where that is smaller."""
        if self.size < self.samples:
            return _hessian_moments(self, gamma, noise)
        linalg = extra("scipy.linalg")
        sigma = (self.matrix * gamma) @ self.matrix.T
        sigma[np.diag_indices_from(sigma)] += noise
        lower = np.linalg.cholesky(sigma)
        white = linalg.solve_triangular(lower, np.column_stack([self.matrix, self.target]), lower=True)
        columns, target = white[:, :-1], white[:, -1]
        return Moments(
            columns.T @ target, np.einsum("mi,mi->i", columns, columns), float(target @ target),
            2.0 * float(np.log(np.diag(lower)).sum()),
        )  # fmt: skip


class HessianProblem:
    """The same model by H = A^T A, b = A^T y and ||y||^2 alone: what calibration data leave of it."""

    def __init__(self, gram: ArrayLike, correlation: ArrayLike, energy: float, samples: int) -> None:
        """Check and keep ``gram`` H [n, n], ``correlation`` b [n], ``energy`` ||y||^2 and ``samples`` M.

        Raises ValueError when H is not symmetric and positive semidefinite, or something is not finite.
        """
        self.gram: Matrix = finite_array("H", gram, 2)
        self.correlation = finite_array("b", correlation, 1)
        self.size, self.samples = len(self.gram), int(samples)
        if self.gram.shape != (self.size, self.size) or self.correlation.shape != (self.size,):
            raise ValueError(f"H is [n, n] and b [n], got {self.gram.shape} and {self.correlation.shape}")
        if self.samples < 1 or not 0.0 <= energy < float("inf"):
            raise ValueError(f"||y||^2 is not negative and samples at least 1, got {energy} and {samples}")
        largest = float(np.abs(self.gram).max())
        if float(np.abs(self.gram - self.gram.T).max()) > 1e-8 * largest:
            raise ValueError("H is not symmetric")
        smallest = float(np.linalg.eigvalsh(self.gram)[0])
        if smallest < -1e-6 * largest:
            raise ValueError(f"H has the eigenvalue {smallest:.3g}: it is not positive semidefinite")
        self.column_energy: Vector = np.diag(self.gram).copy()
        self.energy = float(energy)

    def moments(self, gamma: Vector, noise: float) -> Moments:
        """By the Cholesky factor of B = I + D H D / sigma^2 on the support, D = gamma^(1/2)."""
        return _hessian_moments(self, gamma, noise)


def _hessian_moments(problem: Problem, gamma: Vector, noise: float) -> Moments:
    linalg = extra("scipy.linalg")
    gram, b = problem.gram, problem.correlation
    live = np.flatnonzero(gamma)
    root = np.sqrt(gamma[live])
    scaled = root[:, None] * gram[live]  # D H, [S, n]
    inner = scaled[:, live] * root / noise
    inner[np.diag_indices_from(inner)] += 1.0
    lower = np.linalg.cholesky(inner)
    half = linalg.solve_triangular(lower, scaled, lower=True)  # L^-1 D H
    inverse = linalg.solve_triangular(lower, np.eye(len(live)), lower=True)
    solution = np.zeros(problem.size)
    solution[live] = root * (inverse.T @ (inverse @ (root * b[live]))) / noise
    g = problem.column_energy / noise - np.einsum("si,si->i", half, half) / noise**2
    used = 1.0 - np.einsum("si,si->i", inverse, inverse)  # gamma g
    g[live] = np.where(used > _HALF, used / gamma[live], g[live])
    data = max(problem.energy - float(b @ solution), 0.0) / noise
    log_det = problem.samples * np.log(noise) + 2.0 * float(np.log(np.diag(lower)).sum())
    return Moments((b - gram @ solution) / noise, np.maximum(g, 0.0), data, log_det)


def full_moments(problem: Problem, gamma: Vector, noise: float) -> tuple[Matrix, Vector]:
    """Return G = A^T Sigma^-1 A [n, n] and z [n]."""
    linalg = extra("scipy.linalg")
    live = np.flatnonzero(gamma)
    root = np.sqrt(gamma[live])
    scaled = root[:, None] * problem.gram[live]
    inner = scaled[:, live] * root / noise
    inner[np.diag_indices_from(inner)] += 1.0
    half = linalg.solve_triangular(np.linalg.cholesky(inner), scaled, lower=True)
    g = problem.gram / noise - half.T @ half / noise**2
    return g, problem.moments(gamma, noise).z
