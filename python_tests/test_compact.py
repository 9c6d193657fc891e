"""CompactLinear: layers with int8 values and n:m patterns, alone and in whole models."""

import copy
import pickle

import pytest
import reference
import torch
from test_nm import nm_matrix
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pysparse import backend
from pysparse.formats import Int8Bitmap, NMInt8, NMTensor, TiledInt8
from pysparse.measure.report import report
from pysparse.nn import CompactLinear, DenseLinear, Packing, SparseLinear, densify_, sparsify_

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
KINDS = {
    "int8": ({"values": "int8"}, TiledInt8),
    "int8-g32-a16": ({"values": "int8", "group_size": 32, "activation_bits": 16}, TiledInt8),
    "2:4": ({"pattern": "2:4"}, NMTensor),
    "2:4-int8": ({"values": "int8", "pattern": "2:4"}, NMInt8),
    "3:5-int8": ({"values": "int8", "pattern": "3:5"}, NMInt8),
}


def pruned_linear(cols=40, rows=24, dtype=torch.float32, bias=True, pattern=(2, 4), fewer=True):
    linear = nn.Linear(cols, rows, bias=bias, dtype=dtype)
    linear.weight.data = nm_matrix(rows, cols, *pattern, dtype, fewer=fewer)
    return linear


def layer_of(kind, **arguments):
    options, container = KINDS[kind]
    pattern = tuple(map(int, options.get("pattern", "2:4").split(":")))
    linear = pruned_linear(pattern=pattern, **arguments)
    layer = CompactLinear.from_dense(linear, **options)
    assert type(layer.packed()) is container
    return linear, layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_product_with_the_weight_it_stands_for(kind, dtype):
    linear, layer = layer_of(kind, dtype=dtype)
    x, bias = torch.randn(3, 40).to(dtype), linear.bias.detach()
    y, options = layer(x).detach(), KINDS[kind][0]
    if "values" in options:
        weight = Int8Bitmap.from_dense(linear.weight, group_size=options.get("group_size"))
        reference.assert_quantized_close(y, x, weight, bias, options.get("activation_bits", 8))
        assert torch.equal(layer.weight, weight.to_dense(dtype))
    else:
        reference.assert_close(y, x, linear.weight.detach(), bias)
        assert torch.equal(layer.weight, linear.weight)
    assert layer.bias is linear.bias
    assert layer.nnz == int((linear.weight != 0).sum())
    assert layer.sparsity == pytest.approx(1 - layer.nnz / linear.weight.numel())
    assert torch.equal(layer.to_dense().weight, layer.weight)
    assert layer.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind):
    _, layer = layer_of(kind)
    _, other = layer_of(kind)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = torch.randn(2, 40)
    assert torch.equal(other(x), layer(x))
    state, again = layer.state_dict(), other.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(state[name], again[name]) for name in state)
    other.load_state_dict({name: tensor + 0 for name, tensor in state.items()})


def test_state_dict_names_are_the_documented_ones():
    names = {kind: list(layer_of(kind)[1].state_dict()) for kind in KINDS}
    assert names["int8"] == ["compressed", "bitmask", "row_offsets", "scales", "shape", "bias"]
    assert names["2:4"] == ["compressed", "bitmask", "row_offsets", "shape", "bias"]
    assert names["2:4-int8"] == names["int8"]
    state = layer_of("int8")[1].state_dict()
    assert state["compressed"].dtype == torch.int8
    assert tuple(state["scales"].shape) == (24, 1)


@pytest.mark.parametrize(
    ("kind", "name", "damage", "message"),
    [
        ("int8", "row_offsets", lambda t: t + 1, "row_offsets"),
        ("int8", "compressed", lambda t: t[:-1], "are stored"),
        ("int8", "scales", lambda t: t * float("nan"), "scales must be finite"),
        ("int8", "shape", lambda t: t + 1, r"shape says \[25, 41\], the layer is \[24, 40\]"),
        ("2:4", "compressed", lambda t: t[:-1], "are stored"),
        ("2:4", "bitmask", lambda t: t | 255, "row_offsets"),
        ("3:5-int8", "bitmask", lambda t: t.flip(1), "row_offsets|pattern 3:5 keeps 3 of 5"),
        ("2:4-int8", "scales", lambda t: t[:-1], "scales must be float32"),
        ("2:4-int8", "bias", lambda t: t[:-1], "bias has shape"),
    ],
)
def test_load_state_dict_refuses_damage(kind, name, damage, message):
    _, layer = layer_of(kind)
    x = torch.randn(1, 40)
    before = layer(x)
    state = layer.state_dict()
    state[name] = damage(state[name])
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)
    del state[name]
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_copy_pickle_and_change_dtype(kind):
    _, layer = layer_of(kind)
    x = torch.randn(2, 40)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    narrow = copy.deepcopy(layer).to(torch.bfloat16)
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(narrow(x.bfloat16()).float(), y, atol=0.1, rtol=0.1)
    if "values" in KINDS[kind][0]:  # scales keep their 32 bits
        assert torch.equal(narrow.packed().scales, layer.packed().scales)
    with FakeTensorMode():
        elsewhere = torch.empty(0, device="cuda")
    with pytest.raises(RuntimeError, match="CPU kernels only, not on cuda:0: call densify_"):
        layer._apply(lambda _: elsewhere)


def test_sparsify_and_densify_a_model():
    model = nn.Sequential(
        pruned_linear(40, 32, fewer=False), nn.SiLU(), pruned_linear(32, 16, fewer=False), nn.Linear(16, 5)
    ).eval()
    dense, x = copy.deepcopy(model), torch.randn(3, 40)
    converted = sparsify_(model, values="int8", pattern="2:4", activation_bits=16)
    assert [type(m) for m in (model[0], model[2], model[3])] == [CompactLinear, CompactLinear, DenseLinear]
    assert set(converted.sparse) == {"0", "2"}
    assert not model[0].training
    assert ((model(x) - dense(x)).norm() / dense(x).norm()) < 0.02
    layers = {layer.path: layer for layer in report(model).layers}
    assert layers["0"].kernel.startswith("linear-nm-int8-float32-")
    assert layers["0"].stored_bytes == model[0].nbytes
    expected = model[0].weight
    densify_(model)
    assert [type(m) for m in (model[0], model[2], model[3])] == [nn.Linear] * 3
    assert torch.equal(model[0].weight, expected)
    assert type(copy.deepcopy(dense)[0]) is nn.Linear
    sparsify_(dense)
    assert type(dense[0]) is SparseLinear


@pytest.mark.parametrize(
    ("pattern", "fewer", "kept"),
    [
        ((2, 4), False, True),
        ((1, 8), False, True),
        ((4, 8), False, False),
        ((3, 5), False, False),
        ((2, 4), True, False),
    ],
)
@pytest.mark.parametrize("values", [None, "int8"])
def test_compact_indices_are_taken_where_they_pay(pattern, fewer, kept, values):
    """4:8 takes more bits than a mask, 3:5 has no vector kernel, and groups with fewer than n waste places."""
    linear = pruned_linear(80, 64, torch.bfloat16, pattern=pattern, fewer=fewer)
    if fewer:
        linear.weight.data[16:48] = 0
    model = nn.Sequential(linear)
    sparsify_(model, pattern=f"{pattern[0]}:{pattern[1]}", values=values)
    if kept:
        assert model[0].packing == Packing(values, f"{pattern[0]}:{pattern[1]}")
    elif values is None:
        assert type(model[0]) is SparseLinear
    else:
        assert model[0].packing == Packing("int8")
    if values is None:
        assert torch.equal(model[0].weight, linear.weight)


def test_bitmap_layers_are_quantised_too_and_others_left():
    model = nn.Sequential(pruned_linear(), nn.Linear(24, 8))
    expected = Int8Bitmap.from_dense(model[0].weight, group_size=8).to_dense()
    sparsify_(model)
    assert [type(m) for m in model] == [SparseLinear, DenseLinear]
    found = sparsify_(model, values="int8", group_size=8)
    assert [type(m) for m in model] == [CompactLinear, DenseLinear]
    assert list(found.sparse) == ["0"]
    assert torch.equal(model[0].weight, expected)
    again = model[0]
    sparsify_(model, values="int8")
    assert model[0] is again  # int8 values are not quantised anew


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (
            lambda w: w[2, 4:8].fill_(1),
            {"pattern": "2:4"},
            "layer '2': pattern 2:4 keeps 2 of 4, but 1 groups",
        ),
        (
            lambda w: w[2, 0].fill_(float("nan")),
            {"values": "int8"},
            "layer '2': 1 weights are NaN or infinite",
        ),
        (
            lambda w: w[2, 0].fill_(float("inf")),
            {"values": "int8"},
            "layer '2': 1 weights are NaN or infinite",
        ),
    ],
)
def test_a_model_is_changed_as_a_whole_or_not_at_all(damage, options, message):
    model = nn.Sequential(pruned_linear(), nn.SiLU(), pruned_linear(24, 16))
    damage(model[2].weight.data)
    before = list(model)
    with pytest.raises(ValueError, match=message):
        sparsify_(model, **options)
    assert list(model) == before


def test_float16_layers_run_densely_and_say_so():
    _, layer = layer_of("int8", dtype=torch.float16)
    x = torch.randn(2, 40).half()
    with pytest.warns(RuntimeWarning, match="no kernel for torch.float16"):
        y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))
    assert "unpack + dense torch" in layer.kernel


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_and_rows_of_zeros(kind):
    linear, layer = layer_of(kind)
    assert layer(torch.randn(0, 40)).shape == (0, 24)
    assert layer(torch.randn(2, 0, 40)).shape == (2, 0, 24)
    assert not linear.weight[1].any()
    assert torch.equal(layer(torch.randn(3, 40))[:, 1], linear.bias[1].expand(3))


def test_bytes_are_those_of_the_arrays():
    layer = layer_of("int8-g32-a16")[1]
    nnz, tiles, quads, groups = layer.nnz, 2, 10, 2
    assert layer.nbytes == (nnz + 64) + 8 * tiles * quads + 8 * (tiles + 1) + (4 + 4) * groups * 16 * tiles
    assert layer.nbytes == sum(buffer.nbytes for buffer in layer.buffers())
    rows = layer.packed().to_int8()
    assert rows.nbytes == nnz + 24 * 5 + 24 * 8 + 24 * 2 * 4


def test_impossible_requests_are_refused():
    linear = pruned_linear()
    for arguments, message in [
        ({}, 'give values="int8", a pattern such as "2:4", or both'),
        ({"values": "int4"}, "values is \"int8\" or None, got 'int4'"),
        ({"pattern": "4-2"}, "n kept of m"),
        ({"pattern": "1:4"}, "pattern 1:4 keeps 1 of 4, but row 0, columns"),
        ({"pattern": "2:4", "group_size": 32}, 'group_size=32 needs values="int8"'),
        ({"values": "int8", "activation_bits": 4}, "activation_bits is 8 or 16, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            CompactLinear.from_dense(linear, **arguments)
    layer = CompactLinear.from_dense(linear, values="int8")
    with pytest.raises(ValueError, match="x has 41 features, the layer takes 40"):
        layer(torch.randn(1, 41))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph_and_under_autocast(kind):
    _, layer = layer_of(kind)
    x = torch.randn(2, 40)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x.bfloat16()).dtype == torch.float32
    assert "int8" in repr(layer) or "pattern=2:4" in repr(layer)
