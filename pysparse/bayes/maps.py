"""Linear maps without a matrix: what the solver of image size needs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from pysparse.bayes.blur import Blur, Pixels, Transform

_ADJOINT = 1e-7  # of the product of norms: rounding of double FFTs stays far below, a wrong adjoint far above


class LinearMap(Protocol):
    """A as its products with batches: coefficients [k, n], observations [k, M]."""

    size: int
    samples: int

    def forward(self, coefficients: Any) -> Any:
        """Return A x for each row, [k, M]."""

    def adjoint(self, observations: Any) -> Any:
        """Return A^T u for each row, [k, n]."""

    def column_energy(self) -> Any:
        """Return ||a_i||^2, or a bound on it from above, [n]."""

    def first_level(self, target: Any, noise: float) -> float:
        """Return the variance that all coefficients start from."""

    def divide(self, observations: Any, level: float, noise: float) -> Any:
        """Return about (noise I + level A A^T)^-1 u for each row: the preconditioner."""


def check_adjoint(linear: LinearMap, xp: Any = np) -> None:
    """Raise ValueError when <A x, u> and <x, A^T u> differ for random x and u: a wrong adjoint."""
    draw = np.random.default_rng(0)
    x = xp.asarray(draw.standard_normal((1, linear.size)))
    u = xp.asarray(draw.standard_normal((1, linear.samples)))
    image, back = linear.forward(x), linear.adjoint(u)
    for name, found, length in (("A x", image, linear.samples), ("A^T u", back, linear.size)):
        if tuple(found.shape) != (1, length):
            raise ValueError(f"{name} has shape {tuple(found.shape)}, expected {(1, length)}")
    left, right = float((image * u).sum()), float((x * back).sum())
    scale = float((image**2).sum() * (u**2).sum()) ** 0.5 + float((back**2).sum() * (x**2).sum()) ** 0.5
    if not abs(left - right) <= _ADJOINT * scale:
        raise ValueError(f"the adjoint is wrong: <A x, u> = {left:.10g}, but <x, A^T u> = {right:.10g}")


class BlurredCoefficients:
    """A = blur of the image that an orthonormal transform makes of coefficients."""

    def __init__(self, blur: Blur, transform: Transform | None = None) -> None:
        """Join ``blur`` and ``transform`` (None: pixels); ValueError when the shape does not fit the transform."""
        self.blur, self.transform = blur, Pixels() if transform is None else transform
        self.shape = blur.shape
        self.size = self.samples = blur.shape[0] * blur.shape[1]
        self.transform.analyse(blur.arrays.xp.zeros(blur.shape))  # refuses a shape that it cannot halve

    def forward(self, coefficients: Any) -> Any:
        """Return the blurred images, flat."""
        images = self.transform.synthesise(coefficients.reshape(-1, *self.blur.shape))
        return self.blur.forward(images).reshape(len(coefficients), -1)

    def adjoint(self, observations: Any) -> Any:
        """Return the coefficients of A^T u, flat."""
        images = self.blur.adjoint(observations.reshape(-1, *self.blur.shape))
        return self.transform.analyse(images).reshape(len(observations), -1)

    def column_energy(self) -> Any:
        """Return ||a_i||^2 per band of the transform, from the column in the band's middle, [n].

        Columns of a band are shifts of each other, but for reflective borders.
        """
        return self._per_band(lambda column: float((column**2).sum()))

    def entry_scale(self, level: float, noise: float) -> Any:
        """Return the leave-one-out s_i = g / (1 - level g) when all variances are ``level``, per band, [n]."""

        def scale(column: Any) -> float:
            g = float((column * self.divide(column, level, noise)).sum())
            return g / max(1.0 - level * g, 1e-12)

        return self._per_band(scale)

    def _per_band(self, measure: Callable[[Any], float]) -> Any:
        shape, xp = self.blur.shape, self.blur.arrays.xp
        found = xp.zeros(shape)
        for band in _bands(shape, getattr(self.transform, "levels", 0)):
            unit = xp.zeros((1, *shape))
            unit[0, (band[0].start + band[0].stop) // 2, (band[1].start + band[1].stop) // 2] = 1.0
            found[band] = measure(self.forward(unit.reshape(1, -1)))
        return found.reshape(-1)

    def first_level(self, target: Any, noise: float) -> float:
        """Return the equal variance under which y is likeliest."""
        return self.blur.likeliest_level(target.reshape(self.blur.shape), noise)

    def divide(self, observations: Any, level: float, noise: float) -> Any:
        """Return (noise I + level A A^T)^-1 u, exactly: the transform is orthonormal."""
        images = observations.reshape(-1, *self.blur.shape)
        return self.blur.divide(images, level, noise).reshape(len(observations), -1)


def _bands(shape: tuple[int, int], levels: int) -> list[tuple[slice, slice]]:
    found = []
    height, width = shape
    for _ in range(levels):
        low, left = slice(0, height // 2), slice(0, width // 2)
        high, right = slice(height // 2, height), slice(width // 2, width)
        found += [(low, right), (high, left), (high, right)]
        height, width = height // 2, width // 2
    return [*found, (slice(0, height), slice(0, width))]


class OperatorMap:
    """A scipy LinearOperator; without a spectrum the preconditioner is a number."""

    def __init__(self, operator: Any) -> None:
        """Keep ``operator``, anything with ``shape`` (M, n), ``matmat`` and ``rmatmat``."""
        self.operator = operator
        self.samples, self.size = operator.shape

    def forward(self, coefficients: Any) -> Any:
        """Return A x for each row."""
        return np.asarray(self.operator.matmat(coefficients.T)).T

    def adjoint(self, observations: Any) -> Any:
        """Return A^T u for each row."""
        return np.asarray(self.operator.rmatmat(observations.T)).T

    def column_energy(self) -> Any:
        """Return ||a_i||^2 exactly, by products with blocks of unit vectors."""
        found = np.empty(self.size)
        for start in range(0, self.size, 256):
            part = np.arange(start, min(start + 256, self.size))
            unit = np.zeros((len(part), self.size))
            unit[np.arange(len(part)), part] = 1.0
            found[part] = (self.forward(unit) ** 2).sum(axis=1)
        return found

    def first_level(self, target: Any, noise: float) -> float:
        """Return the variance by which the prior explains the energy of y."""
        return float((target**2).mean() / max(float(self.column_energy().mean()), 1e-300))

    def divide(self, observations: Any, level: float, noise: float) -> Any:
        """Return the observations: no preconditioner is known."""
        return observations
