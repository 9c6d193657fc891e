"""Int8 layers that share an input: the operations, the layers, and what a prepared weight must notice."""

import copy
import itertools
import pickle

import pytest
import reference
import tiny_models
import torch
from fused_models import MLP, Attention, assert_gated_close, packed
from torch import nn

from pysparse import backend, ops
from pysparse.formats import Int8Bitmap, TiledInt8
from pysparse.measure.twins import zero_at_random_
from pysparse.nn import CompactLinear, fuse_, sparsify_, unfuse_

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

DTYPES = [torch.float32, torch.bfloat16]
LEVELS = [isa for isa, supported in backend.isa_levels() if supported]


@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def tiled(rows, cols, group_size=None):
    weight = reference.sparse_matrix(rows, cols, 0.6, torch.float32)
    return TiledInt8.from_int8(Int8Bitmap.from_dense(weight, group_size=group_size))


# --- the operations


@pytest.mark.parametrize("bits", ops.ACTIVATION_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", LEVELS)
def test_a_group_has_the_bits_of_separate_calls(isa, dtype, bits):
    with backend.force_isa(isa):
        for cols, tokens in itertools.product((1, 31), (0, 1, 3, 16, 17, 64, 65)):
            parts = [tiled(n, cols, 8 if n == 16 else None) for n in (33, 1, 16, 0, 70)]
            biases = [torch.randn(w.shape[0]).to(dtype) if i % 2 else None for i, w in enumerate(parts)]
            x = torch.randn(tokens, cols).to(dtype)
            together = ops.int8_linear_group(x, parts, biases, bits)
            for y, weight, bias in zip(together, parts, biases, strict=True):
                assert torch.equal(y, ops.int8_linear(x, weight, bias, bits))


@pytest.mark.parametrize("bits", ops.ACTIVATION_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", LEVELS)
def test_gated_linear_matches_separate_operations(isa, dtype, bits):
    names = itertools.cycle(ops.ACTIVATIONS)
    with backend.force_isa(isa):
        for cols, rows, tokens in itertools.product((1, 33), (0, 1, 45), (0, 1, 16, 17, 65)):
            gate, up, activation = tiled(rows, cols), tiled(rows, cols, 4), next(names)
            bias = torch.randn(rows).to(dtype)
            x = 2 * torch.randn(2, tokens, cols).to(dtype)
            actual = ops.int8_gated_linear(x, gate, up, activation, bias, None, bits)
            separate = ops.int8_linear(x, gate, bias, bits), ops.int8_linear(x, up, None, bits)
            assert_gated_close(actual, *separate, activation)


def test_any_number_of_threads_gives_the_same_bits():
    parts, x = [tiled(n, 513) for n in (1030, 16, 700)], torch.randn(3, 1026).bfloat16()[:, ::2]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gated = ops.int8_gated_linear(x, parts[0], parts[0], "silu")
            results.append(torch.cat([*ops.int8_linear_group(x, parts), gated], dim=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][:, 1030:1046], ops.int8_linear(x, parts[1]))


def test_a_token_with_a_nan_spoils_itself_alone():
    gate, x = tiled(40, 24), torch.randn(3, 24)
    x[1, 5] = torch.nan
    (y,), gated = ops.int8_linear_group(x, [gate]), ops.int8_gated_linear(x, gate, gate, "silu")
    for result in (y, gated):
        assert result[1].isnan().all()
        assert result[::2].isfinite().all()


def test_wrong_arguments_are_refused():
    gate, other, x = tiled(24, 30), tiled(25, 30), torch.randn(1, 30)
    for call, message in (
        (lambda: ops.int8_linear_group(torch.randn(1, 31), [gate]), "x has 31 features, the weight takes 30"),
        (lambda: ops.int8_linear_group(x, []), "0 weights and 0 biases"),
        (lambda: ops.int8_linear_group(x, [gate, gate], [None]), "2 weights and 1 biases"),
        (lambda: ops.int8_linear_group(x, [gate], None, 4), "activation_bits is 8 or 16, got 4"),
        (lambda: ops.int8_linear_group(x.half(), [gate]), "x is torch.float16"),
        (lambda: ops.int8_gated_linear(x, gate, other, "silu"), r"gate is \(24, 30\) and up \(25, 30\)"),
        (lambda: ops.int8_gated_linear(x, gate, gate, "tanh"), "activation is one of silu, .*; got 'tanh'"),
        (
            lambda: ops.int8_gated_linear(x, gate, gate, "silu", torch.zeros(24).bfloat16()),
            "the bias torch.bfloat16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_core_refuses_what_does_not_fit_together():
    def operand(weight, bits=8):
        arrays = weight.values, weight.masks, weight.tile_offsets, weight.scales, weight.row_sums
        return ops.Int8Operand(*arrays, None, weight.shape[0], weight.group_size, bits)

    gate, other, x = operand(tiled(24, 30)), operand(tiled(25, 30)), torch.randn(1, 30)
    with pytest.raises(ValueError, match="gate has 24 rows, up 25"):
        ops.PreparedInt8((gate, other), 30, x.dtype).gated(x, "silu")
    with pytest.raises(ValueError, match="a gate and an up weight, got 1 weights"):
        ops.PreparedInt8((gate,), 30, x.dtype).gated(x, "silu")
    with pytest.raises(ValueError, match="1 output for 2 weights"):
        ops.PreparedInt8((gate, other), 30, x.dtype).linear(x)
    with pytest.raises(ValueError, match="masks hold 16 words"):
        ops.PreparedInt8((gate,), 40, x.dtype).linear(torch.randn(1, 40))
    with pytest.raises(ValueError, match="only 5 values are there"):
        ops.PreparedInt8((gate._replace(values=gate.values[:5]),), 30, x.dtype).group(x)
    with pytest.raises(ValueError, match=r"activation_bits are \[8, 16\]: one is shared"):
        ops.PreparedInt8((gate, other._replace(activation_bits=16)), 30, x.dtype)


# --- layers


@pytest.fixture
def counted(monkeypatch):
    """How often the core was called, by what; unprepared single products are not counted."""
    core, counts = backend.core(), dict.fromkeys(("linear", "group", "gated"), 0)
    base, counting = core.PreparedInt8, type("Counting", (core.PreparedInt8,), {})
    for name in counts:
        original = getattr(base, name)

        def call(self, *arguments, _name=name, _original=original):
            counts[_name] += 1
            return _original(self, *arguments)

        setattr(counting, name, call)
    monkeypatch.setattr(core, "PreparedInt8", counting)
    return counts


def shared(**options):
    """A model of int8 layers whose q, k, v, and gate and up, are computed together, and its unfused twin."""
    model = nn.ModuleList([Attention(), MLP(nn.SiLU())])
    packed(model, values="int8", **options)
    plain = copy.deepcopy(model)
    fuse_(model)
    for _ in range(2):
        model[0](torch.randn(1, 32))
    return model, plain


def assert_same_model(model, plain, x):
    for actual, expected in zip(model[0](x), plain[0](x), strict=True):
        assert torch.equal(actual, expected)
    y, z = model[1](x), plain[1](x)
    # what goes into `down` may be one unit off, and is quantised once more
    assert (y - z).abs().max() <= 0.02 * z.abs().max()


@pytest.mark.parametrize("options", [{}, {"group_size": 8, "activation_bits": 16}], ids=["rows", "groups"])
def test_siblings_and_gated_mlps_are_computed_in_one_call(counted, options):
    model, plain = shared(**options)
    assert "one call with k, v" in repr(model[0].q)
    assert "one call for silu(gate) * up" in repr(model[1])
    for tokens in (1, 2, 16, 200):
        assert_same_model(model, plain, torch.randn(tokens, 32))
    for tokens in (1, 2):
        x = torch.randn(tokens, 32)
        model[0](x), model[1](x)
        counted.update(dict.fromkeys(counted, 0))
        model[0](x), model[1](x)
        assert counted == {"linear": 2 if tokens == 1 else 0, "group": 1, "gated": 1}  # o and down; q, k, v
    unfuse_(model)
    assert all(layer._seat is None for layer in model.modules() if isinstance(layer, CompactLinear))
    assert type(model[1]) is MLP


def replace_weight(layer):
    other = CompactLinear.from_dense(pruned(layer), values="int8")
    layer.load_state_dict({**other.state_dict(), "bias": layer.bias.clone()})


def pruned(layer):
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight.data = reference.sparse_matrix(layer.out_features, layer.in_features, 0.6, torch.float32)
    return linear


def move_values(layer):
    layer.values.data = layer.values.data.clone()
    layer.scales.data = 2 * layer.scales.data


def move_bias(layer):
    layer.bias.data = layer.bias.data + 1


@pytest.mark.parametrize(
    "change",
    [
        replace_weight, move_values, move_bias, lambda layer: layer.scales.mul_(2),
        lambda layer: layer.values.neg_(), lambda layer: layer.bias.add_(1), lambda layer: layer.bfloat16().float(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["q", "v", "o"])
def test_a_change_of_a_layer_is_seen_at_the_next_call(change, name):
    torch.manual_seed(0)
    model, _ = shared()
    x = torch.randn(1, 32)
    model[0](x)
    layer = model[0].get_submodule(name)
    model[0].q(x)  # v's result lies ready
    change(layer)
    layer.row_sums.copy_(CompactLinear.from_dense(layer.to_dense(), values="int8").row_sums)
    expected = ops.int8_linear(x, layer.packed(), layer.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)


def test_layers_of_different_kinds_are_not_computed_together():
    model = Attention()
    for name, options in (
        ("q", {"values": "int8"}),
        ("k", {"values": "int8", "activation_bits": 16}),
        ("v", {}),
    ):
        sparsify_(model, filter_fn=lambda _, path, name=name: path == name, dense_kernels=False, **options)
    assert not fuse_(model).watched
    model = packed(nn.ModuleList([Attention(), MLP(nn.SiLU())]))
    for layer in (model[0].q, model[1].gate):
        keep = torch.arange(32).expand_as(layer.to_dense().weight) % 4 < 2
        linear = layer.to_dense()
        linear.weight.data = keep.float()
        parent, name = (model[0], "q") if layer is model[0].q else (model[1], "gate")
        setattr(parent, name, CompactLinear.from_dense(linear, values="int8", pattern="2:4"))
    report = fuse_(model)
    assert report.watched["0"] == ("k", "v", "o")
    assert not report.gated


def test_copies_pickles_and_state_dicts():
    model, plain = shared()
    x = torch.randn(1, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(getattr(layer, "_prepared", None) is None for layer in other.modules())
        for _ in range(3):
            assert_same_model(other, plain, x)
        assert other[0].q._seat[0] is other[0].k._seat[0]
        assert other[0].q._seat[0] is not model[0].q._seat[0]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_gradient_and_a_graph_take_the_separate_layers(counted):
    model, plain = shared()
    x, y = (torch.ones(1, 32, requires_grad=True) for _ in range(2))
    sum(part.square().sum() for part in model[0](x)).backward()
    sum(part.square().sum() for part in plain[0](y)).backward()
    assert torch.equal(x.grad, y.grad)
    with torch.no_grad():
        compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
        expected = plain[0](x)
        counted.update(dict.fromkeys(counted, 0))
        for actual, wanted in zip(compiled(x), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert counted == {"linear": 0, "group": 0, "gated": 0}


def test_other_dtypes_and_sizes_take_their_own_way():
    model, plain = shared()
    x = torch.randn(1, 32)
    model.bfloat16()
    plain.bfloat16()
    for _ in range(2):
        assert_same_model(model, plain, x.bfloat16())
    with pytest.raises(ValueError, match="x has 31 features, the layer takes 32"):
        model[0].q(torch.randn(1, 31))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0].q(x), plain[0].q(x))


def test_a_model_generates_the_same():
    model = tiny_models.tiny("llama")
    zero_at_random_(model, 0.6)
    sparsify_(model, values="int8", min_sparsity=0.3)
    plain = copy.deepcopy(model)
    report = fuse_(model)
    assert len(report.gated) == len(report.watched) == 3
    ids = tiny_models.tokens(1, 4)
    for _ in range(3):
        a, b = model(input_ids=ids).logits, plain(input_ids=ids).logits
        assert (a - b).abs().max() <= 0.02 * b.abs().max()
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
