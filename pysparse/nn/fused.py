"""Fewer calls for the same numbers: gated MLPs, and sibling layers that share an input."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pysparse.nn.compact import CompactLinear
from pysparse.nn.gated import GatedMLP, GatedPlan, can_share
from pysparse.nn.linear import SparseLinear
from pysparse.nn.mixin import check_module
from pysparse.nn.shared_input import InputGroup, kin
from pysparse.nn.stacked import Example, RowStack, check_example, shared_inputs, why_apart


@dataclass(slots=True)
class FusionReport:
    """What :func:`fuse_` found, by the path of the parent module."""

    gated: dict[str, str] = field(default_factory=dict)  # what one call computes there
    watched: dict[str, tuple[str, ...]] = field(default_factory=dict)  # sibling layers, by name
    stacked: dict[str, tuple[str, ...]] = field(default_factory=dict)  # on a CUDA device: one weight by now
    apart: dict[tuple[str, ...], str] = field(
        default_factory=dict
    )  # paths that share an input there, why not


def fuse_(model: nn.Module, example: Example | None = None) -> FusionReport:
    """Let the sparse layers of ``model`` be computed in fewer calls, in place; modules, names and hooks stay.

    A module whose forward is ``down(activation(gate(x)) * up(x))`` computes activation and product along with the
    two weights (:class:`GatedMLP`). Other sparse layers with one parent and one input size are watched, and those
    that turn out to be called with the same tensor, such as query, key and value, are computed in one call
    (:class:`InputGroup`). Both concern a few tokens without gradients on the CPU; any other call goes the way it
    would without. ``state_dict()`` and saved files are the same. What is fused already stays as it is.

    Layers on a CUDA device are stacked (:class:`RowStack`): where they share an input, their rows become one weight
    that one kernel multiplies, for one token at a time. Which ones do is found by running ``model`` once on
    ``example`` (a tensor, positional arguments or a mapping of keyword arguments); without one, none is stacked.
    Arrays move meanwhile: capture CUDA graphs afterwards. TypeError for an example that is no input.

    Not the default: on the CPU each layer still makes a module call and an output tensor of its own, so what one
    call of the core saves is about what noticing the common input costs. Measured at one token and 70 % zeros, in
    the time of separate calls over that of fused ones: gated MLPs of 1024 inputs 1.02 to 1.18, of 4096 inputs 0.91
    to 1.05; query, key and value 0.8 to 0.98 (``benchmarks/results/fused_*.json``). Int8 values under a bitmap are
    fused likewise; n:m layers are not.
    """
    check_module(model)
    report = FusionReport()
    if example is not None:
        check_example(example)
        _stack(model, example, report)
    for path, module in list(model.named_modules()):
        children = {n: m for n, m in module.named_children() if can_share(m) and m._seat is None}
        if isinstance(module, GatedMLP) or len(children) < 2:
            continue
        plan = GatedPlan.of(module)
        if plan is not None:
            GatedMLP.fuse(module, plan)
            report.gated[path] = str(plan)
            children.pop(plan.gate)
            children.pop(plan.up)
        for names in _candidates(children):
            group = InputGroup(names)
            for seat, name in enumerate(names):
                children[name]._seat = (group, seat)
            report.watched[path] = report.watched.get(path, ()) + names
    return report


def _stack(model: nn.Module, example: Example, report: FusionReport) -> None:
    """Let sparse layers on a CUDA device that share an input in ``model(example)`` be one weight."""
    layers = {
        path: module
        for path, module in model.named_modules()
        if type(module) is SparseLinear
        and module.is_on_device
        and not (module._seat and module._seat[0].stacked)
    }
    for paths in shared_inputs(model, layers, example) if layers else ():
        members = [layers[path] for path in paths]
        why = why_apart(members)
        if why:
            report.apart[paths] = why
            continue
        parent = paths[0].rpartition(".")[0]
        names = tuple(path.rpartition(".")[2] for path in paths)
        RowStack(names, members)
        report.stacked[parent] = report.stacked.get(parent, ()) + names


def _candidates(children: dict[str, SparseLinear | CompactLinear]) -> list[tuple[str, ...]]:
    """Return the names of layers that could be called with one input: those of one kind, size and dtype."""
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, layer in children.items():
        alike[kin(layer)].append(name)
    return [tuple(names) for names in alike.values() if len(names) > 1]


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse_`, in place, and return ``model``: every layer is computed by a call of its own again."""
    for module in model.modules():
        if isinstance(module, GatedMLP):
            GatedMLP.unfuse(module)
        if isinstance(module, SparseLinear | CompactLinear):
            module._seat = None
    return model
