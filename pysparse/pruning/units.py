"""The parts of a model that are reconstructed together, in the order in which they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.pruning.layout import BlockLayout, PrunableLayer


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Modules that run one after the other, each on the output of the one before; the first holds a weight."""

    path: str
    paths: tuple[str, ...]
    layers: tuple[PrunableLayer, ...]  # the weights in it
    channels_last: bool  # of its outputs: features last, or images [B, C, H, W]


def units_of(layout: BlockLayout, call: Callable[[], Any], granularity: str) -> list[Unit]:
    """Return the units of "op", "layer" or "block" granularity that hold prunable weights.

    ``call`` runs the model once; the order is that of the calls, and a "layer" ends where an output is read
    by no module or several, or by one with prunable weights or that runs more than once. Raises ValueError
    when a weight is never used.
    """
    trace = _Trace(layout, call)
    if granularity == "block":
        units = []
        for index, (path, block) in enumerate(layout.blocks):
            layers = layout.layers_of(index)
            if layers:
                units.append(Unit(path, (path,), layers, _channels_last(block)))
        return units
    by_module: dict[str, list[PrunableLayer]] = {}
    for layer in layout.layers:
        by_module.setdefault(_module_path(layout.model, layer), []).append(layer)
    unused = [path for path in by_module if path not in trace.order]
    if unused:
        raise ValueError(
            f"{len(unused)} layers were not called, {unused[0]} first: their outputs cannot be matched"
        )
    result = []
    for path in trace.order:
        if path in by_module:
            paths = (path,) if granularity == "op" else trace.chain(path, set(by_module))
            last = _channels_last(by_module[path][0].module)
            result.append(Unit(path, paths, tuple(by_module[path]), last))
    return result


def _module_path(model: nn.Module, layer: PrunableLayer) -> str:
    return next(str(path) for path, module in model.named_modules() if module is layer.module)


def _channels_last(module: nn.Module) -> bool:
    """Tell whether outputs have their channels last: no convolution is inside."""
    return not any(isinstance(inner, nn.Conv2d) for inner in module.modules())


class _Trace:
    """Which modules without children ran, in order, and who read whose output."""

    def __init__(self, layout: BlockLayout, call: Callable[[], Any]) -> None:
        self.order: list[str] = []
        self._readers: dict[str, list[str]] = {}
        self._calls: Counter[str] = Counter()
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # kept alive, so that ids stay their own
        leaves = {path: m for path, m in layout.model.named_modules() if not any(m.children())}
        handles = [module.register_forward_hook(self._hook(path)) for path, module in leaves.items()]
        try:
            with torch.no_grad():
                call()
        finally:
            for handle in handles:
                handle.remove()
            self._outputs.clear()

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._calls[path] += 1
            if path not in self.order:
                self.order.append(path)
            for tensor in inputs:
                if id(tensor) in self._outputs:
                    self._readers.setdefault(self._outputs[id(tensor)][0], []).append(path)
            if isinstance(output, Tensor):
                self._outputs[id(output)] = (path, output)

        return hook

    def chain(self, path: str, prunable: set[str]) -> tuple[str, ...]:
        """Return ``path`` and what follows it, up to a fork, an operation outside of modules, or a prunable layer.

        A module that runs more than once (one activation for all layers) ends it too: which call is meant is not
        known from the module.
        """
        paths = [path]
        while True:
            readers = self._readers.get(paths[-1], [])
            if len(readers) != 1 or readers[0] in prunable or self._calls[readers[0]] != 1:
                return tuple(paths)
            paths.append(readers[0])
