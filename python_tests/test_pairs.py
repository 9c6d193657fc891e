"""Pair blocks: exact packing, and every kernel of many tokens against the float64 oracle."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, ColumnPairs, TiledBitmap

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = [(0, 5), (5, 0), (1, 1), (3, 256), (17, 257), (255, 31), (256, 512), (260, 513), (600, 300)]
KEYS = [
    pytest.param(
        key, id=str(key), marks=[] if key.supported else [pytest.mark.skip(reason=f"no {key.isa} here")]
    )
    for key in backend.kernels("linear", "pairs")
]


def tiled(weight, keep=None):
    return TiledBitmap.from_bitmap(BitmapTensor.from_dense(weight, keep))


def pairs(weight, keep=None):
    return ColumnPairs.from_tiled(tiled(weight, keep))


def assert_same(left, right):
    assert torch.equal(left.values.view(torch.uint8), right.values.view(torch.uint8))  # bits: NaN, -0.0
    assert torch.equal(left.bitmask, right.bitmask)
    assert torch.equal(left.row_offsets, right.row_offsets)
    assert left.shape == right.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
def test_packing_is_exact_both_ways(dtype, sparsity):
    for rows, cols in SIZES:
        bitmap = BitmapTensor.from_dense(reference.sparse_matrix(rows, cols, sparsity, dtype))
        assert_same(ColumnPairs.from_tiled(TiledBitmap.from_bitmap(bitmap)).to_bitmap(), bitmap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_zeros_and_special_values_survive(dtype):
    weight = torch.zeros(9, 300, dtype=dtype)
    keep = torch.zeros(9, 300, dtype=torch.bool)
    # A lone kept zero looks most like padding: in the first and last columns of a block, and beside others.
    for row, cols in enumerate([(0,), (1,), (255,), (256,), (299,), (0, 1), (0, 1, 2), (1, 299)]):
        keep[row, list(cols)] = True
    weight[1, 1], weight[2, 255], weight[4, 299] = -0.0, float("nan"), 1e-39
    weight[5, 0], weight[7, 1] = float("-inf"), 3.0
    bitmap = BitmapTensor.from_dense(weight, keep)
    assert_same(ColumnPairs.from_tiled(TiledBitmap.from_bitmap(bitmap)).to_bitmap(), bitmap)


def test_nbytes_are_those_of_the_arrays():
    weight = torch.zeros(5, 300)
    weight[0, :3], weight[4, 256] = 1.0, 2.0
    packed = pairs(weight)
    # Of three blocks of columns, 0 has a group of 2 pairs, 2 a group of one: row 4 with three rows that are none.
    assert packed.values.shape == (12, 2)
    order, counts, offsets = 3 * 8 + 4, 3 * 2, 4 * 8
    assert packed.nbytes == 12 * 2 * 4 + 12 * 2 + order + counts + offsets


def test_contradicting_masks_are_refused():
    packed = tiled(reference.sparse_matrix(20, 20, 0.5, torch.float32))
    packed.masks[0, 0] ^= 1
    with pytest.raises(ValueError, match="tile 0 keeps"):
        ColumnPairs.from_tiled(packed)
    packed = tiled(torch.ones(3, 4))
    packed.masks[0, 0] |= 1 << 10  # row 5 of 3
    with pytest.raises(ValueError, match="rows beyond 3"):
        ColumnPairs.from_tiled(packed)
    packed = tiled(torch.ones(4, 3))
    packed.masks[0, 0] ^= 1
    packed.masks[0, 1] |= 2  # column 3 of 3: the total still agrees
    with pytest.raises(ValueError, match="tile 0 keeps values beyond column 2"):
        ColumnPairs.from_tiled(packed)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 33, 64, 65, 130])
def test_matches_the_oracle(key, tokens):
    dtype = DTYPES[key.dtype]
    for rows, cols in SIZES:
        for sparsity in (0.0, 0.6, 0.97):
            weight = reference.sparse_matrix(rows, cols, sparsity, dtype)
            x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
            packed = pairs(weight)
            with backend.force_isa(key.isa):
                for b in (None, bias):
                    reference.assert_close(ops.pairs_linear(x, packed, b), x, weight, b)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 600),
    tokens=st.integers(1, 150),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_random_shapes_on_every_level(rows, cols, tokens, sparsity, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = reference.sparse_matrix(rows, cols, sparsity, dtype, generator)
    x = torch.randn(tokens, cols, generator=generator).to(dtype)
    packed = pairs(weight)
    for isa, supported in backend.isa_levels():
        if supported:
            with backend.force_isa(isa):
                reference.assert_close(ops.pairs_linear(x, packed), x, weight)


@pytest.mark.parametrize("key", KEYS)
def test_uneven_rows_outliers_and_cancelling_signs(key):
    dtype = DTYPES[key.dtype]
    keep = torch.rand(300, 600) < torch.linspace(0, 1, 300)[:, None] ** 2
    weight = (torch.randn(300, 600) * keep).to(dtype)
    weight[:, 7] = 1e4
    x = torch.randn(40, 600).to(dtype)
    x[:, 300:] = -x[:, :300]
    weight[5, 300:] = weight[5, :300]  # row 5 cancels to zero
    with backend.force_isa(key.isa):
        reference.assert_close(ops.pairs_linear(x, pairs(weight)), x, weight)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("cols", [51, 258])
def test_non_finite_values_spread_as_in_the_dense_product(key, special, cols):
    dtype = DTYPES[key.dtype]
    weight = reference.sparse_matrix(37, cols, 0.5, dtype)
    x = torch.randn(35, cols).to(dtype)
    bias = torch.randn(37).to(dtype)
    for where in ("weight", "input", "both"):
        w, v = weight.clone(), x.clone()
        if where != "input":
            w[20, 30] = special
        if where != "weight":
            v[1, cols - 1], v[1, 0], v[33, 1] = special, special, -special
        with backend.force_isa(key.isa):
            y = ops.pairs_linear(v, pairs(w, keep=w.ne(0) | w.isnan()), bias)
        expected = reference.linear(v, w, bias)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[~y.isnan()].isinf(), expected[~expected.isnan()].isinf())
        finite = expected.isfinite()
        assert torch.allclose(y.double()[finite], expected[finite], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("key", KEYS)
def test_bits_do_not_depend_on_threads_or_on_the_tokens_beside(key):
    dtype = DTYPES[key.dtype]
    weight = reference.sparse_matrix(700, 700, 0.5, dtype)
    packed, x = pairs(weight), torch.randn(600, 700).to(dtype)  # more than are transposed at once
    before = torch.get_num_threads()
    results = []
    try:
        with backend.force_isa(key.isa):
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(ops.pairs_linear(x, packed))
            for step in (1, 17, 50, 130):
                results.append(torch.cat([ops.pairs_linear(part, packed) for part in x[:260].split(step)]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:3]:
        assert torch.equal(results[0], other)
    for other in results[3:]:
        assert torch.equal(results[0][:260], other)


def test_inputs_of_any_rank_and_stride():
    weight = reference.sparse_matrix(24, 30, 0.5, torch.float32)
    x = torch.randn(4, 5, 60)[..., ::2]
    y = ops.pairs_linear(x, pairs(weight))
    assert y.shape == (4, 5, 24)
    reference.assert_close(y.flatten(0, 1), x.flatten(0, 1), weight)


def test_wrong_shapes_and_dtypes_are_refused():
    packed = pairs(torch.eye(8))
    with pytest.raises(ValueError, match="x has 9 features, the weight takes 8"):
        ops.pairs_linear(torch.randn(2, 9), packed)
    with pytest.raises(ValueError, match="they must be the same"):
        ops.pairs_linear(torch.randn(2, 8).bfloat16(), packed)
    with pytest.raises(ValueError, match="kernels take float32 and bfloat16"):
        ops.pairs_linear(torch.randn(2, 8).half(), pairs(torch.eye(8).half()))


def test_sizes_that_do_not_fit_are_refused_before_memory_is_touched():
    packed = pairs(torch.eye(8))
    cut = ColumnPairs(packed.values[:-1], *(getattr(packed, n) for n in packed.__slots__[1:]))
    with pytest.raises(ValueError, match="block_offsets run from 0"):
        ops.pairs_linear(torch.randn(2, 8), cut)
