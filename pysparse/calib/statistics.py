"""Streaming statistics of the inputs of weight matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_CHUNK = 1 << 22  # inputs widened to fp32 at a time: 16 MB


class Statistic(Protocol):
    """A sum over the input rows of one matrix, or of several that see the same rows; fed batch by batch.

    What a batch contributes is measured where the batch is, and added in the order of the batches, on every
    rank the same way: sums do not depend on how the batches are split over processes.
    """

    tokens: int  # rows seen so far

    def measure(self, rows: Tensor) -> Tensor:
        """Return what ``rows`` [tokens, in_features] contribute; layers that share an input share it."""

    def add(self, measured: Tensor, tokens: int) -> None:
        """Add what :meth:`measure` returned for ``tokens`` rows."""

    def value(self, sequences: float) -> Tensor:
        """Return the mean over ``sequences`` sequences; a neutral value when no token was seen.

        ``sequences`` is a fraction for an expert, which sees some of the tokens: see :class:`Collector`.
        """


class SquaredNorm:
    """q_j: the squared L2 norm of input channel j, as a mean over sequences (not tokens).

    Float32 [in_features]; squares are summed in float32 within a chunk and in float64 across chunks, so the
    split into batches changes nothing that float32 can show. Without a token all channels count the same.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    def measure(self, rows: Tensor) -> Tensor:
        """Return the sum of squares of each column of ``rows`` [tokens, in_features], float64 [in_features]."""
        total = torch.zeros_like(self._sum, device=rows.device)
        for part in torch.split(rows, max(1, _CHUNK // max(1, rows.shape[1]))):
            total += part.float().square().sum(dim=0)
        return total

    def add(self, measured: Tensor, tokens: int) -> None:
        """Add a sum of squares."""
        self._sum += measured.to(self._sum.device)
        self.tokens += tokens

    def value(self, sequences: float) -> Tensor:
        """Return q, float32 [in_features]."""
        return (self._sum / sequences if self.tokens else torch.ones_like(self._sum)).float()


class Gram:
    """X^T X over all tokens: the Hessian of a layer's squared output error, but for a factor that cancels.

    Float32 [in_features, in_features], accumulated in float32, batch by batch. Without a token it is the
    identity, which couples no channel with another. 4 * in_features^2 bytes, shared by the layers that see
    the same inputs; twice that while a batch is measured.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._in_features, self._device = in_features, device
        self._sum: Tensor | None = None  # made at the first token: an expert may see none
        self.tokens = 0

    def measure(self, rows: Tensor) -> Tensor:
        """Return the product of ``rows`` [tokens, in_features] with itself, float32 [in_features, in_features]."""
        product = torch.zeros(self._in_features, self._in_features, device=self._device)
        for part in torch.split(rows, max(1, _CHUNK // max(1, self._in_features))):
            wide = part.to(self._device, torch.float32)
            product.addmm_(wide.T, wide)
        return product

    def add(self, measured: Tensor, tokens: int) -> None:
        """Add a product."""
        if self._sum is None:
            self._sum = torch.zeros(self._in_features, self._in_features, device=self._device)
        self._sum += measured.to(self._device)
        self.tokens += tokens

    def value(self, sequences: float) -> Tensor:
        """Return X^T X; not divided by ``sequences``, and not a copy: it may be the largest tensor at hand."""
        if self._sum is None:
            return torch.eye(self._in_features, device=self._device)
        return self._sum


class Mean:
    """E[x]: the mean of each input channel over all rows (tokens, or positions under a kernel).

    Float32 [in_features]; summed in float64. Without a row it is 0.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    def measure(self, rows: Tensor) -> Tensor:
        """Return the sum of each column of ``rows`` [tokens, in_features], float64 [in_features]."""
        return rows.sum(dim=0, dtype=torch.float64)

    def add(self, measured: Tensor, tokens: int) -> None:
        """Add a sum of rows."""
        self._sum += measured.to(self._sum.device)
        self.tokens += tokens

    def value(self, sequences: float) -> Tensor:
        """Return the mean over rows, whatever the number of ``sequences``."""
        return (self._sum / max(1, self.tokens)).float()


STATISTICS: dict[str, Callable[[int, torch.device], Statistic]] = {
    "squared_norm": SquaredNorm,
    "gram": Gram,
    "mean": Mean,
}
