"""Every compiled kernel against the float64 oracle: shapes, values, ISA levels, threads."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, TiledBitmap

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = [(0, 5), (5, 0), (1, 1), (16, 32), (17, 33), (15, 31), (33, 64), (100, 257), (48, 1024)]


def keys(op, format):
    found = [key for key in backend.kernels(op=op, format=format) if key.supported]
    missing = [key for key in backend.kernels(op=op, format=format) if not key.supported]
    return [pytest.param(key, id=str(key)) for key in found] + [
        pytest.param(key, id=str(key), marks=pytest.mark.skip(reason=f"this CPU lacks {key.isa}"))
        for key in missing
    ]


def tiled(weight, keep=None):
    return TiledBitmap.from_bitmap(BitmapTensor.from_dense(weight, keep))


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("key", keys("linear", "bitmap"))
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 16, 17, 64, 65])
def test_bitmap_linear_matches_the_oracle(key, tokens):
    dtype = DTYPES[key.dtype]
    for rows, cols in SIZES:
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            weight = reference.sparse_matrix(rows, cols, sparsity, dtype)
            x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
            with backend.force_isa(key.isa):
                for b in (None, bias):
                    reference.assert_close(ops.bitmap_linear(x, tiled(weight), b), x, weight, b)


@pytest.mark.parametrize("key", keys("linear", "bitmap"))
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_columns_of_unlike_density_in_one_tile(key, tokens):
    """A kernel that judges a tile by its first columns must be right about the others as well."""
    dtype, keep = DTYPES[key.dtype], torch.rand(33, 640) < 0.1
    for dense in (slice(320, None), slice(0, 320), slice(0, None, 2)):
        uneven = keep.clone()
        uneven[:, dense] = torch.rand(33, len(range(640)[dense])) < 0.95
        weight = (torch.randn(33, 640) * uneven).to(dtype)
        x = torch.randn(tokens, 640).to(dtype)
        with backend.force_isa(key.isa):
            reference.assert_close(ops.bitmap_linear(x, tiled(weight)), x, weight)


@pytest.mark.parametrize("key", keys("linear", "dense"))
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 16])
def test_dense_linear_matches_the_oracle(key, tokens):
    dtype = DTYPES[key.dtype]
    for rows, cols in SIZES:
        weight = reference.sparse_matrix(rows, cols, 0.3, dtype)
        x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
        with backend.force_isa(key.isa):
            reference.assert_close(ops.dense_linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("key", keys("unpack", "bitmap"))
def test_unpack_returns_the_very_bits(key):
    dtype = DTYPES[key.dtype]
    for rows, cols in SIZES:
        weight = reference.sparse_matrix(rows, cols, 0.6, dtype)
        with backend.force_isa(key.isa):
            assert torch.equal(ops.bitmap_unpack(tiled(weight)), weight)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 140),
    tokens=st.integers(1, 20),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_random_shapes_on_every_level(rows, cols, tokens, sparsity, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = reference.sparse_matrix(rows, cols, sparsity, dtype, generator)
    x = torch.randn(tokens, cols, generator=generator).to(dtype)
    packed = tiled(weight)
    for isa, supported in backend.isa_levels():
        if supported:
            with backend.force_isa(isa):
                reference.assert_close(ops.bitmap_linear(x, packed), x, weight)
                reference.assert_close(ops.dense_linear(x, weight), x, weight)
                assert torch.equal(ops.bitmap_unpack(packed), weight)


@pytest.mark.parametrize("key", keys("linear", "bitmap"))
def test_outliers_and_cancelling_signs(key):
    dtype = DTYPES[key.dtype]
    weight = reference.sparse_matrix(40, 300, 0.5, dtype)
    weight[:, 7] = 1e4
    x = torch.randn(3, 300).to(dtype)
    x[:, 150:] = -x[:, :150]
    weight[5, 150:] = weight[5, :150]  # row 5 cancels to zero
    with backend.force_isa(key.isa):
        reference.assert_close(ops.bitmap_linear(x, tiled(weight)), x, weight)


@pytest.mark.parametrize("key", keys("linear", "bitmap"))
@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_values_spread_as_in_the_dense_product(key, special):
    dtype = DTYPES[key.dtype]
    weight = reference.sparse_matrix(37, 51, 0.5, dtype)
    x = torch.randn(2, 51).to(dtype)
    for where in ("weight", "input"):
        w, v = weight.clone(), x.clone()
        if where == "weight":
            w[20, 30] = special
        else:
            v[1, 50] = special
        with backend.force_isa(key.isa):
            y = ops.bitmap_linear(v, tiled(w, keep=w.ne(0) | w.isnan()))
        expected = reference.linear(v, w)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[~y.isnan()].isinf(), expected[~expected.isnan()].isinf())


@pytest.mark.parametrize("key", keys("linear", "bitmap"))
def test_kept_zeros_negative_zero_and_denormals(key):
    dtype = DTYPES[key.dtype]
    weight = reference.sparse_matrix(33, 40, 0.5, dtype)
    keep = weight != 0
    weight[3, 3], weight[4, 4], weight[5, 5] = -0.0, 0.0, 1e-39
    keep[3, 3] = keep[4, 4] = keep[5, 5] = True
    packed = tiled(weight, keep)
    assert packed.nnz == int(keep.sum())
    bits = packed.to_bitmap().to_dense()
    assert torch.signbit(bits[3, 3])  # a kept -0.0 keeps its sign
    x = torch.randn(1, 40).to(dtype)
    with backend.force_isa(key.isa):
        reference.assert_close(ops.bitmap_linear(x, packed), x, weight)


@pytest.mark.parametrize("key", keys("linear", "bitmap"))
def test_bits_do_not_depend_on_threads_or_batch(key):
    dtype = DTYPES[key.dtype]
    weight = reference.sparse_matrix(700, 700, 0.5, dtype)  # large enough for more than one thread
    packed, x = tiled(weight), torch.randn(3, 700).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        with backend.force_isa(key.isa):
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(ops.bitmap_linear(x, packed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_large_matrices_are_split_over_threads(threads):
    weight = reference.sparse_matrix(1030, 513, 0.7, torch.bfloat16)
    x = torch.randn(1, 513).bfloat16()
    reference.assert_close(ops.bitmap_linear(x, tiled(weight)), x, weight)
    reference.assert_close(ops.dense_linear(x, weight), x, weight)


def test_inputs_of_any_rank_and_stride():
    weight = reference.sparse_matrix(24, 30, 0.5, torch.float32)
    packed = tiled(weight)
    x = torch.randn(4, 5, 60)[..., ::2]
    y = ops.bitmap_linear(x, packed)
    assert y.shape == (4, 5, 24)
    reference.assert_close(y.flatten(0, 1), x.flatten(0, 1), weight)
    vector = torch.randn(30)
    assert ops.bitmap_linear(vector, packed).shape == (24,)
    assert ops.bitmap_linear(torch.randn(0, 30), packed).shape == (0, 24)


def test_wrong_shapes_and_dtypes_are_refused():
    packed = tiled(reference.sparse_matrix(24, 30, 0.5, torch.float32))
    with pytest.raises(ValueError, match="x has 31 features, the weight takes 30"):
        ops.bitmap_linear(torch.randn(1, 31), packed)
    with pytest.raises(ValueError, match="x is torch.bfloat16, the weight torch.float32"):
        ops.bitmap_linear(torch.randn(1, 30).bfloat16(), packed)
    double = TiledBitmap(packed.values.double(), packed.masks, packed.tile_offsets, packed.shape)
    with pytest.raises(ValueError, match="kernels take float32 and bfloat16 values, not torch.float64"):
        ops.bitmap_linear(torch.randn(1, 30).double(), double)
    short = TiledBitmap(packed.values[:5], packed.masks, packed.tile_offsets, packed.shape)
    with pytest.raises(ValueError, match="only 5 values are there"):
        ops.bitmap_linear(torch.randn(1, 30), short)
    fewer = TiledBitmap(packed.values, packed.masks[:1], packed.tile_offsets, packed.shape)
    with pytest.raises(ValueError, match="masks hold 15 words, a 24 x 30 weight has 30"):
        ops.bitmap_linear(torch.randn(1, 30), fewer)


def test_autograd_and_operator_contract():
    weight = reference.sparse_matrix(24, 30, 0.5, torch.float32)
    packed, bias = tiled(weight), torch.randn(24, requires_grad=True)
    x = torch.randn(3, 30, requires_grad=True)
    ops.bitmap_linear(x, packed, bias).square().sum().backward()
    expected_x, expected_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    torch.nn.functional.linear(expected_x, weight, expected_bias).square().sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, expected_bias.grad)
    vector = torch.randn(30, requires_grad=True)
    ops.bitmap_linear(vector, packed, bias).sum().backward()
    torch.testing.assert_close(vector.grad, weight.sum(dim=0), rtol=1e-4, atol=1e-4)
    op = torch.ops.pysparse.bitmap_linear.default
    torch.library.opcheck(
        op, (x.detach(), packed.values, packed.masks, packed.tile_offsets, bias.detach(), 24)
    )
    torch.library.opcheck(torch.ops.pysparse.dense_linear.default, (x.detach(), weight, bias.detach()))
