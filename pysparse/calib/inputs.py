"""The rows that weight matrices are multiplied with, from the arguments of the modules that own them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse.calib.offload import data_of

Slot = tuple[str, int]  # a parameter, and which expert or group of channels of it
WEIGHT: Slot = ("weight", 0)  # of a layer with one matrix

_PATCHES = 1 << 22  # elements unfolded at a time


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """Rows that one matrix sees in one call of its module."""

    slot: Slot
    rows: Tensor  # [tokens, in_features]
    source: Tensor | None  # what the module was given, when it is all of it: one source, the same rows


def input_rows(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Input]:
    """Yield what the matrices of ``module`` are multiplied with when it is called with these arguments."""
    if isinstance(module, nn.Conv2d):
        yield from _patches(module, _first(args, kwargs))
    elif is_fused_experts(module):
        yield from _expert_rows(module, args, kwargs)
    else:
        inputs = _first(args, kwargs)
        yield Input(WEIGHT, inputs.detach().reshape(-1, inputs.shape[-1]), inputs)


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
    return inputs


def _patches(conv: nn.Conv2d, images: Tensor) -> Iterator[Input]:
    """Yield, for each group of channels, the patches [B * L, in / groups * kh * kw] under the kernel."""
    images = images.detach() if images.dim() == 4 else images.detach()[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    area = conv.kernel_size[0] * conv.kernel_size[1]
    per_image = images.shape[1] * area * max(1, images.shape[2] * images.shape[3])
    for part in torch.split(images, max(1, _PATCHES // per_image)):
        padded = functional.pad(part, conv._reversed_padding_repeated_twice, mode=mode)
        columns = functional.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
        groups = columns.unflatten(1, (conv.groups, -1))  # [B, G, in / G * kh * kw, L]
        for group in range(conv.groups):
            yield Input(("weight", group), groups[:, group].transpose(1, 2).flatten(0, 1), None)


def is_fused_experts(module: nn.Module) -> bool:
    """Tell transformers' experts in one module: matrices [E, ., .] behind one interface for all families."""
    down = module._parameters.get("down_proj")
    return (
        down is not None
        and down.dim() == 3
        and all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
        and module._parameters.get(expert_input_name(module)) is not None
    )


def expert_input_name(module: nn.Module) -> str:
    """Return the name of the parameter that fused experts apply first."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def _expert_rows(experts: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Input]:
    """Yield each expert's tokens, and what its second matrix sees: the gated outputs of its first."""
    hidden, chosen = _routing(args, kwargs)
    name = expert_input_name(experts)
    firsts = data_of(experts, name).to(hidden.device)  # an offloaded module's own parameters have no data yet
    biases = data_of(experts, f"{name}_bias").to(hidden.device) if experts.has_bias else None
    for expert in range(experts.down_proj.shape[0]):
        rows = hidden[(chosen == expert).any(dim=1)]
        if not len(rows):
            continue
        yield Input((name, expert), rows, None)
        inner = rows @ (firsts[expert] if experts.is_transposed else firsts[expert].t())
        if biases is not None:
            inner = inner + biases[expert]
        gated = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        yield Input(("down_proj", expert), gated, None)


def _routing(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the tokens [T, H] and the experts [T, k] chosen for them, however they were passed."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    hidden = next(value for value in tensors if value.is_floating_point())
    chosen = next(value for value in tensors if not value.is_floating_point())
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    return hidden, chosen.reshape(len(hidden), -1)
