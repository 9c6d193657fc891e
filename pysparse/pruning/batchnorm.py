"""Batch normalisation around pruning: folded into the convolution before it, or measured anew after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_SAME = 1e-3  # of the largest output: what rounding may change
Forward = Callable[[Any], Any]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Return ``model(batch)``, with keywords for a mapping."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the batch normalisations of ``model`` that hold running statistics, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _NORMS) and module.running_mean is not None
    }


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> int:
    """Set the running means and variances of every batch normalisation to those of ``batches``; return how many.

    Only the normalisations are in training mode meanwhile (so dropout stays off), with a cumulative average;
    weights and modes stay as they were. ``forward(batch)`` runs the model, ``model(batch)`` by default (keywords
    for a mapping). Raises ValueError for no batches, and leaves the statistics as they were.
    """
    norms = batch_norms(model)
    call = forward or partial(run_batch, model)
    modes = {module: (module.training, module.momentum) for module in norms.values()}
    kept = {module: _statistics(module) for module in norms.values()}
    count = 0
    try:
        for module in norms.values():
            module.reset_running_stats()  # type: ignore[operator]
            module.train()
            module.momentum = None  # type: ignore[assignment]
        for batch in batches:
            call(batch)
            count += 1
    finally:
        for module, (training, momentum) in modes.items():
            module.train(training)
            module.momentum = momentum
            if not count:
                for name, value in kept[module].items():
                    getattr(module, name).copy_(value)
    if norms and not count:
        raise ValueError("no calibration batch: the statistics of batch normalisation stay as they were")
    return len(norms)


def _statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: getattr(module, name).clone() for name in names if getattr(module, name) is not None}


@torch.no_grad()
def fold_batch_norm_(model: nn.Module, example: Any, forward: Forward | None = None) -> list[tuple[str, str]]:
    """Fold each batch normalisation into the convolution or linear layer that feeds it; return the pairs of paths.

    One forward pass over ``example`` shows who feeds whom: a pair is folded when the normalisation is given the
    very tensor that a layer returned, and no other module is. The layer gets a bias, the normalisation becomes an
    Identity. Raises ValueError for a model in training mode, and, with everything undone, when the model gives
    other outputs afterwards (a layer's output was used outside of modules, too).
    """
    if any(module.training for module in batch_norms(model).values()):
        raise ValueError("batch normalisation is folded with its running statistics: call model.eval() first")
    call = forward or partial(run_batch, model)
    pairs, before = _feeding_pairs(model, lambda: call(example))
    undo = [_fold(model, source, norm) for source, norm in pairs]
    after = first_tensor(call(example))
    difference, scale = float((after - before).abs().max()), float(before.abs().max())
    if not difference <= _SAME * max(scale, 1.0):
        for restore in undo:
            restore()
        raise ValueError(
            f"folding batch normalisation changes the outputs by {difference:.3g} of {scale:.3g}: the output of a "
            "layer must be used elsewhere, too; nothing was changed"
        )
    return pairs


def first_tensor(output: Any) -> torch.Tensor:
    """Return the first floating-point tensor of a module's output, also in a tuple of it; TypeError without one."""
    found = _first_tensor(output)
    if found is None:
        raise TypeError(f"{type(output).__name__} holds no floating-point tensor")
    return found


def _first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    if not isinstance(output, tuple | list) and not hasattr(output, "values"):
        return None
    values = output.values() if hasattr(output, "values") else output
    return next((found for value in values if (found := _first_tensor(value)) is not None), None)


def _feeding_pairs(model: nn.Module, call: Callable[[], Any]) -> tuple[list[tuple[str, str]], torch.Tensor]:
    outputs: dict[
        int, tuple[str, torch.Tensor]
    ] = {}  # by id; the tensor is kept alive, so that ids stay its own
    readers: dict[str, list[str]] = {}

    def hook_for(path: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for tensor in inputs:
                if id(tensor) in outputs:
                    readers.setdefault(outputs[id(tensor)][0], []).append(path)
            if isinstance(module, nn.Conv2d | nn.Linear):
                outputs[id(output)] = (path, output)

        return hook

    leaves = {path: module for path, module in model.named_modules() if not any(module.children())}
    handles = [module.register_forward_hook(hook_for(path, module)) for path, module in leaves.items()]
    try:
        result = first_tensor(call())
    finally:
        for handle in handles:
            handle.remove()
    norms = batch_norms(model)
    return [
        (source, paths[0]) for source, paths in readers.items() if len(paths) == 1 and paths[0] in norms
    ], result


def _fold(model: nn.Module, source: str, norm_path: str) -> Callable[[], None]:
    """Fold one pair and return what undoes it."""
    layer, norm = model.get_submodule(source), model.get_submodule(norm_path)
    before = layer.weight, layer.bias
    fuse: Any = fuse_conv_bn_weights if isinstance(layer, nn.Conv2d) else fuse_linear_bn_weights
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    parent, _, name = norm_path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())

    def undo() -> None:
        layer.weight, layer.bias = before
        setattr(model.get_submodule(parent), name, norm)

    return undo
