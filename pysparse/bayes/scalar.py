"""One-dimensional problems of the generalised Gamma family: roots and global minima."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pysparse.bayes.arrays import Vector

_GRID = 400  # points, log-spaced over 14 decades: between two stationary points lie many
_DECADES = 14.0
_BISECTIONS = 60
_NEWTON = 100


def convex_root(linear: Vector, log: float, convex: Vector, power: float, moment: Vector) -> Vector:
    """Return the positive root of linear t^2 + convex t^(power + 1) - log t - moment, elementwise.

    All coefficients are not negative and power >= 1 where ``convex`` is not zero, so the function is convex and
    Newton's steps from the root without the convex term, which lies on the right, fall monotonically.
    """
    linear = np.maximum(linear, 1e-300)
    t = np.sqrt(moment / linear) if log == 0 else (log + np.sqrt(log**2 + 4 * linear * moment)) / (2 * linear)
    if not np.any(convex):
        return np.asarray(t)
    for _ in range(_NEWTON):
        value = linear * t**2 + convex * t ** (power + 1.0) - log * t - moment
        slope = 2.0 * linear * t + (power + 1.0) * convex * t**power - log
        step = np.where(slope > 0, value / np.where(slope > 0, slope, 1.0), 0.0)
        t = np.maximum(t - step, 0.0)
        if not np.any(np.abs(step) > 1e-14 * t):
            break
    return np.asarray(t)


def global_minimum(log: float, weight: float, power: float, guard: float, s: float, q: float) -> float:
    """Return argmin over t >= 0 of log(1 + t s) - q^2 t / (1 + t s) + log * log(t + guard) + weight t^power."""

    def cost(t: Vector) -> Vector:
        data = np.log1p(t * s) - q * q * t / (1.0 + t * s)
        return np.asarray(data + log * np.log(t + guard) + weight * t**power)

    def slope(t: float) -> float:
        return float(
            s / (1.0 + t * s)
            - q * q / (1.0 + t * s) ** 2
            + log / (t + guard)
            + weight * power * t ** (power - 1.0)
        )

    top = (q * q + s) / (s * s)  # the data's part increases from there on, and phi
    if log < 0:
        top = max(top, (-log / (weight * power)) ** (1.0 / power))  # from here on
    grid = top * np.logspace(-_DECADES, 0.0, _GRID)
    place = int(np.argmin(cost(grid)))
    best = _bisect(slope, grid[max(place - 1, 0)], grid[min(place + 1, _GRID - 1)])
    if log >= 0 and not (log and not guard):
        zero = log * np.log(guard) if log else 0.0
        if zero <= cost(np.array([best]))[0]:
            return 0.0
    return float(best)


def grid_prox(v: Vector, step: float, log: float, weight: float, power: float, guard: float) -> Vector:
    """Return argmin over t >= 0 of (t - v)^2 / 2 + step * (log * log(t + guard) + weight t^power)."""
    return np.array([_one_prox(float(one), step, log, weight, power, guard) for one in np.asarray(v).ravel()])


def _one_prox(v: float, step: float, log: float, weight: float, power: float, guard: float) -> float:
    def cost(t: Vector) -> Vector:
        return np.asarray((t - v) ** 2 / 2 + step * (log * np.log(t + guard) + weight * t**power))

    def slope(t: float) -> float:
        return float(t - v + step * (log / (t + guard) + weight * power * t ** (power - 1.0)))

    top = max(v, 0.0) + np.sqrt(step * max(-log, 0.0)) + (1e-12 if v <= 0 else 0.0)
    grid = top * np.logspace(-_DECADES, 0.0, _GRID)
    place = int(np.argmin(cost(grid)))
    best = _bisect(slope, grid[max(place - 1, 0)], grid[min(place + 1, _GRID - 1)])
    if log >= 0:
        zero = v * v / 2 + (step * log * np.log(guard) if log else 0.0)
        if zero <= cost(np.array([best]))[0]:
            return 0.0
    return float(best)


def _bisect(slope: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if slope(middle) > 0:
            high = middle
        else:
            low = middle
    return float((low + high) / 2.0)
