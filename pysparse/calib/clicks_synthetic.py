"""Clicks drawn from a known factorisation machine with Zipf ids: the truth that a pruning should find is planted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pysparse.calib.clicks import Clicks

_SCALE, _JITTER, _MEAN = 0.6, 0.02, 0.5
_FIXED = 20_000  # samples on which the offset is found
_CHUNK = 1 << 16  # samples at a time


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """How clicks are drawn. A field with amplitude 0 is noise: its entries are worth next to nothing."""

    values: int = 50  # of each field
    dims: int = 4
    amplitudes: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0, 0.0)  # one a field
    zipf: float = 1.1  # the r-th most frequent value has probability ~ r^-zipf
    rate: float = 0.36  # mean click probability
    copy_of: int | None = None  # add a field with the same values and embeddings: equal Shapley values
    seed: int = 0

    def __post_init__(self) -> None:
        if self.values < 1 or self.dims < 1 or len(self.amplitudes) < 1:
            raise ValueError(f"values, dims and fields are at least 1, got {self}")
        if not 0.0 < self.rate < 1.0 or self.zipf < 0.0 or min(self.amplitudes) < 0.0:
            raise ValueError(f"rate is in (0, 1), zipf and amplitudes are not negative, got {self}")
        if self.copy_of is not None and not 0 <= self.copy_of < len(self.amplitudes):
            raise ValueError(f"copy_of is a field, 0 to {len(self.amplitudes) - 1}, got {self.copy_of}")


@dataclass(slots=True, eq=False)
class SyntheticClicks:
    """The planted model: a table [rows, dims] and an offset; draws are numbered, and a draw's chunks do not matter."""

    spec: SyntheticSpec
    table: NDArray[np.float32] = field(init=False)
    offset: float = field(init=False)
    _edges: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        rng = np.random.default_rng([spec.seed, 0])
        weights = np.arange(1, spec.values + 1, dtype=np.float64) ** -spec.zipf
        self._edges = np.cumsum(weights) / weights.sum()
        fields = []
        for amplitude in spec.amplitudes:  # one field at a time, in float32: the table is the largest array
            mean = _MEAN * rng.standard_normal(spec.dims, np.float32)
            part = amplitude * (mean + rng.standard_normal((spec.values, spec.dims), np.float32))
            part += _JITTER * rng.standard_normal((spec.values, spec.dims), np.float32)
            fields.append((_SCALE * part).astype(np.float32))
        if spec.copy_of is not None:
            fields.append(fields[spec.copy_of])
        self.table = np.concatenate(fields)
        self.offset = self._find_offset()

    @property
    def field_sizes(self) -> tuple[int, ...]:
        """Values of each field."""
        return (self.spec.values,) * (len(self.table) // self.spec.values)

    def chunks(self, samples: int, seed: int = 0, chunk: int = _CHUNK) -> Iterator[Clicks]:
        """Yield ``samples`` samples of draw ``seed``, ``chunk`` at a time; only one chunk is in memory."""
        if samples < 1 or chunk < 1:
            raise ValueError(f"samples and chunk are at least 1, got {samples} and {chunk}")
        rng = np.random.default_rng([self.spec.seed, 1 + seed])
        names = tuple(f"field{i}" for i in range(len(self.field_sizes)))
        for begin in range(0, samples, chunk):
            ids = self._ids(rng, min(chunk, samples - begin))
            chance = 1.0 / (1.0 + np.exp(-(self.offset + fm_logit(self.table, ids))))
            labels = (rng.random(len(ids)) < chance).astype(np.float32)
            yield Clicks(ids, labels, self.field_sizes, names)

    def draw(self, samples: int, seed: int = 0) -> Clicks:
        """Return ``samples`` samples of draw ``seed``."""
        (result,) = self.chunks(samples, seed, samples)
        return result

    def _ids(self, rng: np.random.Generator, samples: int) -> NDArray[np.int32]:
        fields = len(self.spec.amplitudes)
        ranks = np.searchsorted(self._edges, rng.random((samples, fields))).clip(max=self.spec.values - 1)
        if self.spec.copy_of is not None:
            ranks = np.concatenate([ranks, ranks[:, [self.spec.copy_of]]], axis=1)
        starts = np.arange(ranks.shape[1]) * self.spec.values
        return np.ascontiguousarray(ranks + starts, dtype=np.int32)

    def _find_offset(self) -> float:
        rng = np.random.default_rng([self.spec.seed, 1])
        logits = fm_logit(self.table, self._ids(rng, _FIXED))
        low, high = -50.0 - float(logits.max()), 50.0 - float(logits.min())
        for _ in range(80):  # halves the interval below a float64's resolution
            middle = (low + high) / 2
            below = float(np.mean(1.0 / (1.0 + np.exp(-(logits + middle))))) < self.spec.rate
            low, high = (middle, high) if below else (low, middle)
        return (low + high) / 2


def fm_logit(table: NDArray[np.float32], ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return the factorisation machine's logit without offset, float64 [samples], for ids [samples, fields]."""
    embedded = table[ids].astype(np.float64)
    result: NDArray[np.float64] = 0.5 * (embedded.sum(1) ** 2 - (embedded**2).sum(1)).sum(1)
    return result


def logit_shapley(
    table: NDArray[np.float32], base: NDArray[np.float64], ids: NDArray[np.int32], chunk: int = _CHUNK
) -> NDArray[np.float64]:
    """Return the exact values of all entries in the game of the FM's mean logit, float64 [rows, dims].

    phi = (E - c) * (sum over fields of mid - mid), mid = (E + c) / 2: the game is quadratic, no sampling. ``base``
    is [fields, dims]. Memory: one chunk of samples.
    """
    total = np.zeros(table.shape)
    for begin in range(0, len(ids), chunk):
        part = ids[begin : begin + chunk]
        embedded = table[part].astype(np.float64)
        middle = (embedded + base) / 2
        phi = (embedded - base) * (middle.sum(1, keepdims=True) - middle)
        np.add.at(total, part, phi)
    return total / len(ids)
