"""Streaming statistics of the inputs of linear layers, collected by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_CHUNK = 1 << 22  # inputs widened to fp32 at a time: 16 MB


class Statistic(Protocol):
    """A sum over the input rows of one layer, fed batch by batch; batches may be split and ordered at will."""

    tokens: int  # rows seen so far

    def measure(self, rows: Tensor) -> Tensor:
        """Return what ``rows`` [tokens, in_features] contribute; layers that share an input share it."""

    def add(self, measured: Tensor, tokens: int) -> None:
        """Add what :meth:`measure` returned for ``tokens`` rows."""

    def value(self, sequences: int) -> Tensor:
        """Return the statistic over ``sequences`` sequences; a neutral value when no token was seen."""


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

    def value(self, sequences: int) -> Tensor:
        """Return q, float32 [in_features]."""
        return (self._sum / sequences if self.tokens else torch.ones_like(self._sum)).float()


STATISTICS: dict[str, Callable[[int, torch.device], Statistic]] = {"squared_norm": SquaredNorm}


@dataclass(frozen=True, slots=True)
class Watched:
    """A layer whose inputs are collected."""

    module: nn.Module
    in_features: int
    device: torch.device


class Collector:
    """The statistics ``needs`` of some layers, by path, from every forward pass inside :meth:`watching`."""

    def __init__(self, layers: Mapping[str, Watched], needs: Sequence[str]) -> None:
        self._layers = layers
        self._statistics = {
            path: {name: STATISTICS[name](layer.in_features, layer.device) for name in needs}
            for path, layer in layers.items()
        }
        self._input: tuple[Tensor, int] | None = None  # the last input and its version
        self._measured: dict[str, Tensor] = {}  # what it contributes

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the layers for the duration of the block."""
        handles = [
            layer.module.register_forward_pre_hook(self._hook(path), with_kwargs=True)
            for path, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._input, self._measured = None, {}

    def _hook(self, path: str) -> Callable[..., None]:
        def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(path, args[0] if args else next(iter(kwargs.values())))

        return collect

    def _add(self, path: str, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # [tokens, in_features]
        # Query, key and value (and gate and up) get the very same tensor: measure it once.
        if self._input is None or self._input[0] is not inputs or self._input[1] != inputs._version:
            self._input, self._measured = (inputs, inputs._version), {}
        for name, statistic in self._statistics[path].items():
            if name not in self._measured:
                self._measured[name] = statistic.measure(rows)
            statistic.add(self._measured[name], len(rows))

    def tokens(self, path: str) -> int:
        """Return how many input rows the layer has seen."""
        return min((one.tokens for one in self._statistics[path].values()), default=0)

    def values(self, path: str, sequences: int) -> dict[str, Tensor]:
        """Return the layer's statistics by name; ValueError that names it when any is NaN or infinite."""
        values = {name: one.value(sequences) for name, one in self._statistics[path].items()}
        for name, value in values.items():
            finite = torch.isfinite(value)
            if not finite.all():
                where = (~finite).nonzero()[0].tolist()
                raise ValueError(
                    f"the calibration inputs of {path} hold NaN or infinity ({name} at channel {where[0]}, "
                    f"{int((~finite).sum())} in all): the model overflows in its dtype; load it in bfloat16 "
                    "or float32, and check that the dense model gives finite outputs"
                )
        return values
