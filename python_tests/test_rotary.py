"""Rotary position embedding in one call: the bits of the eager code, and whose calls it takes."""

import sys
import types

import pytest
import tiny_models
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from pysparse import backend, ops
from pysparse.nn import fuse_rotary_, unfuse_rotary_

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

DTYPES = [torch.float32, torch.bfloat16]
LEVELS = sorted({key.isa for key in backend.kernels(op="rotary") if key.supported})


def eager(query, key, cosine, sine):
    """As transformers writes it."""

    def turn(x):
        low, high = x.chunk(2, dim=-1)
        return x * cosine.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sine.unsqueeze(1)

    return turn(query), turn(key)


def draw(dtype, batch=2, heads=(4, 2), rows=5, dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, rows, n, dim) for n in heads] + [(batch, rows, dim)] * 2
    parts = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return [part.transpose(1, 2) if part.dim() == 4 else part for part in parts]  # as projections lie


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", LEVELS)
def test_every_level_has_the_bits_of_the_eager_code(isa, dtype):
    with backend.force_isa(isa):
        for dim in (2, 6, 16, 30, 32, 62, 80, 128):
            parts = draw(dtype, dim=dim, seed=dim)
            assert_same(ops.rotary(*parts), eager(*parts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_shared_angles_and_threads(dtype):
    query, key, cosine, sine = draw(dtype, rows=70)
    expected = eager(query, key, cosine[:1], sine[:1])
    for given in ((query, key), (query.contiguous(), key.contiguous()), (query.mT.contiguous().mT, key)):
        assert_same(ops.rotary(*given, cosine[:1], sine[:1]), expected)
    actual = ops.rotary(query, key, cosine[:1].expand(2, -1, -1), sine[:1].expand(2, -1, -1))
    assert_same(actual, expected)
    assert actual[0].stride() == query.stride()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(ops.rotary(query, key, cosine[:1], sine[:1]), expected)
    finally:
        torch.set_num_threads(threads)
    assert ops.rotary(*draw(dtype, rows=0))[0].shape == (2, 4, 0, 64)


def test_bad_input_is_named():
    query, key, cosine, sine = draw(torch.float32)
    for change, message in [
        ({"query": query[..., :62]}, r"\(2, 4, 5, 62\)"),
        ({"key": key[:, :, :4]}, r"\(2, 2, 4, 64\)"),
        ({"sine": sine[0]}, r"\(5, 64\)"),
        ({"cosine": cosine.bfloat16()}, "torch.bfloat16"),
        ({"key": key.to("meta")}, "meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.rotary(**({"query": query, "key": key, "cosine": cosine, "sine": sine} | change))
    odd = draw(torch.float32, dim=5)
    with pytest.raises(ValueError, match="an even D"):
        ops.rotary(*odd)


@pytest.fixture
def counted(monkeypatch):
    calls, function = [], backend.core().rotary

    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(backend.core(), "rotary", call)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_keeps_its_bits(counted, dtype):
    model, tokens = tiny_models.tiny("llama", dtype), tiny_models.tokens(2, 9)
    original = modeling_llama.apply_rotary_pos_emb
    with torch.no_grad():
        expected = model(tokens).logits
    try:
        assert fuse_rotary_(model) == fuse_rotary_(model) == (modeling_llama.__name__,)
        counted.clear()
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, expected)
            assert len(counted) == model.config.num_hidden_layers
            compiled = torch.compile(modeling_llama.apply_rotary_pos_emb, backend="eager", fullgraph=True)
            assert_same(compiled(*draw(dtype)), eager(*draw(dtype)))
        model(tokens).logits.sum().backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad.any()
        assert len(counted) == model.config.num_hidden_layers
        parts = draw(dtype)
        assert_same(modeling_llama.apply_rotary_pos_emb(*parts, unsqueeze_dim=1), eager(*parts))
        assert len(counted) == model.config.num_hidden_layers
    finally:
        assert unfuse_rotary_(model) is model
    assert modeling_llama.apply_rotary_pos_emb is original


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, cosine, sine: eager(q, k, sine, cosine),
        lambda q, k, cosine, sine: tuple(x * 1.0 for x in (q, k)),
        lambda q, k, cosine, sine: eager(q.double(), k.double(), cosine.double(), sine.double()),
        lambda q, k, angles: (q, k),
        lambda q, k, cosine, sine: q,
    ],
)
def test_a_function_that_computes_something_else_is_left_alone(function, monkeypatch):
    file = types.ModuleType("modeling_other")
    file.apply_rotary_pos_emb = function
    monkeypatch.setitem(sys.modules, file.__name__, file)
    attention = type("Attention", (nn.Module,), {"__module__": file.__name__})
    assert fuse_rotary_(nn.Sequential(attention())) == ()
    assert file.apply_rotary_pos_emb is function
