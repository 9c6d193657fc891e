"""A model as the loop sees it: an ordered stack of blocks, and the weight matrices in it that may be pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class PrunableLayer:
    """A linear layer of a block."""

    path: str  # in the model
    module: nn.Module
    block: int
    transposed: bool = False  # the weight is stored [in_features, out_features] (GPT-2's Conv1D)

    @property
    def weight(self) -> Tensor:
        """The stored weight as a view [out_features, in_features]."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight.t() if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, cols = self.weight.shape
        return int(rows), int(cols)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.weight.numel()

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Store ``weight`` [out_features, in_features] in place: parameter, dtype, device and ties stay."""
        self.weight.copy_(weight)


@dataclass(frozen=True, slots=True, eq=False)
class BlockLayout:
    """The blocks of a model in order, what is prunable in them, and what is not and why."""

    model: nn.Module
    blocks: tuple[tuple[str, nn.Module], ...]  # (path, module)
    layers: tuple[PrunableLayer, ...]  # in block order
    skipped: dict[str, str]  # path of a linear layer -> why it stays dense
    warnings: tuple[str, ...] = ()

    def layers_of(self, block: int) -> tuple[PrunableLayer, ...]:
        """Return the layers of one block."""
        return tuple(layer for layer in self.layers if layer.block == block)

    @property
    def size(self) -> int:
        """Number of prunable weights."""
        return sum(layer.size for layer in self.layers)

    @property
    def model_size(self) -> int:
        """Number of parameters of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())
