"""Scored blocks and evidence of plain layers, for what the tests of allocations share."""

import torch
from torch import nn

from pysparse.methods.blockwise import ScoredBlock
from pysparse.models.discover import discover
from pysparse.pruning import Evidence, PrunableLayer


def block(*weights, norms=None, index=0):
    """A scored block of the given weights; without ``norms`` every input channel has norm 1."""
    layers = []
    for number, weight in enumerate(weights):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight.data = weight
        a = torch.ones(weight.shape[1]) if norms is None else norms
        layers.append(
            Evidence(PrunableLayer(f"{index}.{number}", module, index), {"squared_norm": a.square()})
        )
    return ScoredBlock(tuple(layers))


def stack(sizes, seed=0):
    """Evidence of one square layer a block, of random weights of different strengths."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, size, generator=generator) ** (1 + i % 3) for i, size in enumerate(sizes)]
    return [block(weight, index=index).layers[0] for index, weight in enumerate(weights)]


def layout_of(layers):
    """A layout of the modules in ``layers``, one a block."""
    return discover(nn.Sequential(*(nn.Sequential(evidence.layer.module) for evidence in layers)))
