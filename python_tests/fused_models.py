"""Small modules as fuse_ meets them: attention with projections of one input, gated MLPs; and their tolerance."""

import reference
import torch
from torch import nn
from torch.nn import functional

from pysparse import ops
from pysparse.nn import sparsify_


class Attention(nn.Module):
    """q, k, v of one input, an output layer of the same size with another."""

    def __init__(self, cols=32, dtype=torch.float32, bias=True):
        super().__init__()
        for name, rows in (("q", cols), ("k", 16), ("v", 16), ("o", 16)):
            linear = nn.Linear(cols, rows, bias=bias, dtype=dtype)
            linear.weight.data = reference.sparse_matrix(rows, cols, 0.6, dtype)
            self.add_module(name, linear)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return q, k, v, self.o(q * 0.5)


class MLP(nn.Module):
    def __init__(self, activation, cols=32, rows=48, dtype=torch.float32, bias=False):
        super().__init__()
        self.gate, self.up = (nn.Linear(cols, rows, bias=bias, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(rows, cols, bias=bias, dtype=dtype)
        for linear in (self.gate, self.up, self.down):
            linear.weight.data = reference.sparse_matrix(*linear.weight.shape, 0.6, dtype)
        self.act = activation

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class FunctionalMLP(MLP):
    def forward(self, states):
        return self.down(self.up(states) * functional.gelu(self.gate(states), approximate="tanh"))


def packed(module, **options):
    """A module with sparse layers, each computed by a call of its own."""
    sparsify_(module.eval(), fuse=False, **options)
    return module


def assert_gated_close(actual, gate, up, activation):
    """Compare with ``activation(gate) * up`` of separate products, and allow what the docstring does.

    The activation may differ by a few float32 units of its argument and one rounding of its result; products with
    it are rounded once more.
    """
    active = ops.ACTIVATIONS[activation](gate)
    expected = active * up
    step = 2 * reference.EPSILON[actual.dtype]
    off_activation = step * active.double().abs() + 2.0**-21 * gate.double().abs()
    bound = off_activation * up.double().abs() * (1 + step) + step * expected.double().abs() + 1e-37
    excess = (actual.double() - expected.double()).abs() - bound
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert not (excess > 0).any(), f"{activation}: off by {excess.max().item():.3e} beyond the bound"
