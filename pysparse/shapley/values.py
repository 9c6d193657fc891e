"""What an estimator returns, and how samples become a mean with its standard error."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ShapleyValues:
    """Estimated values of all players."""

    mean: Array  # float64 [n_players]
    stderr: Array  # float64 [n_players]; 0 for exact values, inf while there is a single sample
    evaluations: int  # of the game, that of nobody and everybody included
    samples: int  # independent ones behind the mean; 0 for exact values
    seed: int
    empty: float  # v(nobody)
    full: float  # v(everybody)
    estimator: str

    @property
    def residual(self) -> float:
        """sum(mean) - (v(everybody) - v(nobody)): zero to rounding for estimators that share out all there is."""
        return float(self.mean.sum() - (self.full - self.empty))

    @property
    def ratio(self) -> float:
        """Largest standard error over the spread of the values (Covert et al. 2020, SAGE): what ``stop`` bounds."""
        return error_ratio(self.mean, self.stderr)


def error_ratio(mean: Array, stderr: Array) -> float:
    """Return max(stderr) / (max(mean) - min(mean)); 0 when there is no error, inf when there is no spread."""
    error, spread = float(stderr.max()), float(mean.max() - mean.min())
    if error == 0.0:
        return 0.0
    return error / spread if spread > 0.0 else float("inf")


@dataclass(slots=True)
class Moments:
    """Running mean and sum of squared deviations (Welford), one sample after the other.

    Samples enter in the order of their numbers, so the result does not depend on how they were batched.
    """

    mean: Array
    squares: Array  # sum of squared deviations from the mean
    count: int = 0
    _delta: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._delta = np.empty_like(self.mean)

    @classmethod
    def zero(cls, players: int) -> Moments:
        """Return the moments of no samples."""
        return cls(np.zeros(players), np.zeros(players))

    def add(self, samples: Array) -> None:
        """Take in ``samples``, float64 [S, n_players], in order."""
        for sample in samples:
            self.count += 1
            delta = np.subtract(sample, self.mean, out=self._delta)
            self.mean += delta / self.count
            self.squares += delta * (sample - self.mean)

    def stderr(self) -> Array:
        """Return the standard error of the mean; inf for fewer than two samples."""
        if self.count < 2:
            return np.full_like(self.mean, np.inf)
        return np.sqrt(self.squares / (self.count - 1) / self.count)
