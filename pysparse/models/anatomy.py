"""Find the attention module and the FFN in each block of a decoder, from the module tree alone."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from pysparse.models.discover import discover
from pysparse.nn.structure import NoAttention
from pysparse.pruning.parts import Anatomy, Block, FeedForward, Named, parameters_of, shape_of

_ATTENTION = re.compile(r"(^|_)attn$|attention$")  # what attributes are called: self_attn, attn, attention


def anatomy_of(model: nn.Module) -> Anatomy:
    """Return the blocks of ``model``, which may be on the meta device; no model is known by name.

    An attention module is the outermost one in a block whose class ends in "Attention", or which is called so. The FFN
    is what else multiplies by matrices: readers from the model's width d to w, or one to 2w that holds gate
    and up, then the writer from w to d. Raises ValueError that names the block for anything else: experts,
    several attentions (cross attention), weights that blocks share, a model pruned by structure before.
    """
    found = [(path, module) for path, module in discover(model, ignore=()).blocks if path]
    if not found:
        raise ValueError(f"{type(model).__name__} has no stack of blocks: structured pruning takes decoders")
    kinds = _kinds(model, len(found))
    blocks = tuple(
        Block(path, module, _attention(path, module), _feed_forward(path, module), kind)
        for (path, module), kind in zip(found, kinds, strict=True)
    )
    if sum(parameters_of(block.module) for block in blocks) > parameters_of(
        nn.ModuleList(m for _, m in found)
    ):
        raise ValueError(f"the blocks of {type(model).__name__} share weights: they cannot be cut one by one")
    return Anatomy(model, blocks)


def _kinds(model: nn.Module, blocks: int) -> list[str]:
    """Return the kind of attention of each block, as the config lists them for the cache."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    listed = getattr(text, "layer_types", None) or [""] * blocks
    return [str(kind) for kind in listed[:blocks]]


def _attention(path: str, block: nn.Module) -> Named:
    found: list[Named] = []
    for name, module in block.named_modules():
        if isinstance(module, NoAttention):
            raise ValueError(f"{path}.{name} was removed: the model has been pruned by structure already")
        named = _ATTENTION.search(name.rpartition(".")[2]) or type(module).__name__.endswith("Attention")
        inside = any(f"{path}.{name}".startswith(f"{outer}.") for outer, _ in found)
        if name and named and not inside and parameters_of(module):
            found.append((f"{path}.{name}", module))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(f"structured pruning takes blocks with one attention module; {path} has {names}")
    return found[0]


def _feed_forward(path: str, block: nn.Module) -> FeedForward:
    attention = _attention(path, block)[0]
    linears = [
        (f"{path}.{name}", module)
        for name, module in block.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and not f"{path}.{name}".startswith(f"{attention}.")
    ]
    shapes = [shape_of(module) for _, module in linears]
    if len(linears) >= 2:
        (d, w), readers = shapes[-1], shapes[:-1]
        plain = len(readers) <= 2 and all(shape == (w, d) for shape in readers)
        if plain or readers == [(2 * w, d)]:
            return FeedForward(tuple(linears[:-1]), linears[-1], 1 if plain else 2)
    have = ", ".join(f"{name.rpartition('.')[2]} {list(shape_of(module))}" for name, module in linears)
    raise ValueError(
        "structured pruning takes blocks with one FFN: one or two matrices [w, d], or one [2w, d], then [d, w]; "
        f"{path} has {have or 'none'} (layers of experts are not supported)"
    )
