"""The parts of a decoder that Shapley values can be asked of: blocks, attention heads, groups of FFN neurons."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from pysparse.models.anatomy import anatomy_of
from pysparse.shapley.forward import Part, input_parts


def players_of(
    model: nn.Module, kind: Literal["blocks", "heads", "neurons"], group: int = 1
) -> tuple[tuple[str, Part], ...]:
    """Return (name, part) of each player, in order, for :class:`pysparse.shapley.ForwardGame`.

    "blocks": whole blocks; "heads": the query heads of each attention module; "neurons": FFN neurons, ``group``
    neighbours together. Raises ValueError for another kind, a group that does not divide the neurons, and models
    without a stack of blocks.
    """
    blocks = anatomy_of(model).blocks
    if kind == "blocks":
        return tuple((block.path, Part(block.module)) for block in blocks)
    found: list[tuple[str, Part]] = []
    for block in blocks:
        if kind == "heads":
            path, module = _output_projection(*block.attention)
            parts = input_parts(module, _head_size(model, block.attention[1], module))
        elif kind == "neurons":
            path, module = block.ffn.writer
            parts = input_parts(module, group)
        else:
            raise ValueError(f"players are 'blocks', 'heads' or 'neurons', got {kind!r}")
        found += [(f"{path}[{part.begin}:{part.end}]", part) for part in parts]
    return tuple(found)


def _output_projection(path: str, attention: nn.Module) -> tuple[str, nn.Module]:
    matrices = [
        (f"{path}.{name}", module)
        for name, module in attention.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    if not matrices:
        raise ValueError(f"{path} has no output projection")
    return matrices[-1]


def _head_size(model: nn.Module, attention: nn.Module, projection: nn.Module) -> int:
    size = getattr(attention, "head_dim", None)
    if size is None:
        config: Any = getattr(model, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if not heads:
            raise ValueError(
                f"{type(attention).__name__} tells no head_dim, and the config no number of heads"
            )
        size = config.hidden_size // heads
    return int(size)
