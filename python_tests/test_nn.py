"""SparseLinear, DenseLinear and the conversion of whole models."""

import copy
import pickle

import pytest
import reference
import torch
from torch import nn

from pysparse import backend
from pysparse.nn import DenseLinear, SparseLinear, densify_, sparsify_


def pruned_linear(cols=40, rows=24, sparsity=0.6, dtype=torch.float32, bias=True):
    linear = nn.Linear(cols, rows, bias=bias, dtype=dtype)
    linear.weight.data = reference.sparse_matrix(rows, cols, sparsity, dtype)
    return linear


def small_model(dtype=torch.float32):
    model = nn.Sequential(pruned_linear(40, 24), nn.SiLU(), pruned_linear(24, 16), nn.Linear(16, 5)).to(dtype)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_matches_the_dense_layer(dtype):
    linear = pruned_linear(dtype=dtype)
    layer = SparseLinear.from_dense(linear)
    x = torch.randn(3, 40).to(dtype)
    reference.assert_close(layer(x).detach(), x, linear.weight.detach(), linear.bias.detach())
    assert layer.bias is linear.bias
    assert torch.equal(layer.to_dense().weight, linear.weight)
    assert layer.nnz == int((linear.weight != 0).sum())
    assert layer.sparsity == pytest.approx(1 - layer.nnz / linear.weight.numel())


def test_state_dict_speaks_canonical_in_both_states():
    layer = SparseLinear.from_dense(pruned_linear())
    assert layer.is_packed == backend.available()
    state = layer.state_dict()
    assert list(state) == ["compressed", "bitmask", "row_offsets", "shape", "bias"]
    assert state["shape"].tolist() == [24, 40]
    other = SparseLinear(40, 24, nnz=0)
    assert not other.is_packed
    other.load_state_dict(state)
    x = torch.randn(2, 40)
    assert torch.equal(other(x), layer(x))
    again = other.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_load_state_dict_refuses_damage():
    layer = SparseLinear.from_dense(pruned_linear())
    for name, damage, message in [
        ("row_offsets", lambda t: t + 1, "row_offsets"),
        ("compressed", lambda t: t[:-1], "are stored"),
        ("shape", lambda t: t + 1, r"shape says \[25, 41\], the layer is \[24, 40\]"),
        ("bias", lambda t: t[:-1], "bias has shape"),
    ]:
        state = layer.state_dict()
        state[name] = damage(state[name])
        with pytest.raises(RuntimeError, match=message):
            SparseLinear(40, 24, nnz=0).load_state_dict(state)
    state = layer.state_dict()
    del state["bitmask"]
    with pytest.raises(RuntimeError, match="Missing key.*bitmask"):
        SparseLinear(40, 24, nnz=0).load_state_dict(state)


def test_module_moves_copies_and_pickles():
    model = small_model()
    sparsify_(model)
    x = torch.randn(2, 40)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert narrow[0].dtype == torch.bfloat16
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(narrow(x.bfloat16()).float(), y, atol=0.1, rtol=0.1)


def test_half_precision_takes_the_dense_path_and_says_so():
    layer = SparseLinear.from_dense(pruned_linear(dtype=torch.float16))
    backend._warned.clear()
    with pytest.warns(RuntimeWarning, match="no sparse kernel for torch.float16"):
        y = layer(torch.randn(2, 40).half())
    assert y.dtype == torch.float16
    layer(torch.randn(2, 40).half())  # the second call is silent


def test_sparsify_and_densify_a_model():
    model = small_model()
    dense = copy.deepcopy(model)
    x = torch.randn(3, 40)
    report = sparsify_(model)
    assert [type(m) for m in (model[0], model[2], model[3])] == [SparseLinear, SparseLinear, DenseLinear]
    assert set(report.sparse) == {"0", "2"}
    assert report.dense["3"].startswith("0% sparse, below 30%; compiled dense kernel")
    torch.testing.assert_close(model(x), dense(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x))
    assert not model.training
    assert not model[0].training
    assert densify_(model) is model
    assert [type(m) for m in (model[0], model[2], model[3])] == [nn.Linear] * 3
    for a, b in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(a, b)


def test_targets_ignore_and_filter():
    for arguments, expected in [
        ({"ignore": ["0"]}, {"2"}),
        ({"targets": ["re:^[0]$"]}, {"0"}),
        ({"filter_fn": lambda module, path: path == "2"}, {"2"}),
        ({"min_sparsity": 0.99}, set()),
    ]:
        assert set(sparsify_(small_model(), **arguments).sparse) == expected
    with pytest.raises(ValueError, match="min_sparsity is a fraction between 0 and 1, got 70"):
        sparsify_(small_model(), min_sparsity=70)


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 24), "head": nn.Linear(24, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    sparsify_(model)
    assert isinstance(model["head"], DenseLinear)
    assert model["head"].weight is model["embed"].weight


def test_pattern_is_checked():
    linear = nn.Linear(8, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2, 0, 0, 0, 3, 4, 0], [1, 2, 0, 0, 5, 6, 7, 0]])
    with pytest.raises(ValueError, match="1 groups keep more: row 1, columns 4 to 7 keep 3"):
        SparseLinear.from_dense(linear, pattern="2:4")
    linear.weight.data[1, 4] = 0
    assert SparseLinear.from_dense(linear, pattern="2:4").nnz == 8
    with pytest.raises(ValueError, match="n kept of m"):
        SparseLinear.from_dense(linear, pattern="4-2")


def test_wrong_input_and_missing_data_are_clear():
    layer = SparseLinear.from_dense(pruned_linear())
    with pytest.raises(ValueError, match="x has 41 features, the layer takes 40"):
        layer(torch.randn(1, 41))
    with pytest.raises(RuntimeError, match="no data yet"):
        SparseLinear(8, 8, nnz=3, device="meta").pack()
    with pytest.raises(ValueError, match=r"nnz=65 is outside \[0, 64\]"):
        SparseLinear(8, 8, nnz=65)
    with pytest.raises(ValueError, match="SparseLinear.from_dense"):
        sparsify_(pruned_linear())


def test_gradients_flow_through_a_frozen_sparse_layer():
    model = small_model()
    dense = copy.deepcopy(model)
    sparsify_(model)
    x = torch.randn(3, 40, requires_grad=True)
    expected = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    dense(expected).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-4)
    for layer in (0, 3):
        torch.testing.assert_close(model[layer].bias.grad, dense[layer].bias.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[3].weight.grad, dense[3].weight.grad, rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_the_weights_dtype():
    model = small_model(torch.bfloat16)
    sparsify_(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(torch.randn(2, 40)).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(mode):
    model = small_model()
    dense = copy.deepcopy(model)
    sparsify_(model)
    x = torch.randn(2, 40)
    compiled = torch.compile(model, fullgraph=True, backend=mode)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), dense(x))
    torch.testing.assert_close(compiled(x), dense(x))


def test_print_shows_shape_sparsity_and_kernel():
    layer = SparseLinear.from_dense(pruned_linear())
    assert "in_features=40, out_features=24" in repr(layer)
    assert "sparsity=0." in repr(layer)
    expected = "linear-bitmap-float32-" if backend.available() else "unpack + dense torch"
    assert expected in layer.kernel
