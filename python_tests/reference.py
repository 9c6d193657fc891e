"""The oracle: products in float64, and the tolerance that follows from dtype and length of the sum."""

import torch

EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def linear(x, weight, bias=None):
    """Return x @ weight.T + bias in float64."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def assert_close(actual, x, weight, bias=None):
    """Compare with the oracle: k float32 roundings of the sum of magnitudes, one rounding of the result."""
    expected = linear(x, weight, bias)
    magnitude = linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    k = max(1, weight.shape[1])
    bound = k * EPSILON[torch.float32] * magnitude + EPSILON[actual.dtype] * expected.abs() * 1.01 + 1e-37
    same = (actual.double() == expected) | (expected.isnan() & actual.isnan())
    worst = ((actual.double() - expected).abs() - bound)[~same]
    assert not worst.isnan().any(), "a NaN where the oracle has none, or the reverse"
    assert not (worst > 0).any(), f"off by {worst.max().item():.3e} beyond the bound"


def sparse_matrix(rows, cols, sparsity, dtype, generator=None):
    """Return a normal random matrix with that fraction of zeros, an empty and a full row among the rest."""
    weight = torch.randn(rows, cols, generator=generator)
    keep = torch.rand(rows, cols, generator=generator) >= sparsity
    if rows > 2:
        keep[1], keep[2] = False, True
    return (weight * keep).to(dtype)
