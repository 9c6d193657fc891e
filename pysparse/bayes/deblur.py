"""Deblurring experiments on images that scikit-image brings: every hyperprior beside the baselines."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pysparse.bayes.arrays import finite_array, positive
from pysparse.bayes.baselines import fista, ias, tikhonov, total_variation
from pysparse.bayes.blur import Arrays, Blur, Boundary, parse_psf, transform_named
from pysparse.bayes.extras import extra
from pysparse.bayes.hyperpriors import Flat, HalfGeneralizedGaussian, HalfLaplace, Hyperprior, Jeffreys
from pysparse.bayes.maps import BlurredCoefficients
from pysparse.bayes.matrix_free import OperatorSettings, OperatorSolution, solve_operator

IMAGES = (
    "astronaut", "brick", "camera", "cell", "chelsea", "clock", "coffee", "coins", "grass", "gravel", "horse",
    "hubble_deep_field", "immunohistochemistry", "logo", "microaneurysms", "moon", "page", "retina", "rocket",
    "shepp_logan_phantom", "text",
)  # fmt: skip
HYPERPRIORS = ("flat", "half-laplace", "half-root", "half-two-thirds", "half-gaussian", "jeffreys")
BASELINES = ("l1", "tv", "tikhonov", "ias")
_WEIGHTS = {"l1": 7, "tv": 6, "tikhonov": 13, "ias": 3}  # how many an oracle chooses from
_VISIBLE = 1e-8  # of the largest coefficient: a smaller one is rounding, not a non-zero


@dataclass(frozen=True, slots=True)
class Setup:
    """What is done to an image and how it is restored."""

    psf: str = "gaussian:1.5"
    noise: float = 0.01  # of the norm of the blurred image
    size: int = 128  # pixels a side
    transform: str = "haar"  # or "db2" ..., or "pixels"
    levels: int = 4
    boundary: Boundary = "periodic"
    kappa: float = 1.0
    seed: int = 0
    workers: int | None = None
    settings: OperatorSettings = field(default_factory=OperatorSettings)

    def __post_init__(self) -> None:
        positive("the noise level", self.noise)
        if type(self.size) is not int or not 8 <= self.size <= 4096:
            raise ValueError(f"size is a whole number of pixels from 8 to 4096, got {self.size!r}")
        if not 0.0 <= self.kappa < float("inf"):
            raise ValueError(f"kappa is not negative, got {self.kappa}")


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """One method's answer."""

    method: str
    image: Any  # [size, size]
    nonzeros: int | None  # None where the method has no coefficients
    relative_error: float
    psnr: float
    ssim: float
    seconds: float
    setting: float | None = None  # the oracle's weight
    errors: tuple[float, ...] = ()  # relative, an iteration each
    solution: OperatorSolution | None = None

    def record(self) -> dict[str, Any]:
        """Return the numbers without the arrays."""
        names = ("method", "nonzeros", "relative_error", "psnr", "ssim", "seconds", "setting")
        found = {name: getattr(self, name) for name in names}
        if self.solution is not None:
            found |= {"iterations": len(self.solution.changes), "last_change": self.solution.changes[-1]}
        return found


def bundled_image(name: str, size: int) -> Any:
    """Return an image of scikit-image's wheel in grey, [size, size], in [0, 1]; ValueError for an unknown name."""
    if name not in IMAGES:
        raise ValueError(f"no bundled image {name!r}; known: {', '.join(IMAGES)}")
    data, color, transform = (extra(f"skimage.{part}") for part in ("data", "color", "transform"))
    image = np.asarray(getattr(data, name)())
    if image.ndim == 3:
        image = color.rgb2gray(color.rgba2rgb(image) if image.shape[2] == 4 else image)
    image = image.astype(np.float64) / (255.0 if image.dtype == np.uint8 else 1.0)
    side = min(image.shape)
    top, left = ((length - side) // 2 for length in image.shape)
    square = image[top : top + side, left : left + side]
    return np.clip(transform.resize(square, (size, size), anti_aliasing=side > size), 0.0, 1.0)


class Experiment:
    """One blurred and noisy image, and everything that restores it."""

    def __init__(self, truth: Any, setup: Setup) -> None:
        """Blur ``truth`` [h, w] and add noise; ValueError for an image that is not 2-D, empty or not finite."""
        self.truth, self.setup = finite_array("the image", truth, 2), setup
        shape = (self.truth.shape[0], self.truth.shape[1])
        self.blur = Blur(parse_psf(setup.psf), shape, setup.boundary, Arrays(workers=setup.workers))
        self.transform = transform_named(setup.transform, setup.levels)
        self.linear = BlurredCoefficients(self.blur, self.transform)
        blurred = self.blur.forward(self.truth)
        self.deviation = setup.noise * float(np.linalg.norm(blurred)) / blurred.size**0.5
        if self.deviation == 0.0:
            raise ValueError("the image is zero everywhere: there is nothing to restore")
        draw = np.random.default_rng(setup.seed)
        self.observed = blurred + self.deviation * draw.standard_normal(blurred.shape)
        # A blur keeps the mean, and no wavelet but the coarsest sees it: it is taken out, like an intercept.
        self.mean = 0.0 if setup.transform == "pixels" else float(self.observed.mean())

    @property
    def noise(self) -> float:
        """The noise variance sigma^2."""
        return float(np.square(self.deviation))

    @property
    def _target(self) -> Any:
        return self.observed.reshape(-1) - self.mean

    @property
    def condition(self) -> float:
        """The condition number of the blur."""
        power = self.blur.power
        return float(np.sqrt(power.max() / max(float(power.min()), 1e-300)))

    def hyperprior(self, name: str) -> Hyperprior:
        """Return the hyperprior that ``name`` means for this image; weights follow from ``kappa``."""
        kappa, typical = self.setup.kappa, self.linear.first_level(self._target, self.noise)
        powers = {"half-root": 0.5, "half-two-thirds": 2.0 / 3.0, "half-gaussian": 2.0}
        if name == "flat":
            return Flat()
        if name == "half-laplace":
            # One weight for all, by the best seen coefficients: a weight relative to each one's s would let
            # those grow that the blur hides.
            return HalfLaplace(kappa * float(self.linear.entry_scale(typical, self.noise).max()))
        if name == "jeffreys":
            return Jeffreys(guard=1e-6 * typical)
        if name in powers:
            return HalfGeneralizedGaussian(powers[name], max(kappa, 1e-12) / typical ** powers[name])
        raise ValueError(f"hyperprior is one of {', '.join(HYPERPRIORS)}, got {name!r}")

    def restore(self, method: str) -> Restored:
        """Run one hyperprior or baseline; ValueError for an unknown name."""
        if method in HYPERPRIORS:
            return self._by_evidence(method)
        if method not in BASELINES:
            raise ValueError(f"method is one of {', '.join((*HYPERPRIORS, *BASELINES))}, got {method!r}")
        return self._by_oracle(method)

    def _by_evidence(self, name: str) -> Restored:
        errors: list[float] = []
        prior, began = self.hyperprior(name), time.perf_counter()
        found = solve_operator(
            self.linear, self._target, prior, self.noise, self.setup.settings,
            lambda _, x: errors.append(self._error(self._image(x))),
        )  # fmt: skip
        image, seconds = self._image(found.x), time.perf_counter() - began
        return self._judge(
            name, image, seconds, nonzeros=int(found.support.sum()), errors=tuple(errors), solution=found
        )

    def _by_oracle(self, name: str) -> Restored:
        began, best = time.perf_counter(), None
        for weight in self._weights(name):
            image, coefficients = self._baseline(name, float(weight))
            error = self._error(image)
            if best is None or error < best[0]:
                best = (error, image, coefficients, float(weight))
        assert best is not None  # there are weights
        _, image, coefficients, weight = best
        count = None if coefficients is None else _count(coefficients)
        return self._judge(name, image, time.perf_counter() - began, nonzeros=count, setting=weight)

    def _weights(self, name: str) -> Any:
        """Weights around what the noise suggests, two decades up and down (IAS: one)."""
        spread = 1.0 if name == "ias" else 2.0
        factors = np.logspace(-spread, spread, _WEIGHTS[name])
        if name == "ias":
            return factors * self.linear.first_level(self._target, self.noise)
        if name == "tikhonov":
            return factors * self.noise / float(self.truth.var() + 1e-300)
        return factors * self.deviation * (1.0 if name == "l1" else 0.1)

    def _baseline(self, name: str, weight: float) -> tuple[Any, Any]:
        if name == "tikhonov":
            return self.mean + tikhonov(self.blur, self.observed - self.mean, weight), None
        if name == "tv":
            return total_variation(self.blur, self.observed, weight), None
        if name == "l1":
            x = fista(self.linear, self._target, weight)
        else:
            x = ias(self.linear, self._target, self.noise, weight)
        return self._image(x), x

    def _image(self, coefficients: Any) -> Any:
        return self.mean + self.transform.synthesise(coefficients.reshape(self.truth.shape))

    def _error(self, image: Any) -> float:
        return float(np.linalg.norm(image - self.truth) / np.linalg.norm(self.truth))

    def _judge(self, method: str, image: Any, seconds: float, **more: Any) -> Restored:
        metrics = extra("skimage.metrics")
        mean_square = float(((image - self.truth) ** 2).mean())
        psnr = float("inf") if mean_square == 0 else -10.0 * float(np.log10(mean_square))
        ssim = float(metrics.structural_similarity(self.truth, image, data_range=1.0))
        return Restored(
            method, image, relative_error=self._error(image), psnr=psnr, ssim=ssim, seconds=seconds, **more
        )


def _count(coefficients: Any) -> int:
    size = np.abs(coefficients)
    return int((size > _VISIBLE * max(float(size.max()), 1e-300)).sum())


def compare(
    truth: Any, setup: Setup, methods: Sequence[str], progress: Callable[[str], None] | None = None
) -> tuple[Experiment, list[Restored]]:
    """Restore one blurred image by every method."""
    experiment, found = Experiment(truth, setup), []
    for method in methods:
        if progress is not None:
            progress(method)
        found.append(experiment.restore(method))
    return experiment, found


def sweep(
    truth: Any, setup: Setup, methods: Sequence[str], axis: str, values: Sequence[float], seeds: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield a record for every value of ``axis`` ("noise", or "psf": the deviation of a Gaussian), seed and method."""
    if axis not in ("noise", "psf"):
        raise ValueError(f"a sweep is over 'noise' or 'psf', got {axis!r}")
    for value in values:
        for seed in range(seeds):
            change = {"noise": value} if axis == "noise" else {"psf": f"gaussian:{value:g}"}
            experiment, found = compare(truth, dataclasses.replace(setup, seed=seed, **change), methods)
            for one in found:
                yield {
                    "axis": axis,
                    "value": value,
                    "seed": seed,
                    "condition": experiment.condition,
                    **one.record(),
                }
