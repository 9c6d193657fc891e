"""A model as the loop sees it: an ordered stack of blocks, and the weight matrices in it that may be pruned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pysparse.calib.inputs import Slot
from pysparse.calib.offload import data_of, device_of
from pysparse.formats import Int8Grid
from pysparse.nn.packing import grid_of, set_grid

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")

SECOND_NAME = "the same module as "  # begins the reason for a path under which a module stands again


@dataclass(frozen=True, slots=True, eq=False)
class PrunableLayer:
    """A weight matrix of a block: a linear layer's, a convolution's, or one of several fused experts'.

    A convolution's weight [out, in / groups, kh, kw] counts as the matrix [out, in / groups * kh * kw] that
    multiplies unfolded patches. Fused experts keep the matrices of all experts in one parameter [E, ., .];
    each expert is a layer of its own.
    """

    path: str  # in the model; of an expert, that of the parameter with its index
    module: nn.Module
    block: int
    transposed: bool = False  # the matrix is stored [in_features, out_features] (GPT-2's Conv1D)
    parameter: str = "weight"
    expert: int | None = None  # index into the parameter's first dimension
    groups: int = 1  # of a convolution: each sees its own channels, out_features / groups rows a group

    @property
    def stored(self) -> Tensor:
        """The matrix as it lies in the model, a view; of an offloaded parameter, in accelerate's store."""
        return self._matrix(data_of(self.module, self.parameter))

    def _matrix(self, parameter: Tensor) -> Tensor:
        return parameter if self.expert is None else parameter[self.expert]

    @property
    def _bare(self) -> Tensor:
        """The parameter in the module, perhaps without data: enough for shapes."""
        return self._matrix(getattr(self.module, self.parameter).detach())

    @property
    def weight(self) -> Tensor:
        """The matrix [out_features, in_features]; a view unless a convolution's memory format forbids it."""
        return self.stored.t() if self.transposed else self.stored.flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, *cols = self._bare.t().shape if self.transposed else self._bare.shape
        return int(rows), int(torch.Size(cols).numel())

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias [out_features], a view; None where it has none, or is one of several fused experts."""
        bias = self.module._parameters.get("bias") if self.parameter == "weight" else None
        return None if bias is None else bias.detach()

    @property
    def size(self) -> int:
        """Number of weights."""
        return self._bare.numel()

    @property
    def device(self) -> torch.device:
        """Where the module computes with the matrix."""
        return device_of(self.module, self.parameter)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What the rows that this matrix sees are called in :mod:`pysparse.calib.inputs`, one for each group."""
        return tuple((self.parameter, self.expert or group) for group in range(self.groups))

    @property
    def routed(self) -> bool:
        """Tell whether the layer is an expert's, and so sees some of the tokens only."""
        return self.expert is not None or _EXPERT.search(self.path) is not None

    @property
    def grid(self) -> Int8Grid | None:
        """What the weight of a linear layer was rounded to, so that packing can keep it; None for other layers."""
        return grid_of(self.module) if self._packs else None

    @property
    def _packs(self) -> bool:
        return isinstance(self.module, nn.Linear) and self.parameter == "weight"

    def note_grid(self, grid: Int8Grid | None) -> None:
        """Keep with a linear layer what its new weight was rounded to, or that it was not."""
        if self._packs:
            set_grid(self.module, None if grid is None else Int8Grid(grid.scales.cpu(), grid.group_size))

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Store ``weight`` [out_features, in_features] in place: parameter, dtype, device and ties stay.

        An offloaded parameter is written where accelerate keeps it. Raises ValueError when that is a file of
        the checkpoint itself.
        """
        stored = self._matrix(data_of(self.module, self.parameter, writable=True))
        stored.copy_(weight.t() if self.transposed else weight.reshape(stored.shape))


@dataclass(frozen=True, slots=True, eq=False)
class BlockLayout:
    """The blocks of a model in order, what is prunable in them, and what is not and why."""

    model: nn.Module
    blocks: tuple[tuple[str, nn.Module], ...]  # (path, module)
    layers: tuple[PrunableLayer, ...]  # in block order
    skipped: dict[str, str]  # path of a module with weight matrices -> why it is not pruned, or not here
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


def skipped_note(skipped: Mapping[str, str]) -> str:
    """Say how many modules are not pruned; second names of one that may be are counted apart."""
    again = sum(reason.startswith(SECOND_NAME) for reason in skipped.values())
    text = f"{len(skipped) - again} other modules with matrices stay dense"
    return f"{text}, {again} are shared and stand in several places" if again else text
