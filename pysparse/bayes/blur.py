"""Blurs and orthonormal wavelets of images by the array code of NumPy and CuPy alike.

Images are [..., height, width], leading dimensions are a batch. FFT and DCT are scipy.fft's with worker threads
for NumPy arrays and cupyx.scipy.fft's (cuFFT) for CuPy arrays. The CuPy half is not covered by the tests: it
needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from pysparse.bayes.arrays import finite_array, positive
from pysparse.bayes.extras import extra

Boundary = Literal["periodic", "reflective"]
_RADII = 4.0  # standard deviations of a Gaussian beyond which it is cut off


@dataclass(frozen=True, slots=True)
class Arrays:
    """The libraries that hold and transform one kind of array."""

    xp: Any = np
    workers: int | None = None  # threads of scipy.fft; None for one

    @property
    def fft(self) -> Any:
        """The module of the transforms."""
        return extra("scipy.fft") if self.xp is np else extra("cupyx.scipy.fft")

    @property
    def options(self) -> dict[str, Any]:
        """What scipy.fft takes beside an array."""
        return {"workers": self.workers} if self.xp is np and self.workers else {}


def gaussian_psf(deviation: float) -> Any:
    """Return a Gaussian [r, r] of standard deviation ``deviation`` pixels, of odd size and sum 1."""
    radius = max(1, int(np.ceil(_RADII * positive("the deviation of a Gaussian", deviation))))
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    psf = np.outer(line, line)
    return psf / psf.sum()


def disk_psf(radius: float) -> Any:
    """Return a uniform disk [r, r] of ``radius`` pixels, of odd size and sum 1: out of focus."""
    reach = int(np.ceil(positive("the radius of a disk", radius)))
    place = np.arange(-reach, reach + 1)
    psf = (place[:, None] ** 2 + place**2 <= radius**2).astype(np.float64)
    return psf / psf.sum()


def motion_psf(length: float) -> Any:
    """Return a horizontal line [n, n] of ``length`` pixels, rounded to an odd number, of sum 1."""
    size = int(positive("the length of a motion", length)) // 2 * 2 + 1
    psf = np.zeros((size, size))
    psf[size // 2] = 1.0 / size
    return psf


PSFS = {"gaussian": gaussian_psf, "disk": disk_psf, "motion": motion_psf}


def parse_psf(text: str) -> Any:
    """Return the PSF that "gaussian:1.5", "disk:3" or "motion:9" names; ValueError for anything else."""
    name, colon, number = text.partition(":")
    if name not in PSFS or not colon:
        raise ValueError(f"a PSF is written {', '.join(f'{one}:NUMBER' for one in PSFS)}, got {text!r}")
    try:
        size = float(number)
    except ValueError:
        raise ValueError(f"the number of a PSF is missing in {text!r}") from None
    return PSFS[name](size)


class Blur:
    """A x = psf * x for images of one shape, diagonal in a basis of FFT (periodic) or DCT-II (reflective)."""

    def __init__(
        self, psf: Any, shape: tuple[int, int], boundary: Boundary = "periodic", arrays: Arrays | None = None
    ) -> None:
        """Check ``psf`` [odd, odd], no larger than ``shape``, and compute its spectrum.

        Raises ValueError for another shape of the PSF, and for one that is not symmetric under reflections.
        """
        psf = finite_array("the PSF", psf, 2)
        if (
            psf.shape[0] % 2 == 0
            or psf.shape[1] % 2 == 0
            or any(p > s for p, s in zip(psf.shape, shape, strict=True))
        ):
            raise ValueError(f"a PSF has odd sides, none longer than the image's {shape}, got {psf.shape}")
        self.shape, self.boundary, self.arrays = shape, boundary, arrays or Arrays()
        if boundary == "periodic":
            self.spectrum = self._periodic(psf)
        elif boundary == "reflective":
            self.spectrum = self._reflective(psf)
        else:
            raise ValueError(f"boundary is 'periodic' or 'reflective', got {boundary!r}")
        self.power = abs(self.spectrum) ** 2

    def _periodic(self, psf: Any) -> Any:
        padded = np.zeros(self.shape)
        padded[: psf.shape[0], : psf.shape[1]] = psf
        centred = np.roll(padded, (-(psf.shape[0] // 2), -(psf.shape[1] // 2)), (0, 1))
        return self.to_spectrum(self.arrays.xp.asarray(centred))

    def _reflective(self, psf: Any) -> Any:
        if not (np.allclose(psf, psf[::-1]) and np.allclose(psf, psf[:, ::-1])):
            raise ValueError("reflective borders need a PSF that is symmetric up-down and left-right")
        cosines = []
        for size, length in zip(self.shape, psf.shape, strict=True):
            place = np.arange(length) - length // 2
            cosines.append(np.cos(np.pi / size * np.outer(np.arange(size), place)))
        return self.arrays.xp.asarray(cosines[0] @ psf @ cosines[1].T)

    def to_spectrum(self, images: Any) -> Any:
        """Return the coefficients in the basis in which the blur is diagonal."""
        fft, options = self.arrays.fft, self.arrays.options
        if self.boundary == "periodic":
            return fft.rfft2(images, **options)
        return fft.dctn(images, axes=(-2, -1), norm="ortho", **options)

    def from_spectrum(self, coefficients: Any) -> Any:
        """Return the images of ``coefficients``."""
        fft, options = self.arrays.fft, self.arrays.options
        if self.boundary == "periodic":
            return fft.irfft2(coefficients, s=self.shape, **options)
        return fft.idctn(coefficients, axes=(-2, -1), norm="ortho", **options)

    def forward(self, images: Any) -> Any:
        """Return A x."""
        return self.from_spectrum(self.to_spectrum(images) * self.spectrum)

    def adjoint(self, images: Any) -> Any:
        """Return A^T u."""
        return self.from_spectrum(self.to_spectrum(images) * self.spectrum.conj())

    def divide(self, images: Any, level: float, noise: float) -> Any:
        """Return (noise I + level A A^T)^-1 u, exactly."""
        return self.from_spectrum(self.to_spectrum(images) / (noise + level * self.power))

    def likeliest_level(self, image: Any, noise: float) -> float:
        """Return the variance gamma, equal for all pixels, under which y is likeliest: the best start.

        argmin of y^T Sigma^-1 y + log det Sigma over a grid of gamma, exact in the spectrum. A start by the energy
        of y alone amplifies the noise where the blur passes nothing.
        """
        square = abs(self.to_spectrum(image)) ** 2
        if self.boundary == "periodic":
            square = square / (self.shape[0] * self.shape[1])
        best, level = float("inf"), 0.0
        for gamma in float((image**2).mean()) * np.logspace(-8, 4, 49):
            spread = noise + gamma * self.power
            cost = float((square / spread + np.log(spread)).sum())
            best, level = min((best, level), (cost, float(gamma)))
        return level

    def laplacian(self) -> Any:
        """Return the eigenvalues of D^T D, D the differences that :mod:`pysparse.bayes.baselines` takes."""
        step = 2.0 if self.boundary == "periodic" else 1.0
        height, width = self.shape
        last = width // 2 + 1 if self.boundary == "periodic" else width
        rows = 2.0 - 2.0 * np.cos(step * np.pi * np.arange(height) / height)
        cols = 2.0 - 2.0 * np.cos(step * np.pi * np.arange(last) / width)
        return self.arrays.xp.asarray(rows[:, None] + cols)


class Transform(Protocol):
    """An orthonormal transform of images."""

    def analyse(self, images: Any) -> Any:
        """Return the coefficients, of the same shape."""

    def synthesise(self, coefficients: Any) -> Any:
        """Return the images."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """The pixels themselves: for images that are sparse as they are."""

    def analyse(self, images: Any) -> Any:
        """Return ``images``."""
        return images

    def synthesise(self, coefficients: Any) -> Any:
        """Return ``coefficients``."""
        return coefficients


@dataclass(frozen=True, slots=True)
class Wavelets:
    """An orthonormal wavelet transform with periodic borders; the taps ("haar", "db2", ...) are PyWavelets'.

    A coefficient array holds the coarse part in its upper left corner, quartered level by level. Haar with
    this layout is PyWavelets' ``coeffs_to_array(wavedec2(..., mode="periodization"))``.
    """

    name: str = "haar"
    levels: int = 4
    low: tuple[float, ...] = field(init=False)
    high: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.name != "haar" and not self.name.startswith("db"):
            raise ValueError(f"a wavelet is 'haar' or a Daubechies wavelet like 'db2', got {self.name!r}")
        wavelet = extra("pywt").Wavelet(self.name)
        object.__setattr__(self, "low", tuple(wavelet.rec_lo))
        object.__setattr__(self, "high", tuple(wavelet.rec_hi))
        if type(self.levels) is not int or self.levels < 1:
            raise ValueError(f"levels is a whole number from 1 on, got {self.levels!r}")

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError when the sides of ``shape`` cannot be halved that often."""
        unit = 2**self.levels
        if any(side % unit or side < unit for side in shape):
            raise ValueError(f"{self.levels} levels of a wavelet need sides divisible by {unit}, got {shape}")

    def analyse(self, images: Any) -> Any:
        """Return the coefficients of ``images`` [..., h, w]."""
        self.check(images.shape[-2:])
        found = images.copy()
        height, width = images.shape[-2:]
        for _ in range(self.levels):
            corner = found[..., :height, :width]
            for axis in (-1, -2):
                corner = self._halve(corner, axis)
            found[..., :height, :width] = corner
            height, width = height // 2, width // 2
        return found

    def synthesise(self, coefficients: Any) -> Any:
        """Return the images of ``coefficients`` [..., h, w]: the transpose, which is the inverse."""
        self.check(coefficients.shape[-2:])
        found = coefficients.copy()
        height, width = (side >> (self.levels - 1) for side in coefficients.shape[-2:])
        for _ in range(self.levels):
            corner = found[..., :height, :width]
            for axis in (-2, -1):
                corner = self._double(corner, axis)
            found[..., :height, :width] = corner
            height, width = 2 * height, 2 * width
        return found

    def _halve(self, values: Any, axis: int) -> Any:
        values = values.swapaxes(axis, -1)
        half = values.shape[-1] // 2
        found = np.zeros_like(values)
        for part, taps in ((found[..., :half], self.low), (found[..., half:], self.high)):
            for place, tap in enumerate(taps):  # values[2 k + place], from every second value
                part += tap * _shifted(values[..., place % 2 :: 2], -(place // 2))
        return found.swapaxes(axis, -1)

    def _double(self, values: Any, axis: int) -> Any:
        values = values.swapaxes(axis, -1)
        half = values.shape[-1] // 2
        found = np.zeros_like(values)
        for part, taps in ((values[..., :half], self.low), (values[..., half:], self.high)):
            for place, tap in enumerate(taps):
                found[..., place % 2 :: 2] += tap * _shifted(part, place // 2)
        return found.swapaxes(axis, -1)


def _shifted(values: Any, places: int) -> Any:
    return np.roll(values, places, axis=-1) if places else values


def transform_named(name: str, levels: int) -> Transform:
    """Return the transform that ``name`` means: "pixels", "haar" or "dbN"."""
    return Pixels() if name == "pixels" else Wavelets(name, levels)
