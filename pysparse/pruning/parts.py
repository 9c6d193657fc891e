"""A decoder as structured pruning sees it: blocks of one attention module and one FFN each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pysparse.nn.structure import Surgery
from pysparse.pruning.split import Sizes

Named = tuple[str, nn.Module]  # path in the model, module


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a Linear or of GPT-2's Conv1D, which is stored transposed."""
    weight: Tensor = linear._parameters["weight"]  # type: ignore[assignment]
    rows, cols = weight.t().shape if type(linear).__name__ == "Conv1D" else weight.shape
    return int(rows), int(cols)


def parameters_of(*modules: nn.Module) -> int:
    """Return the number of parameters in ``modules``."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@dataclass(frozen=True, slots=True, eq=False)
class FeedForward:
    """The FFN of one block: neuron j is row j of the readers and column j of the writer."""

    readers: tuple[Named, ...]  # gate and up, or fc1, or one matrix that holds gate and up
    writer: Named  # down, fc2
    halves: int  # 2 when one reader holds gate, then up; else 1

    @property
    def width(self) -> int:
        """Number of neurons, d_int."""
        return shape_of(self.writer[1])[1]

    @property
    def size(self) -> int:
        """Number of parameters, biases included."""
        return parameters_of(*(module for _, module in (*self.readers, self.writer)))

    @property
    def neuron_size(self) -> int:
        """Parameters that go with one neuron: the writer's bias stays."""
        bias = self.writer[1]._parameters.get("bias")
        return (self.size - (0 if bias is None else bias.numel())) // self.width

    def cut(self, surgery: Surgery, neurons: Tensor) -> None:
        """Keep ``neurons`` (int64, ascending) alone; the writer's bias stays as it is."""
        rows = torch.cat([neurons + half * self.width for half in range(self.halves)])
        for _, reader in self.readers:
            surgery.cut(reader, outputs=rows)
        surgery.cut(self.writer[1], inputs=neurons)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One decoder block."""

    path: str
    module: nn.Module
    attention: Named
    ffn: FeedForward
    kind: str = ""  # of its attention, such as "sliding_attention": each kind has cache slots of its own

    @property
    def signature(self) -> tuple[type, tuple[str, ...]]:
        """What blocks of one make have in common."""
        return type(self.module), tuple(name for name, _ in self.module.named_modules())


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """The blocks of a model in order."""

    model: nn.Module
    blocks: tuple[Block, ...]

    @property
    def stack(self) -> tuple[Named, ...]:
        """(path, module) of each block."""
        return tuple((block.path, block.module) for block in self.blocks)

    @property
    def sizes(self) -> Sizes:
        """Parameters; ValueError when the blocks are not alike, as the closed form supposes."""
        found = {
            (parameters_of(block.attention[1]), block.ffn.size, block.ffn.width) for block in self.blocks
        }
        if len(found) > 1:
            raise ValueError(
                f"the blocks of {type(self.model).__name__} are not alike (attention, FFN, width: "
                f"{sorted(found)[:3]}): a model is pruned by structure once"
            )
        (attention, ffn, width) = found.pop()
        main = parameters_of(*(block.module for block in self.blocks))
        return Sizes(len(self.blocks), main, attention, ffn, width, self.blocks[0].ffn.neuron_size)
