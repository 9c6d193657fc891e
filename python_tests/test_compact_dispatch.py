"""Int8 and n:m layers take the way that measured costs say is fastest."""

import copy

import pytest
import reference
import torch
from test_dispatch import cache, made_up  # noqa: F401  the fixture is used by name
from test_nm import nm_matrix
from torch import nn

from pysparse import backend
from pysparse.formats import Int8Bitmap
from pysparse.nn import CompactLinear, sparsify_
from pysparse.ops import cost_cache
from pysparse.ops.costs import SHAPES
from pysparse.ops.ways import PATTERNS, WAYS, ways_of

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
SHAPE = (520, 640)  # more entries than a small weight has, and rows that fill no tile
KINDS = {
    "int8": {"values": "int8"},
    "int8-a16": {"values": "int8", "activation_bits": 16, "group_size": 64},
    "nm": {"pattern": "2:4"},
    "nm-int8": {"values": "int8", "pattern": "1:4"},
    "nm-int8-a16": {"values": "int8", "pattern": "1:4", "activation_bits": 16},
}


def compact_layer(kind, dtype=torch.float32, shape=SHAPE, pattern=None):
    options = {**KINDS[kind], **({"pattern": pattern} if pattern else {})}
    linear = nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False)
    n, m = map(int, options.get("pattern", "2:4").split(":"))
    linear.weight.data = nm_matrix(*shape, n, m, dtype)
    return linear, CompactLinear.from_dense(linear, **options)


def assert_product(y, x, linear, layer, tokens_quantised):
    """The product with the weight that the layer stands for."""
    if not tokens_quantised:
        return reference.assert_close(y, x, layer.weight, linear.bias)
    group = layer.group_size if layer.group_size < layer.in_features else None
    weight = Int8Bitmap.from_dense(linear.weight, group_size=group)
    return reference.assert_quantized_close(y, x, weight, linear.bias, layer.activation_bits)


def costs(monkeypatch, **picoseconds):
    monkeypatch.setattr(cost_cache, "measure", lambda dtype: made_up(**picoseconds))
    for dtype in (torch.float32, torch.bfloat16):
        cost_cache.tune(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_layer_has_its_kernel_and_an_unpacking(kind):
    _, layer = compact_layer(kind)
    assert layer._dispatch.kernel == kind
    assert layer._dispatch.unpacking == kind.removesuffix("-a16") + "-unpack"
    for way in (layer._dispatch.kernel, layer._dispatch.unpacking):
        assert WAYS[way].packing == kind.removesuffix("-a16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_follows_the_costs_for_any_number_of_tokens(cache, monkeypatch, kind, dtype):  # noqa: F811
    linear, layer = compact_layer(kind, dtype)
    packing = kind.removesuffix("-a16")
    x, few = torch.randn(2, 35, SHAPE[1]).to(dtype), torch.randn(3, SHAPE[1]).to(dtype)
    for cheap, way in ((kind, kind), (f"{packing}-unpack", f"{packing}-unpack")):
        costs(
            monkeypatch, **{kind: 2.0, f"{packing}-unpack": 2.0, cheap: 0.1}
        )  # unpacking takes what 16 tokens do, at least
        layer._dispatch.clear()
        for tokens in (x, few):
            y = layer(tokens)
            assert y.shape == (*tokens.shape[:-1], SHAPE[0])
            quantised = way == kind and kind != "nm"
            assert_product(y.reshape(-1, SHAPE[0]), tokens.reshape(-1, SHAPE[1]), linear, layer, quantised)
            assert layer.choice(tokens.numel() // SHAPE[1]).way == way
        assert "fastest by measured costs" in layer.kernel
    assert layer.second_packing_nbytes == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_copy_is_made_only_where_it_is_allowed_and_pays(cache, monkeypatch, kind):  # noqa: F811
    costs(monkeypatch, torch=1.0, kernel=9.0)
    linear, layer = compact_layer(kind)
    x, bare = torch.randn(100, SHAPE[1]), layer.nbytes
    layer(x)
    assert layer.nbytes == bare
    layer.prefill = "packed"
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, linear.bias))
    assert layer.second_packing_nbytes == layer.nbytes - bare == 4 * SHAPE[0] * SHAPE[1]
    assert "prefill=packed, second_packing=dense" in repr(layer)
    twin = copy.deepcopy(layer)
    layer.load_state_dict(twin.state_dict())
    assert layer.prefill == "packed"
    assert layer.nbytes == bare
    assert torch.equal(twin(x), y)
    narrow = layer.to(torch.bfloat16)
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    assert narrow.second_packing_nbytes == 2 * SHAPE[0] * SHAPE[1]


def test_one_token_asks_nothing_and_many_measure_once(cache):  # noqa: F811
    _, layer = compact_layer("int8")
    layer(torch.randn(1, SHAPE[1]))
    assert not list(cache.iterdir())
    assert "not measured yet" in layer.kernel
    layer(torch.randn(2, SHAPE[1]))
    assert [path.name for path in cache.iterdir()] == [cost_cache.cost_file(torch.float32).name]


def test_what_costs_know_nothing_of_switches_at_64_tokens(cache):  # noqa: F811
    """Generic kernels, small weights, inputs of another dtype than the layer's: the kernel, then the unpacking."""
    for layer in (compact_layer("nm", pattern="3:5")[1], compact_layer("int8", shape=(24, 40))[1]):
        assert [layer.choice(tokens).way for tokens in (64, 65)] == [
            layer._dispatch.kernel, layer._dispatch.unpacking,
        ]  # fmt: skip
        assert "not measured" in layer.choice(65).reason
        layer(torch.randn(65, layer.in_features))
    _, layer = compact_layer("int8")
    layer.register_parameter("bias", None)
    x = torch.randn(70, SHAPE[1]).bfloat16()
    reference.assert_close(layer(x), x, layer.weight.bfloat16(), None)
    assert not list(cache.iterdir())


def test_gradients_pass_whatever_is_chosen(cache, monkeypatch):  # noqa: F811
    costs(monkeypatch, torch=1.0)
    _, layer = compact_layer("int8")
    layer.prefill = "packed"
    x = torch.randn(5, SHAPE[1], requires_grad=True)
    layer(x).sum().backward()
    exact = layer.weight.double().sum(dim=0)
    torch.testing.assert_close(x.grad.double(), exact.expand(5, -1), rtol=0, atol=1e-4)
    assert layer.second_packing_nbytes == 0  # no dense copy for training


def test_sparsify_hands_its_wish_to_compact_layers(cache):  # noqa: F811
    for optimize, prefill in [("speed", "packed"), ("balanced", "auto"), ("memory", "unpack")]:
        model = nn.Sequential(compact_layer("nm")[0])
        sparsify_(model, optimize=optimize, values="int8")
        assert type(model[0]) is CompactLinear
        assert model[0].prefill == prefill
    with pytest.raises(ValueError, match="prefill is one of auto, packed, unpack; got 'fast'"):
        model[0].prefill = "fast"
    assert model[0].prefill == "unpack"


def test_patterns_are_costed_at_their_density():
    priced = made_up(**{"nm": 4.0})
    assert set(WAYS["nm"].densities) == {n / m for n, m in PATTERNS.values()}
    assert ways_of("nm-int8", 1, 16) == ("nm-int8-a16", "nm-int8-unpack")
    for density in PATTERNS:
        entries = SHAPES[1][0] * SHAPES[1][1]
        assert priced.predict("nm", SHAPES[1], density, 16) == pytest.approx(4e-12 * entries * 16)
