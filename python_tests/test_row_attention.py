"""A decoding step's attention: the kernels beside the definition in float64, and who is sent to them."""

import pytest
import tiny_models
import torch
from transformers import DynamicCache

import pysparse
from pysparse import backend, ops
from pysparse.models.static_decode import cache_keyword

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

DTYPES = [torch.float32, torch.bfloat16]
LEVELS = sorted({key.isa for key in backend.kernels(op="row-attention") if key.supported})
# batch, query heads, key heads, keys, dim, value dim
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 4, 4, 5, 16, 8), (1, 6, 2, 37, 64, 64), (2, 4, 1, 64, 80, 33), (1, 3, 3, 65, 19, 130),
          (1, 8, 2, 300, 128, 128)]  # fmt: skip


def draw(shape, dtype, seed=0):
    batch, heads, key_heads, keys, dim, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, 1, dim), (key_heads, keys, dim), (key_heads, keys, width))
    return [torch.randn(batch, *size, generator=generator).to(dtype) for size in sizes]


def oracle(query, key, value, scale):
    ratio = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(ratio, dim=1) for part in (key, value))
    weights = torch.softmax(query.double() @ key.transpose(2, 3) * scale, dim=-1)
    return (weights @ value).transpose(1, 2)


def assert_close(actual, query, key, value, scale):
    """Errors of float32 sums: of the logits, as a factor of the weights, and of the result; then its rounding."""
    expected = oracle(query, key, value, scale)
    assert actual.shape == expected.shape
    ulp, dim, keys = 2.0**-23, query.shape[3], key.shape[2]
    products = (
        query.double().abs() @ key.double().abs().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    )
    size = float(value.abs().max())
    logits = ulp * (dim + 4) * abs(scale) * float(products.max())
    bound = size * (2 * logits + ulp * (2 * keys + 8)) + torch.finfo(actual.dtype).eps * expected.abs()
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", LEVELS)
def test_every_level_is_the_softmax_product(isa, dtype):
    with backend.force_isa(isa):
        for seed, shape in enumerate(SHAPES):
            call = draw(shape, dtype, seed)
            assert_close(ops.row_attention(*call, 0.3), *call, 0.3)


@pytest.mark.parametrize("isa", LEVELS)
def test_large_logits_and_strided_caches(isa):
    query, key, value = draw((2, 4, 2, 50, 32, 32), torch.float32)
    query, long = query * 40, torch.zeros(2, 2, 80, 64)
    long[:, :, :50, :32], long[:, :, :50, 32:] = key, value  # a cache with room, keys and values side by side
    with backend.force_isa(isa):
        actual = ops.row_attention(query, long[:, :, :50, :32], long[:, :, :50, 32:], 1.0)
        assert_close(actual, query, key, value, 1.0)
        assert torch.equal(ops.row_attention(query, key, value, 1.0), actual)
        turned = key.mT.contiguous().mT  # copied first
        assert torch.equal(ops.row_attention(query, turned, value, 1.0), actual)


@pytest.mark.parametrize("isa", LEVELS)
def test_non_finite_values_spread_as_in_the_definition(isa):
    query, key, value = draw((1, 3, 3, 20, 32, 32), torch.float32)
    key[0, 0, 4, 1], value[0, 1, 7, 2], key[0, 2, 3, 0] = torch.nan, torch.inf, torch.inf
    expected = oracle(query, key, value, 0.2)
    with backend.force_isa(isa):
        actual = ops.row_attention(query, key, value, 0.2)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("shape", [(1, 8, 1, 3000, 64, 64), (1, 8, 8, 400, 64, 64)])
def test_threads_change_no_bit(shape):
    call, threads = draw(shape, torch.bfloat16), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(ops.row_attention(*call, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, results[0]) for one in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (1, 3, 5, 8)}, r"\(1, 3, 5, 8\).*Hk divides Hq"),
        ({"query": (1, 4, 2, 8)}, r"\(1, 4, 2, 8\)"),
        ({"value": (1, 2, 6, 8)}, r"\(1, 2, 6, 8\)"),
        ({"query": (4, 1, 8)}, r"\(4, 1, 8\)"),
        ({"key": (1, 2, 0, 8), "value": (1, 2, 0, 8)}, "no other size is 0"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    shapes = {"query": (1, 4, 1, 8), "key": (1, 2, 5, 8), "value": (1, 2, 5, 8)} | change
    with pytest.raises(ValueError, match=message):
        ops.row_attention(**{name: torch.zeros(shape) for name, shape in shapes.items()}, scale=1.0)


def test_other_dtypes_devices_and_gradients_are_refused():
    call = draw((1, 4, 2, 5, 8, 8), torch.float32)
    assert ops.can_row_attend(*call)
    with pytest.raises(ValueError, match=r"torch.float32, torch.bfloat16 and torch.float32"):
        ops.row_attention(call[0], call[1].bfloat16(), call[2], 1.0)
    with pytest.raises(ValueError, match="key on meta"):
        ops.row_attention(call[0], call[1].to("meta"), call[2], 1.0)
    assert not ops.can_row_attend(*(part.half() for part in call))
    assert not ops.can_row_attend(call[0].requires_grad_(), *call[1:])
    assert not ops.can_row_attend(torch.zeros(1, 4, 2, 8), *call[1:])


def last_logits(model):
    """Of a token that comes after a prompt in the cache."""
    tokens, cache = tiny_models.tokens(1, 12), {cache_keyword(model): DynamicCache(config=model.config)}
    model(tokens[:, :-1], use_cache=True, **cache)
    return model(tokens[:, -1:], use_cache=True, **cache).logits


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_decodes_by_it(dtype):
    model = tiny_models.tiny("llama", dtype)
    expected = last_logits(model)
    pysparse.use_attention(model)
    with pysparse.attention_options() as log:
        actual = last_logits(model)
    layers = model.config.num_hidden_layers
    assert log.fallbacks["decoding step"] == log.total("dense").calls - layers == layers
    assert log.total("torch").calls == 0
    size = float(expected.abs().max()) * (16 if dtype == torch.bfloat16 else 64)
    assert (actual - expected).abs().max() <= torch.finfo(dtype).eps * size
