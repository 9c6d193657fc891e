"""Streaming statistics of the inputs of linear layers, collected by hooks."""

from __future__ import annotations

import copy
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


class Gram:
    """X^T X over all tokens: the Hessian of a layer's squared output error, but for a factor that cancels.

    Float32 [in_features, in_features], accumulated in float32. Without a token it is the identity, which
    couples no channel with another. 4 * in_features^2 bytes, shared by the layers that see the same inputs.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._in_features, self._device = in_features, device
        self._sum: Tensor | None = None  # made at the first token: an expert may see none
        self.tokens = 0

    def measure(self, rows: Tensor) -> Tensor:
        """Return a copy of ``rows`` [tokens, in_features]: smaller than their product, which :meth:`add` makes."""
        return rows.clone()

    def add(self, measured: Tensor, tokens: int) -> None:
        """Add the product of ``measured`` [tokens, in_features] with itself."""
        if self._sum is None:
            self._sum = torch.zeros(self._in_features, self._in_features, device=self._device)
        for part in torch.split(measured, max(1, _CHUNK // max(1, self._in_features))):
            wide = part.to(self._device, torch.float32)
            self._sum.addmm_(wide.T, wide)
        self.tokens += tokens

    def value(self, sequences: int) -> Tensor:
        """Return X^T X; not divided by ``sequences``, and not a copy: it may be the largest tensor at hand."""
        if self._sum is None:
            return torch.eye(self._in_features, device=self._device)
        return self._sum


STATISTICS: dict[str, Callable[[int, torch.device], Statistic]] = {"squared_norm": SquaredNorm, "gram": Gram}


@dataclass(frozen=True, slots=True)
class Watched:
    """A layer whose inputs are collected."""

    module: nn.Module
    in_features: int
    device: torch.device


@dataclass(eq=False)
class _Sums:
    """The statistics of layers that have seen the very same inputs so far."""

    statistics: dict[str, Statistic]
    values: dict[str, Tensor] | None = None  # once asked for


class Collector:
    """The statistics ``needs`` of some layers, by path, from every forward pass inside :meth:`watching`.

    Query, key and value (and gate and up) are given one tensor: it is measured once, and as long as layers
    see the same inputs they share one sum, and in the end one and the same value.
    """

    def __init__(self, layers: Mapping[str, Watched], needs: Sequence[str]) -> None:
        self._layers = layers
        blank: dict[tuple[int, torch.device], _Sums] = {}
        self._sums = {path: blank.setdefault(_kind(one), _blank(one, needs)) for path, one in layers.items()}
        self._input: tuple[Tensor, int] | None = None  # the last input and its version
        self._measured: dict[str, Tensor] = {}  # what it contributes
        self._seen: list[str] = []  # which layers were given it

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the layers for the duration of the block."""
        handles = [
            layer.module.register_forward_pre_hook(self._hook(path), with_kwargs=True)
            for path, layer in self._layers.items()
        ]
        try:
            yield
            self._flush()
        finally:
            for handle in handles:
                handle.remove()
            self._input, self._measured, self._seen = None, {}, []

    def _hook(self, path: str) -> Callable[..., None]:
        def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(path, args[0] if args else next(iter(kwargs.values())))

        return collect

    def _add(self, path: str, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # [tokens, in_features]
        known = self._input is not None and self._input[0] is inputs and self._input[1] == inputs._version
        if not known or path in self._seen:
            self._flush()
            self._input = (inputs, inputs._version)
            self._measured = {name: one.measure(rows) for name, one in self._sums[path].statistics.items()}
        self._seen.append(path)

    def _flush(self) -> None:
        """Add the last input to the sums of the layers that saw it; who did not see it keeps a sum of its own."""
        groups: dict[int, list[str]] = {}
        for path in self._seen:
            groups.setdefault(id(self._sums[path]), []).append(path)
        for paths in groups.values():
            sums = self._sums[paths[0]]
            if sum(one is sums for one in self._sums.values()) > len(paths):
                sums = _Sums(copy.deepcopy(sums.statistics))
                self._sums.update(dict.fromkeys(paths, sums))
            for name, statistic in sums.statistics.items():
                statistic.add(self._measured[name], self._rows())
        self._seen = []

    def _rows(self) -> int:
        inputs = self._input[0] if self._input else torch.empty(0, 1)
        return inputs.numel() // max(1, inputs.shape[-1])

    def tokens(self, path: str) -> int:
        """Return how many input rows the layer has seen."""
        return min((one.tokens for one in self._sums[path].statistics.values()), default=0)

    def values(self, path: str, sequences: int) -> dict[str, Tensor]:
        """Return the layer's statistics by name, the very tensors of the layers that saw the same inputs.

        Raises ValueError that names the layer when any value is NaN or infinite.
        """
        sums = self._sums[path]
        if sums.values is None:
            values = {name: one.value(sequences) for name, one in sums.statistics.items()}
            for name, value in values.items():
                _check_finite(path, name, value)
            sums.values = values
        return sums.values


def _kind(layer: Watched) -> tuple[int, torch.device]:
    return layer.in_features, layer.device


def _blank(layer: Watched, needs: Sequence[str]) -> _Sums:
    return _Sums({name: STATISTICS[name](layer.in_features, layer.device) for name in needs})


def _check_finite(path: str, name: str, value: Tensor) -> None:
    finite = torch.isfinite(value)
    if not finite.all():
        where = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the calibration inputs of {path} hold NaN or infinity ({name} at channel {where[0]}, "
            f"{int((~finite).sum())} in all): the model overflows in its dtype; load it in bfloat16 "
            "or float32, and check that the dense model gives finite outputs"
        )
