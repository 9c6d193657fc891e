"""A layer with correlated inputs, its pruning by SparseGPT and what that costs, for the tests of its parts."""

import torch

from pysparse.methods import InverseHessian, Magnitude, ObsUpdate, Wanda
from pysparse.pruning import NM, Unstructured

STRUCTURES = [Unstructured("row"), Unstructured("matrix"), NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 7)]
SCORES = [InverseHessian(), Wanda(), Magnitude()]


def layer(rows=24, cols=48, tokens=200, seed=0, spread=1.0):
    """A weight and correlated inputs with their statistics."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    x = torch.randn(tokens, cols, generator=generator) @ mix * torch.logspace(-spread, spread, cols)
    return weight, x, {"gram": x.T @ x, "squared_norm": x.square().sum(dim=0)}


def error(weight, pruned, x):
    """The squared output error, in float64."""
    return float(((weight.double() - pruned.double()) @ x.double().T).square().sum())


def solve(weight, stats, structure, sparsity=0.5, importance=None, **settings):
    importance = InverseHessian() if importance is None else importance
    return ObsUpdate(**settings).solve(weight, stats, importance, structure, sparsity)


def sparsity_of(structure):
    return structure.fixed_sparsity or 0.5
