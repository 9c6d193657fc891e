"""Weights prepared for one token: nothing stale is ever read, whatever happens to the layer between two calls."""

import copy
import pickle

import pytest
import reference
import torch
from torch import nn

from pysparse import backend, ops
from pysparse.nn import SparseLinear

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)


def called(dtype=torch.float32, bias=True):
    """A layer that has prepared itself at its first call, and what it was made from."""
    linear = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    linear.weight.data = reference.sparse_matrix(40, 24, 0.6, dtype)
    layer = SparseLinear.from_dense(linear)
    with torch.no_grad():
        layer(torch.randn(1, 24).to(dtype))
    assert isinstance(layer._prepared, ops.Prepared)
    return linear, layer


@pytest.mark.parametrize("dtype", ops.KERNEL_DTYPES)
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 24), (1, 1, 24), (0, 24)])
def test_any_number_of_tokens_has_the_shape_and_values_of_the_product(dtype, shape):
    linear, layer = called(dtype)
    x = torch.randn(*shape).to(dtype)
    y = layer(x)
    assert y.shape == (*shape[:-1], 40)
    assert y.dtype == dtype
    reference.assert_close(y.reshape(-1, 40), x.reshape(-1, 24), linear.weight, linear.bias)


def replace_bias_data(linear, layer):
    layer.bias.data = layer.bias.data + 1


def add_to_bias(linear, layer):
    layer.bias.add_(1)


def replace_bias(linear, layer):
    linear.bias = layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)


def remove_bias(linear, layer):
    linear.bias = layer.bias = None


def load_another(linear, layer):
    other = called()[0]
    linear.weight.data = other.weight.data
    layer.load_state_dict({**SparseLinear.from_dense(other).state_dict(), "bias": layer.bias.clone()})


def move_values(linear, layer):
    layer.values.data = layer.values.data.clone()


def double_the_values(linear, layer):
    layer.values.mul_(2)
    linear.weight.data.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        replace_bias_data, add_to_bias, replace_bias, remove_bias, load_another, move_values, double_the_values,
    ],
)  # fmt: skip
def test_a_change_of_the_layer_is_seen_at_the_next_call(change):
    linear, layer = called()
    change(linear, layer)
    x = torch.randn(1, 24)
    reference.assert_close(layer(x), x, linear.weight, layer.bias)
    reference.assert_close(layer(x), x, linear.weight, layer.bias)  # prepared anew


def test_a_wrong_input_is_refused_as_before():
    layer = called()[1]
    with pytest.raises(ValueError, match="x has 23 features, the layer takes 24"):
        layer(torch.randn(1, 23))
    with pytest.raises(ValueError, match="x is torch.bfloat16, the weight torch.float32"):
        layer(torch.randn(1, 24).bfloat16())
    x = torch.randn(1, 48)[:, ::2]
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_copies_prepare_themselves():
    layer, x = called()[1], torch.randn(1, 24)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._prepared is None
        assert torch.equal(twin(x), layer(x))
        twin.values.zero_()
        assert not torch.equal(twin(x), layer(x))


def test_gradients_still_pass():
    linear, layer = called()
    x = torch.randn(1, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(dim=0, keepdim=True), rtol=1e-5, atol=1e-5)


def test_converted_layers_do_not_hold_on_to_what_they_had():
    layer = called()[1].to(torch.bfloat16)
    assert layer._prepared is None
    assert layer(torch.randn(1, 24).bfloat16()).dtype == torch.bfloat16


def test_the_core_refuses_the_wrong_number_of_weights():
    operand = called(bias=False)[1]._prepared.operands[0]
    two, x, y = ops.Prepared((operand, operand), 24), torch.randn(1, 24), torch.empty(1, 40)
    with pytest.raises(ValueError, match="1 output for 2 weights"):
        two.linear(x)
    with pytest.raises(ValueError, match="1 outputs for 2 weights"):
        two._core.group(x.data_ptr(), 1, [y.data_ptr()])
    with pytest.raises(ValueError, match="a gate and an up weight, got 1 weights"):
        ops.Prepared((operand,), 24).gated(x, "silu")
    with pytest.raises(ValueError, match="kernels take float32 and bfloat16 values, not torch.float16"):
        ops.Prepared((operand._replace(values=operand.values.half()),), 24)
