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


def quantize_tokens(x, bits=8):
    """Return whole numbers and float32 scales [tokens, 1], by the rule that the kernels document."""
    levels = torch.tensor(127.0 if bits == 8 else 32512.0)
    largest = x.float().abs().amax(dim=1, keepdim=True) if x.shape[1] else torch.zeros(len(x), 1)
    inverse = levels / largest
    usable = inverse.isfinite()
    q = torch.where(usable, x.float() * inverse, torch.zeros(())).round()
    return q.double(), torch.where(usable, largest / levels, torch.zeros(()))


def assert_quantized_close(actual, x, weight, bias, bits):
    """Compare with exact sums of whole numbers: what is left are a few float32 roundings per group of columns.

    ``weight`` has int8 ``values``, ``scales`` and ``group_size``.
    """
    q, token_scale = quantize_tokens(x, bits)
    dense, groups = weight.to_dense(), weight.scales.shape[1]
    expected = torch.zeros(len(x), dense.shape[0], dtype=torch.float64)
    magnitude = torch.zeros_like(expected)
    for g in range(groups):
        columns = slice(g * weight.group_size, (g + 1) * weight.group_size)
        scale = weight.scales[:, g].double()
        whole = torch.where(scale > 0, dense[:, columns].double().T / scale, torch.zeros(())).round()
        term = (q[:, columns] @ whole) * scale
        expected += term
        magnitude += term.abs()
        if bits == 16:  # summed in two parts, of which the low bytes may cancel the high ones
            magnitude += (q[:, columns].abs().clamp(max=128) @ whole.abs()) * scale
    expected, magnitude = expected * token_scale.double(), magnitude * token_scale.double()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    roundings = groups + 6  # a conversion and a sum each group, parts, token scale, bias
    bound = (
        roundings * EPSILON[torch.float32] * magnitude + EPSILON[actual.dtype] * expected.abs() * 1.01 + 1e-37
    )
    excess = ((actual.double() - expected).abs() - bound).flatten()
    assert not excess.isnan().any(), "a NaN where the oracle has none"
    assert not (excess > 0).any(), f"off by {excess.max().item():.3e} beyond the bound"
