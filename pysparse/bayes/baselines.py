"""What EBF is compared with on images: Tikhonov, total variation, l1 by FISTA, and IAS.

Where a weight is to be chosen, the callers take the one that is best against the truth ("oracle"): a favour that
EBF does not get.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pysparse.bayes.blur import Blur
from pysparse.bayes.maps import BlurredCoefficients
from pysparse.bayes.matrix_free import conjugate_gradients

_PENALTY = 2.0  # of ADMM, in units of the weight of the total variation


def tikhonov(blur: Blur, image: Any, weight: float) -> Any:
    """Return argmin ||A x - y||^2 + weight ||x||^2: one division in the spectrum."""
    spectrum = blur.to_spectrum(image) * blur.spectrum.conj()
    return blur.from_spectrum(spectrum / (blur.power + weight))


def total_variation(blur: Blur, image: Any, weight: float, steps: int = 100) -> Any:
    """Return about argmin ||A x - y||^2 / 2 + weight TV(x), isotropic, by ADMM (Goldstein and Osher 2009)."""
    penalty = _PENALTY * weight
    data = blur.adjoint(image)
    divisor = blur.power + penalty * blur.laplacian()
    parts = np.zeros((2, *image.shape))
    dual = np.zeros_like(parts)
    found = image
    for _ in range(steps):
        right = data + penalty * _divergence(parts - dual, blur.boundary)
        found = blur.from_spectrum(blur.to_spectrum(right) / divisor)
        moved = _gradient(found, blur.boundary) + dual
        length = np.sqrt((moved**2).sum(axis=0))
        parts = moved * np.maximum(1.0 - weight / penalty / np.maximum(length, 1e-300), 0.0)
        dual = moved - parts
    return found


def _gradient(image: Any, boundary: str) -> Any:
    found = np.stack([np.roll(image, -1, axis) - image for axis in (0, 1)])
    if boundary == "reflective":
        found[0, -1], found[1, :, -1] = 0.0, 0.0
    return found


def _divergence(parts: Any, boundary: str) -> Any:
    """The transpose of the gradient."""
    down, right = parts[0].copy(), parts[1].copy()
    if boundary == "reflective":
        down[-1], right[:, -1] = 0.0, 0.0
    return np.roll(down, 1, 0) - down + np.roll(right, 1, 1) - right


def fista(
    linear: BlurredCoefficients, target: Any, weight: float, steps: int = 150, start: Any = None
) -> Any:
    """Return about argmin ||A x - y||^2 / 2 + weight ||x||_1 (Beck and Teboulle 2009, restarted). [n]."""
    rate = 1.0 / float(linear.blur.power.max())
    x = np.zeros(linear.size) if start is None else start
    ahead, momentum = x, 1.0
    for _ in range(steps):
        move = ahead - rate * linear.adjoint(linear.forward(ahead[None]) - target[None])[0]
        new = np.sign(move) * np.maximum(np.abs(move) - rate * weight, 0.0)
        if float(((ahead - new) * (new - x)).sum()) > 0:  # uphill: start the momentum anew
            momentum = 1.0
        grown = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
        ahead = new + (momentum - 1.0) / grown * (new - x)
        x, momentum = new, grown
    return x


def ias(
    linear: BlurredCoefficients,
    target: Any,
    noise: float,
    scale: float,
    eta: float = 1e-3,
    iterations: int = 15,
) -> Any:
    """Return the joint MAP of coefficients and variances under Gamma hyperpriors, by the iterative alternating scheme.

    Calvetti, Somersalo and Strang (2019), r = 1: gamma = scale (eta / 2 + sqrt(eta^2 / 4 + x^2 / (2 scale))), then
    x given gamma by conjugate gradients. [n].
    """
    gamma = np.full(linear.size, scale)
    u = np.zeros((1, linear.samples))
    x = np.zeros(linear.size)
    for _ in range(iterations):
        level = float(gamma.mean())
        u, _ = conjugate_gradients(
            lambda v, gamma=gamma: noise * v + linear.forward(gamma * linear.adjoint(v)),  # type: ignore[misc]
            lambda v, level=level: linear.divide(v, level, noise),  # type: ignore[misc]
            target[None], u, 1e-4, 60,
        )  # fmt: skip
        x = gamma * linear.adjoint(u)[0]
        gamma = scale * (eta / 2.0 + np.sqrt(eta**2 / 4.0 + x**2 / (2.0 * scale)))
    return x
