"""Wanda the slow way: full forward passes of the whole model, sums in float64, a stable sort of every row."""

import copy

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pysparse.models.discover import discover


def weights(model, targets=("Linear", "Conv2d")):
    return {layer.path: layer.weight for layer in discover(model, targets).layers}


def differing(left, right):
    """Fraction of positions where one is zero and the other is not."""
    ours, theirs = weights(left), weights(right)
    pairs = [(ours[path] != 0, weight != 0) for path, weight in theirs.items()]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


class _ExpertProducts(TorchFunctionMode):
    """Sees the products with slices of fused expert weights, as the model itself makes them in eager mode."""

    def __init__(self, layers):
        super().__init__()
        self.paths = {
            (one.module, one.parameter, one.expert): one.path for one in layers if one.expert is not None
        }
        self.storages = {
            (getattr(module, name).data_ptr() + expert * getattr(module, name)[0].nbytes): path
            for (module, name, expert), path in self.paths.items()
        }
        self.sums = {}
        self.tokens = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and args[1].data_ptr() in self.storages:
            path = self.storages[args[1].data_ptr()]
            self.sums[path] = self.sums.get(path, 0.0) + args[0].double().square().flatten(0, -2).sum(dim=0)
        return func(*args, **(kwargs or {}))


def _squares(layer, inputs):
    """The sum of squares of what each weight is multiplied with, [1 or groups, in_features]."""
    x = inputs.double()
    if not isinstance(layer.module, nn.Conv2d):
        return x.square().flatten(0, -2).sum(dim=0)[None]
    conv = layer.module
    # A weight's gradient under a gradient of ones is the sum of its inputs: here, of their squares.
    weight = torch.ones(conv.groups, *conv.weight.shape[1:], dtype=torch.double, requires_grad=True)
    out = nn.functional.conv2d(
        x.square(), weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    return gradient.flatten(1)


def slow_wanda(model, batches, sparsity, sees_pruned=True, targets=("Linear", "Conv2d")):
    """Prune ``model`` in place; ``batches`` are keyword arguments of its forward pass, one sequence each."""
    source = model if sees_pruned else copy.deepcopy(model)
    if hasattr(source.config, "_experts_implementation"):
        source.config._experts_implementation = "eager"
    for index in range(len(discover(model, targets).blocks)):
        goals = discover(model, targets).layers_of(index)
        watched = discover(source, targets).layers_of(index)
        sums = {}

        def add(layer):
            def hook(module, inputs):
                with torch.enable_grad():
                    sums[layer.path] = sums.get(layer.path, 0.0) + _squares(layer, inputs[0].detach())  # noqa: B023

            return hook

        handles = [
            layer.module.register_forward_pre_hook(add(layer)) for layer in watched if layer.expert is None
        ]
        products = _ExpertProducts(watched)
        with torch.no_grad(), products:
            for batch in batches:
                source(**batch)
        for handle in handles:
            handle.remove()
        sums.update({path: value[None] for path, value in products.sums.items()})
        for layer in goals:
            norms = sums.get(layer.path, torch.ones(1, layer.shape[1], dtype=torch.double)).sqrt()
            scores = layer.weight.double().abs() * norms.repeat_interleave(layer.shape[0] // len(norms), 0)
            order = scores.argsort(dim=1, stable=True)[:, : int(sparsity * scores.shape[1] + 1e-9)]
            layer.write(layer.weight.scatter(1, order, 0.0))
    return model
