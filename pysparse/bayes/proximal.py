"""Proximal maps on [0, inf): argmin over t >= 0 of (t - v)^2 / 2 + mu * penalty(t), each solved globally."""

from __future__ import annotations

import math

import numpy as np

from pysparse.bayes.arrays import Vector

_NEWTON = 60


def prox_linear(v: Vector, mu: Vector | float) -> Vector:
    """Penalty t: max(v - mu, 0)."""
    return np.maximum(v - mu, 0.0)


def prox_power(v: Vector, mu: float, power: float) -> Vector:
    """Penalty t^power for a power in (0, 2].

    Below 1 the answer jumps: 0 up to v = (2 - p) / (2 (1 - p)) * (2 mu (1 - p))^(1 / (2 - p)), beyond it the
    larger root of t - v + mu p t^(p - 1) = 0. p = 1/2 is in closed form (Xu et al. 2012, half thresholding).
    """
    v = np.maximum(np.asarray(v, dtype=np.float64), 0.0)
    if power == 1.0:
        return prox_linear(v, mu)
    if power == 2.0:
        return v / (1.0 + 2.0 * mu)
    if power > 1.0:
        return _newton(v, mu, power)
    start = (2.0 - power) / (2.0 * (1.0 - power)) * (2.0 * mu * (1.0 - power)) ** (1.0 / (2.0 - power))
    found = np.zeros_like(v)
    large = v > start
    if power == 0.5:
        angle = np.arccos(np.minimum(mu / 4.0 * (v[large] / 3.0) ** -1.5, 1.0))
        found[large] = 2.0 / 3.0 * v[large] * (1.0 + np.cos(2.0 * math.pi / 3.0 - 2.0 / 3.0 * angle))
    else:
        found[large] = _newton(v[large], mu, power)
    return found


def _newton(v: Vector, mu: float, power: float) -> Vector:
    """The larger root of t - v + mu p t^(p - 1); from v on Newton's steps stay on its right."""
    t = v.copy()
    for _ in range(_NEWTON):
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = 1.0 + mu * power * (power - 1.0) * t ** (power - 2.0)
            step = (t - v + mu * power * t ** (power - 1.0)) / slope
        step = np.where(np.isfinite(step) & (t > 0), step, 0.0)
        t = np.maximum(t - step, 0.0)
        if not np.any(np.abs(step) > 1e-15 * np.maximum(t, 1e-300)):
            break
    return t


def prox_log(v: Vector, mu: float, guard: float) -> Vector:
    """Penalty log(t + guard): zero, or the larger root of (t - v)(t + guard) + mu, whichever costs less."""
    v = np.asarray(v, dtype=np.float64)
    discriminant = (guard - v) ** 2 - 4.0 * (mu - v * guard)
    root = np.maximum((v - guard + np.sqrt(np.maximum(discriminant, 0.0))) / 2.0, 0.0)

    def cost(t: Vector) -> Vector:
        return (t - v) ** 2 / 2.0 + mu * np.log(t + guard)

    return np.where((discriminant >= 0) & (cost(root) < cost(np.zeros_like(v))), root, 0.0)
