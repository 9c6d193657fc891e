"""``attn_implementation="pysparse_anchor"`` and its like: our attention under transformers' own names.

Two functions are registered under one name: the mask function describes padding, cache and window in four
integers a sequence, so that no mask of N x N is ever made, and the attention function reads them. A call goes to
an operator that is opaque to ``torch.compile``, which plans, computes and counts.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pysparse import ops
from pysparse.attention import AttentionInput, AttentionLog, AttentionOptions, Planner, run_attention
from pysparse.attention.dispatch import KERNEL_DTYPES
from pysparse.attention.exact import Shape, exact_attention, one_row_attention
from pysparse.attention.log import DENSE, TORCH, TOTAL, Tally
from pysparse.huggingface.attention_mask import MIN_KEYS, extent_mask, is_extent, unpack_extent
from pysparse.huggingface.registration import PREFIX
from pysparse.methods import PLANNERS, planner_for
from pysparse.ops.attention import MAX_HEAD_DIM
from pysparse.ops.attention_cuda import why_portable

FLASH = f"{PREFIX}flash"  # exact
DECODING = "decoding step"  # why neither planned nor, often, worth a word
_UNKNOWN = ("indices", "block_indices", "sinks")  # arguments that choose keys or take a share: not known here
_ATTRIBUTE = "pysparse_attention"  # of an attention module: the number of its options

# Options are handed through operators as numbers, which equal options share.
_KNOWN: list[AttentionOptions] = [AttentionOptions()]
_NAMES: dict[str, int] = {FLASH: 0}
_CHOSEN: ContextVar[AttentionOptions | None] = ContextVar("pysparse_attention_options", default=None)
_LOG: ContextVar[AttentionLog | None] = ContextVar("pysparse_attention_log", default=None)

_logger = logging.getLogger("pysparse")
_library = torch.library.Library("pysparse", "FRAGMENT")
_library.define(
    "prompt_attention(Tensor query, Tensor key, Tensor value, Tensor extent, float scale, float softcap, "
    "Tensor? sinks, Tensor? bias, int options, int layer) -> Tensor"
)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: query [B, Hq, N, D], key and value [B, Hk, M, D] -> [B, N, Hq, D], None.

    Prompts go to the compiled kernels, and on a CPU a decoding step without a mask; a mask that is more than
    padding, a bias of positions (T5), gradients and dropout go to torch, which is logged. ValueError for models that
    choose keys by ``indices``, ``block_indices`` or ``sinks`` of their own.
    """
    _check_known(kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, "layer_idx", None)
    layer = -1 if layer is None else layer
    composed = softcap is not None or s_aux is not None
    plain = attention_mask is None and not composed and position_bias is None and not dropout
    if plain and ops.can_row_attend(query, key, value):
        _record(layer, DENSE, DECODING, Tally(1, 1, 1.0))
        return ops.call_row_attention(query, key, value, scale), None
    if attention_mask is None or not is_extent(attention_mask):
        _count_torch(query, layer, _why_no_extent(query, key))
        if plain and query.shape[2] == 1 and query.is_cpu:
            return one_row_attention(query, key, value, scale), None
        if not composed:
            # A causal prompt has a mask of ours: none hides nothing, as in eager code.
            if attention_mask is None and kwargs.get("is_causal") is None:
                kwargs["is_causal"] = False
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, position_bias=position_bias, **kwargs
            )  # fmt: skip
        mask = _everything(query, key) if attention_mask is None else attention_mask
        shape = Shape(scale, softcap=softcap, sinks=s_aux, dropout=dropout, bias=position_bias, mask=mask)
        return exact_attention(query, key, value, shape).transpose(1, 2).contiguous(), None
    if dropout or (torch.is_grad_enabled() and _wants_gradient(query, key, position_bias)):
        _count_torch(
            query, layer, "dropout" if dropout else "gradients are wanted: the kernels have no backward"
        )
        shape = _shape(query, attention_mask, scale, softcap, s_aux, position_bias, dropout)
        return exact_attention(query, key, value, shape).transpose(1, 2).contiguous(), None
    options = getattr(module, _ATTRIBUTE, None)
    if options is None:
        options = _NAMES[str(module.config._attn_implementation)]  # type: ignore[union-attr]
    out: Tensor = torch.ops.pysparse.prompt_attention(
        query, key, value, attention_mask, scale, softcap or 0.0, s_aux, position_bias, options, layer
    )
    return out, None


def _why_no_extent(query: Tensor, key: Tensor) -> str:
    if query.shape[2] == 1:
        return DECODING
    return (
        f"fewer than {MIN_KEYS} keys" if key.shape[2] < MIN_KEYS else "mask is more than causal and padding"
    )


def _check_known(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments that choose keys or add logits in ways unknown here: they must not be ignored."""
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(_not_known(unknown))


def _not_known(names: list[str]) -> str:
    return (
        f"this model's attention depends on {' and '.join(names)}, which pysparse's does not know; choose another "
        "attn_implementation, such as 'sdpa' or 'eager'"
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _everything(query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)


def _shape(
    query: Tensor,
    extent: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    dropout: float = 0.0,
) -> Shape:
    key_range, q_offset, window = unpack_extent(extent, query.shape[2])
    return Shape(scale, q_offset, key_range, window, softcap, sinks, dropout, bias)


def _prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, extent: Tensor, scale: float, softcap: float,
    sinks: Tensor | None, bias: Tensor | None, options: int, layer: int,
) -> Tensor:  # fmt: skip
    shape = _shape(query, extent, scale, softcap or None, sinks, bias)
    reason = _why_torch(query, key, value, shape)
    if reason:
        start = time.perf_counter()
        out = exact_attention(query, key, value, shape)
        seconds = time.perf_counter() - start
        _record(layer, TORCH, reason, Tally(1, query.shape[2], query.shape[2], 0.0, seconds))
        return out.transpose(1, 2).contiguous()
    given = AttentionInput(query, key, value, scale, shape.q_offset, shape.key_range)
    outcome = run_attention(given, _options(options), layer)
    _record(layer, outcome.way, outcome.reason, outcome.tally)
    return outcome.out.transpose(1, 2).contiguous()


def _why_torch(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> str:
    """Return why the compiled kernels cannot compute this; "" when they can."""
    if shape.softcap is not None:
        return "soft-capped logits"
    if shape.sinks is not None:
        return "learned sinks"
    if shape.bias is not None:
        return "a bias of positions"
    if shape.window is not None:
        return "sliding window"  # reads the keys of the window only
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes {query.dtype}, {key.dtype} and {value.dtype}"
    if key.shape != value.shape or query.shape[-1] > MAX_HEAD_DIM:
        return f"head dimensions {query.shape[-1]} and {value.shape[-1]}"
    if query.is_cuda:  # what is not vouched for, or out of the kernels' range, torch's fused attention does
        return why_portable(query)
    if not query.is_cpu:
        return f"device {query.device.type}"
    if query.dtype not in KERNEL_DTYPES:
        return f"dtype {str(query.dtype).removeprefix('torch.')}"
    return ""


def _prompt_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, extent: Tensor, scale: float, softcap: float,
    sinks: Tensor | None, bias: Tensor | None, options: int, layer: int,
) -> Tensor:  # fmt: skip
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1])


for _device in ("CPU", "CUDA"):
    _library.impl("prompt_attention", _prompt_attention, _device)
torch.library.register_fake("pysparse::prompt_attention", _prompt_attention_fake, lib=_library)


def _options(number: int) -> AttentionOptions:
    own, chosen = _KNOWN[number], _CHOSEN.get()
    if chosen is None:
        return own
    return _with_planner(chosen, own.planner) if chosen.planner is None else chosen


def _with_planner(options: AttentionOptions, planner: Planner | None) -> AttentionOptions:
    return AttentionOptions(
        planner, options.min_length, options.max_density, options.dense_layers, options.sample_rows,
        options.profile,
    )  # fmt: skip


def _count_torch(query: Tensor, layer: int, reason: str) -> None:
    if (
        not torch.compiler.is_compiling()
    ):  # a traced call cannot count: it would count once, while it is traced
        _record(layer, TORCH, reason, Tally(1, query.shape[2], query.shape[2]))


def _record(layer: int, way: str, reason: str, tally: Tally) -> None:
    new = TOTAL.record(layer, way, reason, tally)
    if new and way == TORCH and reason != DECODING:
        _logger.warning(
            "attention of layer %d is computed by torch: %s (said once for each reason)", layer, reason
        )
    log = _LOG.get()
    if log is not None:
        log.record(layer, way, reason, tally)


@contextmanager
def attention_options(
    planner: Planner | str | None = None, *, min_length: int | None = None, max_density: float = 0.6,
    dense_layers: frozenset[int] | tuple[int, ...] = (), sample_rows: int = 0, profile: bool = False,
) -> Iterator[AttentionLog]:  # fmt: skip
    """Set how models with a ``pysparse_*`` attention compute prompts in this block, and yield the log of it.

    ``planner`` (an object, or a name in ``pysparse.methods.PLANNERS``) stands in for the one that the model's
    implementation names; the rest as in :class:`pysparse.attention.AttentionOptions`. Holds for this thread, and
    for compiled models too. Raises ValueError for unknown names and values out of range.
    """
    chosen = AttentionOptions(
        None if planner is None else planner_for(planner), min_length, max_density, frozenset(dense_layers),
        sample_rows, profile,
    )  # fmt: skip
    log = AttentionLog()
    tokens = _CHOSEN.set(chosen), _LOG.set(log)
    try:
        yield log
    finally:
        _CHOSEN.reset(tokens[0])
        _LOG.reset(tokens[1])


def use_attention(
    model: nn.Module, planner: Planner | str | None = None, *, min_length: int | None = None,
    max_density: float = 0.6, dense_layers: frozenset[int] | tuple[int, ...] = (), sample_rows: int = 0,
    profile: bool = False,
) -> None:  # fmt: skip
    """Give ``model`` our attention for good: exact without a ``planner``, else planned with these options.

    The options are :func:`attention_options`'s, which overrides them in its block. Raises ValueError for a model
    that has no attention layers of transformers' kind, or whose layers depend on what our attention does not know,
    and for ``dense_layers`` that it does not have.
    """
    options = AttentionOptions(
        None if planner is None else planner_for(planner), min_length, max_density, frozenset(dense_layers),
        sample_rows, profile,
    )  # fmt: skip
    if not has_attention(model):
        raise ValueError(f"{type(model).__name__} has no attention layers that transformers can switch")
    _check_layers(options.dense_layers, model)
    unknown = unknown_arguments(model)
    if unknown:
        raise ValueError(_not_known(unknown))
    model.set_attn_implementation(FLASH)  # type: ignore[operator]
    for module in _attention_layers(model):
        setattr(module, _ATTRIBUTE, _number(options))


def _check_layers(asked: frozenset[int], model: nn.Module) -> None:
    known = {int(layer.layer_idx) for layer in _attention_layers(model)}  # type: ignore[arg-type]
    if asked - known:
        raise ValueError(
            f"dense_layers={sorted(asked - known)}: attention layers are {min(known)} to {max(known)}"
        )


def has_attention(model: nn.Module) -> bool:
    """Tell whether ``model`` has attention layers that transformers can switch."""
    return hasattr(model, "set_attn_implementation") and bool(_attention_layers(model))


def unknown_arguments(model: nn.Module) -> list[str]:
    """Return what attention layers of ``model`` hand to their attention that ours does not know, by their source."""
    found: set[str] = set()
    for kind in {type(layer) for layer in _attention_layers(model)}:
        with contextlib.suppress(OSError, TypeError):  # a class without a file has told nothing
            source = inspect.getsource(kind.forward)
            found |= {name for name in _UNKNOWN if re.search(rf"^\s*{name}=", source, re.MULTILINE)}
    return sorted(found)


def _attention_layers(model: nn.Module) -> list[nn.Module]:
    return [
        m
        for m in model.modules()
        if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "is_causal")
    ]


def _number(options: AttentionOptions) -> int:
    if options not in _KNOWN:
        _KNOWN.append(options)
    return _KNOWN.index(options)


def register() -> None:
    """Make the implementations known to transformers: ``pysparse_flash`` and one for each planner."""
    for name, planner in PLANNERS.items():
        _NAMES[PREFIX + name.replace("-", "_")] = _number(AttentionOptions(planner))
    forward: Callable[..., tuple[Tensor, None]] = attention_forward
    for name in _NAMES:
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, extent_mask)


register()
