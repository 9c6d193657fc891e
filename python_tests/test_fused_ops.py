"""Products that share an input, as operations: groups of weights, and gate, up and activation in one call."""

import itertools

import pytest
import reference
import torch
from fused_models import assert_gated_close
from torch.nn import functional

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, TiledBitmap

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

DTYPES = [torch.float32, torch.bfloat16]
LEVELS = [isa for isa, supported in backend.isa_levels() if supported]


def tiled(weight):
    return TiledBitmap.from_bitmap(BitmapTensor.from_dense(weight))


def weights(cols, rows, dtype, sparsity=0.6):
    return [reference.sparse_matrix(n, cols, sparsity, dtype) for n in rows]


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- the operations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", LEVELS)
def test_a_group_has_the_bits_of_separate_calls(dtype, isa):
    with backend.force_isa(isa):
        for cols, tokens in itertools.product((1, 31), (0, 1, 3, 16, 17, 64, 65)):
            parts = [tiled(w) for w in weights(cols, (33, 1, 16, 0, 70), dtype)]
            biases = [torch.randn(w.shape[0]).to(dtype) if i % 2 else None for i, w in enumerate(parts)]
            x = torch.randn(tokens, cols).to(dtype)
            together = ops.bitmap_linear_group(x, parts, biases)
            for y, weight, bias in zip(together, parts, biases, strict=True):
                assert torch.equal(y, ops.bitmap_linear(x, weight, bias))


def test_a_group_is_shared_out_over_threads(threads):
    parts = [tiled(w) for w in weights(513, (1030, 16, 700), torch.bfloat16)]
    x = torch.randn(3, 513).bfloat16()
    for y, weight in zip(ops.bitmap_linear_group(x, parts), parts, strict=True):
        assert torch.equal(y, ops.bitmap_linear(x, weight))
    gated = ops.gated_linear(x, parts[0], parts[0], "silu")
    torch.set_num_threads(3 - threads)
    assert torch.equal(gated, ops.gated_linear(x, parts[0], parts[0], "silu"))


@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", LEVELS)
def test_gated_linear_matches_separate_operations(dtype, isa, activation):
    with backend.force_isa(isa):
        for cols, rows, tokens in itertools.product((1, 33), (0, 1, 45), (0, 1, 16, 17, 65)):
            gate, up = map(tiled, weights(cols, (rows, rows), dtype))
            biases = [torch.randn(rows).to(dtype) for _ in range(2)]
            x = 2 * torch.randn(tokens, cols).to(dtype)
            for pair in ((None, None), biases, (biases[0], None)):
                actual = ops.gated_linear(x, gate, up, activation, *pair)
                parts = [ops.bitmap_linear(x, w, b) for w, b in zip((gate, up), pair, strict=True)]
                assert_gated_close(actual, *parts, activation)


def every_number(dtype):
    """All bfloat16 numbers, infinities and NaNs among them."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).to(dtype)


def activate_every_number(activation, dtype):
    numbers = every_number(dtype)
    zeros, ones = tiled(torch.zeros(len(numbers), 1, dtype=dtype)), torch.ones(len(numbers), dtype=dtype)
    return ops.gated_linear(torch.zeros(1, 1, dtype=dtype), zeros, zeros, activation, numbers, ones)[0]


EXACT = {  # in double, in forms that keep their digits where the result is tiny
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / 2**0.5),
    "gelu_pytorch_tanh": lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    "relu": functional.relu,
}


@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", sorted({key.isa for key in backend.kernels(op="gate") if key.supported}))
def test_activations_over_every_bfloat16_number(isa, dtype, activation):
    numbers = every_number(dtype)
    with backend.force_isa(isa):
        actual = activate_every_number(activation, dtype)
    exact = EXACT[activation](numbers.double())
    assert torch.equal(actual.isnan(), exact.isnan())
    finite = numbers.isfinite()
    # A few float32 roundings of the result, one of exp's argument (at most 104: beyond, nothing is left), one to
    # the dtype; an exponential that overflows, from e^88.7 on, takes results below 3e-37 to zero.
    argument = numbers.double().abs().clamp(max=15 if "gelu" in activation else 104)[finite]
    roundings = 6 + (argument.square() if "gelu" in activation else argument)
    bound = exact[finite].abs() * (roundings * 2.0**-23 + reference.EPSILON[dtype]) + 3e-37
    assert ((actual.double() - exact)[finite].abs() <= bound).all()
    assert torch.equal(actual[~finite].isinf(), exact[~finite].isinf())


def test_silu_in_bfloat16_has_the_bits_of_torch():
    actual, expected = (
        activate_every_number("silu", torch.bfloat16),
        functional.silu(every_number(torch.bfloat16)),
    )
    usable = ~expected.isnan()
    assert torch.equal(actual[usable], expected[usable])


def test_inputs_of_any_rank_and_stride():
    gate, up = map(tiled, weights(30, (24, 24), torch.float32))
    x = torch.randn(4, 5, 60)[..., ::2]
    for y, weight in zip(ops.bitmap_linear_group(x, [gate, up]), (gate, up), strict=True):
        assert torch.equal(y, ops.bitmap_linear(x, weight))
    assert ops.gated_linear(x, gate, up, "relu").shape == (4, 5, 24)
    assert ops.gated_linear(torch.randn(30), gate, up, "relu").shape == (24,)


def test_wrong_arguments_are_refused():
    gate, other = map(tiled, weights(30, (24, 25), torch.float32))
    x = torch.randn(1, 30)
    with pytest.raises(ValueError, match="x has 31 features, the weight takes 30"):
        ops.bitmap_linear_group(torch.randn(1, 31), [gate])
    with pytest.raises(ValueError, match="0 weights and 0 biases"):
        ops.bitmap_linear_group(x, [])
    with pytest.raises(ValueError, match="2 weights and 1 biases"):
        ops.bitmap_linear_group(x, [gate, gate], [None])
    with pytest.raises(ValueError, match=r"gate is \(24, 30\) and up \(25, 30\)"):
        ops.gated_linear(x, gate, other, "silu")
    with pytest.raises(ValueError, match="activation is one of silu, .*; got 'tanh'"):
        ops.gated_linear(x, gate, gate, "tanh")
    for mixed in ([gate, tiled(torch.ones(3, 30).bfloat16())], [tiled(torch.ones(3, 30).bfloat16())]):
        with pytest.raises(ValueError, match="x is torch.float32, the weight torch.bfloat16"):
            ops.bitmap_linear_group(x, mixed)
    with pytest.raises(ValueError, match="the bias torch.bfloat16"):
        ops.gated_linear(x, gate, gate, "silu", torch.zeros(24).bfloat16())
    short = TiledBitmap(gate.values[:5], gate.masks, gate.tile_offsets, gate.shape)
    with pytest.raises(ValueError, match="only 5 values are there"):
        ops.bitmap_linear_group(x, [gate, short])


def test_operator_contract_and_gradients():
    gate, up = map(tiled, weights(30, (24, 24), torch.float32))
    x, bias = torch.randn(3, 30), torch.randn(24)
    arrays = [
        [w.values for w in (gate, up)],
        [w.masks for w in (gate, up)],
        [w.tile_offsets for w in (gate, up)],
    ]
    torch.library.opcheck(
        torch.ops.pysparse.bitmap_linear_group.default, (x, *arrays, [bias, None], [24, 24])
    )
    torch.library.opcheck(torch.ops.pysparse.gated_linear.default, (x, *arrays, [bias, None], 24, "gelu"))
    x.requires_grad_()
    bias.requires_grad_()
    ops.gated_linear(x, gate, up, "silu", bias).sum().backward()
    y, z = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    dense = [w.to_bitmap().to_dense() for w in (gate, up)]
    (functional.silu(functional.linear(y, dense[0], z)) * functional.linear(y, dense[1])).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, z.grad, rtol=1e-4, atol=1e-4)
    both = ops.bitmap_linear_group(x, [gate, up], [bias, None])
    assert all(part.requires_grad for part in both)
