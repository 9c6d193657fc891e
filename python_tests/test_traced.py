"""Layers under torch's tracers and transforms: what they record or compute is the layer's own result."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from pysparse import backend, ops
from pysparse.nn import (
    CompactLinear,
    DenseLinear,
    SparseEmbedding,
    SparseEmbeddingBag,
    SparseLinear,
    fuse_,
    fuse_norms_,
)

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)


def pruned(rows=24, cols=32, dtype=torch.float32):
    linear = nn.Linear(cols, rows).to(dtype).requires_grad_(False)
    linear.weight.data *= torch.rand(rows, cols) < 0.4
    return linear


def two_of_four():
    linear = pruned()
    linear.weight.data.view(24, 8, 4)[:, :, 2:] = 0
    return linear


class Gated(nn.Module):
    """A gated MLP over packed layers."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (SparseLinear.from_dense(pruned(48)) for _ in range(2))
        self.down, self.act = SparseLinear.from_dense(pruned(32, 48)), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Siblings(nn.Module):
    """Layers that share an input."""

    def __init__(self):
        super().__init__()
        self.q, self.k = (SparseLinear.from_dense(pruned()) for _ in range(2))

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x)], dim=-1)


def fused(model):
    fuse_(model)
    for _ in range(3):
        model(torch.randn(1, 32))
    return model


def with_norm():
    model = nn.Sequential(nn.RMSNorm(32, eps=1e-5), DenseLinear.from_linear(pruned())).requires_grad_(False)
    assert fuse_norms_(model)
    return model


LAYERS = {
    "sparse": lambda: SparseLinear.from_dense(pruned()),
    "bf16": lambda: SparseLinear.from_dense(pruned(dtype=torch.bfloat16)),
    "int8": lambda: CompactLinear.from_dense(pruned(), values="int8"),
    "nm": lambda: CompactLinear.from_dense(two_of_four(), pattern="2:4"),
    "dense": lambda: DenseLinear.from_linear(pruned()),
    "gated": lambda: fused(Gated()),
    "siblings": lambda: fused(Siblings()),
    "norm": with_norm,
}


def input_of(layer, tokens=1):
    dtype = (
        torch.bfloat16 if isinstance(layer, SparseLinear) and layer.dtype == torch.bfloat16 else torch.float32
    )
    return torch.randn(tokens, 32, dtype=dtype)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def jit(layer, x):
    return torch.jit.trace(layer, (x,))


def export(layer, x):
    # Within another module: torch's export counts empty buffers of the outermost one.
    return torch.export.export(nn.Sequential(layer), (x,), strict=False).module()


def same(name, actual, expected):
    """Tell whether results agree: bit for bit, but where gate and up go separate ways, which round once more."""
    if name == "gated":
        return torch.allclose(actual, expected, atol=1e-6, rtol=1e-5)
    return torch.equal(actual, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "trace", [lambda layer, x: make_fx(layer)(x), jit, export], ids=["fx", "jit", "export"]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_traced_layer_computes_what_the_layer_does(name, trace):
    layer = LAYERS[name]()
    layer(input_of(layer))  # what one token needs is prepared: that must not be taken while tracing
    traced = trace(layer, input_of(layer))
    for _ in range(3):
        x = input_of(layer)
        assert same(name, traced(x), layer(x))


@pytest.mark.parametrize("name", ["sparse", "int8", "nm", "dense"])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_goes_token_by_token(name):
    layer = LAYERS[name]()
    layer(input_of(layer))
    x = torch.randn(3, 32)
    expected = torch.stack([layer(row[None])[0] for row in x])
    assert torch.equal(torch.func.vmap(lambda row: layer(row[None])[0])(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_mode_sees_the_kernels(name):
    """What counts or replaces operations, as FlopCounterMode, meets ours under their names."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer = LAYERS[name]()
    x = input_of(layer)
    expected = layer(x)
    with Watch():
        actual = layer(x)
    assert same(name, actual, expected)
    assert any(func.startswith("pysparse.") for func in seen), seen
    with FlopCounterMode(display=False):
        assert same(name, layer(x), expected)


@pytest.mark.parametrize("build", [SparseEmbedding, SparseEmbeddingBag])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tables(build):
    table = (nn.Embedding if build is SparseEmbedding else nn.EmbeddingBag)(50, 8).requires_grad_(False)
    table.weight.data *= torch.rand(50, 8) < 0.4
    layer = build.from_dense(table)
    ids = torch.randint(0, 50, (3, 5))
    for trace in (jit, export, lambda layer, x: make_fx(layer)(x)):
        traced = trace(copy.deepcopy(layer), ids)
        other = torch.randint(0, 50, (3, 5))
        assert torch.equal(traced(other), layer(other))


def test_nothing_is_traced_by_default():
    assert not ops.is_traced()
