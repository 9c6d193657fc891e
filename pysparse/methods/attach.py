"""Masked layers in the place of a model's own while it is trained, and back, merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from pysparse.nn import Adapter, MaskedLowRank
from pysparse.pruning import BlockLayout


class Attached:
    """The layers of ``layout``, whose zeros are their masks, as :class:`MaskedLowRank` layers of its model.

    The model must be float32. Between construction and :meth:`merge` its own layers are empty.
    """

    def __init__(self, layout: BlockLayout, adapters: Mapping[str, Adapter], *, dropout: float = 0.0) -> None:
        """Replace the layers; those without an entry in ``adapters`` (by path) train their kept weights.

        Raises ValueError, before any layer is replaced, for layers that are no linear layers.
        """
        for layer in layout.layers:
            if layer.expert is not None or isinstance(layer.module, nn.Conv2d):
                raise ValueError(
                    f"{layer.path} is no linear layer: adapters of it are not supported; ignore it"
                )
        self.layout = layout
        self.layers: dict[str, MaskedLowRank] = {}
        for layer in layout.layers:
            weight, adapter = layer.weight, adapters.get(layer.path)
            masked = MaskedLowRank(weight, weight != 0, adapter, bias=layer.bias, dropout=dropout)
            masked.train(layer.module.training)
            self.layers[layer.path] = masked
            layout.model.set_submodule(layer.path, masked)
            _set_weight(layer.module, torch.empty(0))  # the masked layer holds it until merge()

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters as they are now, by path."""
        return {path: layer.adapter for path, layer in self.layers.items() if layer.adapter is not None}

    def merge(self, dtype: torch.dtype = torch.float32) -> dict[str, Adapter]:
        """Put the model's own layers back with merged weights, and return the adapters (copies).

        Weights are float32 and rounded to ``dtype``; they are zero exactly where the masks are.
        """
        kept = {path: _copy(adapter) for path, adapter in self.adapters.items()}
        for layer in self.layout.layers:
            masked = self.layers.pop(layer.path)
            weight = masked.merged_weight(dtype).float()
            _set_weight(layer.module, weight.t().contiguous() if layer.transposed else weight)
            layer.module.train(masked.training)
            self.layout.model.set_submodule(layer.path, layer.module)
        return kept

    @contextmanager
    def withdrawn(self) -> Iterator[None]:
        """Have the model's own layers with their base weights, without the adapters, inside the block."""
        for layer in self.layout.layers:
            weight = self.layers[layer.path].base_weight
            _set_weight(layer.module, weight.t().contiguous() if layer.transposed else weight)
            self.layout.model.set_submodule(layer.path, layer.module)
        try:
            yield
        finally:
            for layer in self.layout.layers:
                _set_weight(layer.module, torch.empty(0))
                self.layout.model.set_submodule(layer.path, self.layers[layer.path])


def _set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    module.get_parameter("weight").data = weight


def _copy(adapter: Adapter) -> Adapter:
    return Adapter(adapter.up.clone(), adapter.down.clone(), adapter.scale)


@contextmanager
def float32_master(model: nn.Module) -> Iterator[None]:
    """Keep every parameter as float32 inside the block, and in its own dtype again afterwards.

    Parameters stay the same objects, so ties hold. ``requires_grad`` is off inside and as it was afterwards.
    """
    before = [(one, one.dtype, one.requires_grad) for one in model.parameters()]
    floating = [item for item in before if item[0].is_floating_point()]
    for parameter, *_ in floating:
        parameter.requires_grad_(False)
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype, wanted in floating:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(wanted)


@contextmanager
def restored_after_error(layout: BlockLayout) -> Iterator[None]:
    """Give the layers of ``layout`` their weights back when the block fails, in the very bits."""
    before = [
        (layer.module, layer.module.get_parameter("weight").detach().clone()) for layer in layout.layers
    ]
    try:
        yield
    except BaseException:
        for layer, (module, weight) in zip(layout.layers, before, strict=True):
            _set_weight(module, weight)
            layout.model.set_submodule(layer.path, module)
        raise
