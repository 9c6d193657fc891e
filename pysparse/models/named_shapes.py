"""Real architectures with random weights: what speed needs when no checkpoint is at hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

RANDOM_WEIGHTS = (
    "random normal (tiled from one block of draws): for speed only, the text they produce means nothing"
)
_POOL = (1 << 22) - 3  # draws; an odd length, so that tiled rows do not repeat at the same place
_HEADROOM = 0.75  # share of the available memory that a benchmark may plan with


@dataclass(frozen=True, slots=True)
class NamedShape:
    """One published architecture."""

    name: str
    model_type: str  # as transformers names it
    blocks: int  # in the full model
    settings: dict[str, Any]


_SHAPES = (
    NamedShape("llama-2-7b", "llama", 32, {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }),
    NamedShape("llama-3-8b", "llama", 32, {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }),
    NamedShape("tinyllama", "llama", 22, {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    }),
    NamedShape("qwen2.5-0.5b", "qwen2", 24, {
        "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": True,
    }),
)  # fmt: skip
SHAPES: dict[str, NamedShape] = {shape.name: shape for shape in _SHAPES}


def named_shape(name: str) -> NamedShape:
    """Return the architecture called ``name``; ValueError lists the known ones."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape '{name}'; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def plan_blocks(
    shape: NamedShape, dtype: torch.dtype, sparsity: float, available: int | None, sparse_copies: int = 1
) -> int:
    """Return how many blocks fit beside their ``sparse_copies``, at most the full model's.

    ``available`` is in bytes (None: unknown, two blocks are taken); a quarter of it is left alone. Raises
    ValueError when not even one block fits.
    """
    if available is None:
        return min(2, shape.blocks)
    skeleton = _meta_model(shape, 1, dtype)
    block = sum(p.numel() * p.element_size() for n, p in skeleton.named_parameters() if ".layers.0." in n)
    outside = sum(
        p.numel() * p.element_size() for n, p in skeleton.named_parameters() if ".layers.0." not in n
    )
    packed = block * ((1.0 - sparsity) + 1 / (8 * dtype.itemsize))
    largest = max(p.numel() * p.element_size() for p in skeleton.parameters())
    room = available * _HEADROOM - outside - 3 * largest  # packing a layer holds copies of it for a moment
    blocks = int(room / (block + sparse_copies * packed))
    if blocks < 1:
        raise ValueError(
            f"{shape.name} needs {(block + packed + outside) / 1e9:.1f} GB for one block, dense and sparse; "
            f"{available / 1e9:.1f} GB are free. Choose a smaller shape, e.g. qwen2.5-0.5b"
        )
    return min(blocks, shape.blocks)


def random_model(
    name: str, blocks: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """Build ``name`` with ``blocks`` of its blocks (None: all) and random weights, in eval mode.

    Every weight has its own memory; the numbers are tiled from one block of normal draws with standard
    deviation 0.02, because drawing billions takes minutes and a speed does not depend on them.
    """
    shape = named_shape(name)
    blocks = shape.blocks if blocks is None else blocks
    if not 1 <= blocks <= shape.blocks:
        raise ValueError(f"blocks={blocks} is outside [1, {shape.blocks}] of {name}")
    model = _meta_model(shape, blocks, dtype)
    pool = (torch.randn(_POOL, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)
    _fill(model, pool, dtype)
    _rebuild_rotary(model)
    return model.eval()


def repeat_block_(model: nn.Module, blocks: int) -> nn.Module:
    """Give a model of one block ``blocks`` of them, in place: copies with memory of their own, packed or not.

    So a packed model is built without its dense self, which may not fit. ValueError for a model of more blocks,
    or ``blocks`` below 1.
    """
    stack: Any = model.base_model.layers  # type: ignore[union-attr]
    if len(stack) != 1 or blocks < 1:
        raise ValueError(f"{len(stack)} blocks cannot become {blocks}: one becomes one or more")
    for index in range(1, blocks):
        block = copy.deepcopy(stack[0], {id(model.config): model.config})  # settings stay those of the model
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # its place in the KV cache
        stack.append(block)
    config: Any = model.config
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types * blocks
    return model


def _meta_model(shape: NamedShape, blocks: int, dtype: torch.dtype) -> nn.Module:
    config = AutoConfig.for_model(shape.model_type, num_hidden_layers=blocks, **shape.settings)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


@torch.no_grad()
def _fill(model: nn.Module, pool: Tensor, dtype: torch.dtype) -> None:
    filled: dict[int, nn.Parameter] = {}  # by identity, so that tied weights stay tied
    offset = 0
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                values = torch.ones(parameter.shape, dtype=dtype)
                if parameter.dim() > 1:
                    offset = _tile(values.view(-1), pool, offset)
                filled[id(parameter)] = nn.Parameter(values, requires_grad=False)
            module.register_parameter(name, filled[id(parameter)])


def _tile(flat: Tensor, pool: Tensor, offset: int) -> int:
    """Fill ``flat`` from ``pool``, starting at ``offset`` and wrapping round; return where it stopped."""
    done = 0
    while done < len(flat):
        count = min(len(flat) - done, len(pool) - offset)
        flat[done : done + count] = pool[offset : offset + count]
        done, offset = done + count, (offset + count) % len(pool)
    return offset


def _rebuild_rotary(model: nn.Module) -> None:
    """Compute the rotary tables, which are buffers that no file holds and that meta left empty."""
    config: Any = model.config
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, name = path.rpartition(".")
            rebuilt = type(module)(config)
            setattr(model.get_submodule(parent), name, rebuilt)
