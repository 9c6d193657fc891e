"""n:m weights: exact round trips, the pattern check, and every kernel against the oracle."""

import dataclasses

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, Int8Bitmap, NMInt8, NMTensor

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMMON = [(2, 4), (4, 8), (1, 4), (2, 8), (1, 8), (2, 16)]  # those with vector kernels
OTHERS = [(1, 2), (3, 5), (5, 6), (1, 3), (7, 64), (63, 64), (3, 33)]
SIZES = [(0, 5), (5, 0), (1, 1), (16, 64), (17, 35), (15, 4), (33, 129), (48, 640)]


def nm_matrix(rows, cols, n, m, dtype, generator=None, fewer=True):
    """A normal random matrix with n of every m kept, the last columns dense, and, with ``fewer``, groups and
    a row that keep less."""
    weight = torch.randn(rows, cols, generator=generator)
    groups = cols // m
    scores = torch.rand(rows, groups, m, generator=generator)
    keep = torch.zeros(rows, groups, m, dtype=torch.bool)
    keep.scatter_(2, scores.topk(n, dim=2).indices, True)
    if fewer:
        keep &= torch.rand(rows, groups, m, generator=generator) < 0.9
    weight[:, : groups * m] *= keep.flatten(1)
    if fewer and rows > 2:
        weight[1] = 0
    return weight.to(dtype)


def keys(format):
    return [
        pytest.param(
            key, id=str(key), marks=() if key.supported else pytest.mark.skip(reason=f"this CPU lacks {key.isa}")
        )
        for key in backend.kernels(op="linear", format=format)
    ]  # fmt: skip


# --- containers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", COMMON + OTHERS, ids=lambda p: f"{p[0]}:{p[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trips_are_exact(pattern, dtype):
    for rows, cols in SIZES:
        for fewer in (False, True):
            weight = nm_matrix(rows, cols, *pattern, dtype, fewer=fewer)
            bitmap = BitmapTensor.from_dense(weight)
            packed = NMTensor.from_bitmap(bitmap, *pattern)
            packed.validate()
            assert torch.equal(packed.to_dense(), weight)
            back = packed.to_bitmap()
            for name in ("values", "bitmask", "row_offsets"):
                assert torch.equal(getattr(back, name), getattr(bitmap, name))
            if dtype in ops.KERNEL_DTYPES:
                assert torch.equal(ops.nm_unpack(packed), weight)


@pytest.mark.parametrize("pattern", COMMON + OTHERS, ids=lambda p: f"{p[0]}:{p[1]}")
def test_int8_round_trips_are_exact(pattern):
    for rows, cols in SIZES:
        quantized = Int8Bitmap.from_dense(nm_matrix(rows, cols, *pattern, torch.float32))
        packed = NMInt8.from_int8(quantized, *pattern)
        packed.validate()
        assert torch.equal(packed.to_int8().scales, quantized.scales)
        for dtype in DTYPES.values():
            assert torch.equal(packed.to_dense(dtype), quantized.to_dense(dtype))
            assert torch.equal(ops.nm_int8_unpack(packed, dtype), quantized.to_dense(dtype))


def test_kept_zeros_and_signs_survive():
    weight = torch.tensor([[0.0, -0.0, 0, 0, 0, 3, 0, 4, 0, 0, 0, 0]])
    keep = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]], dtype=torch.bool)
    bitmap = BitmapTensor.from_dense(weight, keep)
    back = NMTensor.from_bitmap(bitmap, 2, 4).to_bitmap()
    assert torch.equal(back.keep_mask(), keep)
    assert torch.signbit(back.to_dense()[0, 1])


def test_bytes_are_those_of_the_layout():
    weight = nm_matrix(32, 64, 2, 4, torch.bfloat16)
    packed = NMTensor.from_dense(weight, 2, 4)
    assert packed.nbytes == 32 * 32 * 2 + 32 * 32 * 2 // 8 + 64  # 2 bytes and 2 bits a kept weight, padding
    for (n, m), bits in zip(COMMON, (2, 3, 2, 3, 3, 4), strict=True):
        packed = NMTensor.from_dense(nm_matrix(32, 64, n, m, torch.float32), n, m)
        kept = 32 * 64 * n // m
        assert packed.nbytes == kept * 4 + kept * bits // 8 + 64
    first = torch.zeros(1, 8)
    first[0, 1], first[0, 3], first[0, 6] = 1.0, 2.0, 3.0
    packed = NMTensor.from_dense(first, 2, 4)
    assert packed.values[:2].tolist() == [1.0, 2.0]  # row 0 of step 0
    assert packed.values[32:34].tolist() == [3.0, 0.0]  # step 1: one kept, one zero
    assert packed.indices[0] & 0b1111 == 0b1101  # 1, then 3
    assert packed.indices[8] & 0b1111 == 0b1010  # 2, repeated


def test_the_first_crowded_group_is_named():
    weight = torch.zeros(3, 12)
    weight[1, 4:7] = 1
    weight[2, :] = 1
    with pytest.raises(ValueError, match="pattern 2:4 keeps 2 of 4, but row 1, columns 4 to 7 keep 3"):
        NMTensor.from_dense(weight, 2, 4)
    assert torch.equal(NMTensor.from_dense(weight, 5, 12 + 1).to_dense(), weight)  # all of it is tail
    for n, m in [(0, 4), (4, 4), (5, 4), (1, 65)]:
        with pytest.raises(ValueError, match=f"pattern {n}:{m} must keep n of m with 1 <= n < m <= 64"):
            NMTensor.from_dense(weight, n, m)
    with pytest.raises(ValueError, match="group_size=8 is no multiple of 16, a block of 1:4"):
        NMInt8.from_dense(torch.zeros(3, 32), 1, 4, group_size=8)


def test_damage_is_refused():
    packed = NMTensor.from_dense(nm_matrix(20, 35, 3, 5, torch.float32), 3, 5)
    for damaged, message in [
        (dataclasses.replace(packed, values=packed.values[:-1]), "values and indices hold"),
        (dataclasses.replace(packed, indices=packed.indices[:-1]), "values and indices hold"),
        (dataclasses.replace(packed, values=packed.values.double()), "values must be a float or int8 vector"),
        (dataclasses.replace(packed, indices=packed.indices.int()), "indices must be a uint8 vector"),
        (
            dataclasses.replace(packed, indices=packed.indices | 255),
            "index 7 in step 0 lies outside its group of 5",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            damaged.validate()
    quantized = NMInt8.from_dense(nm_matrix(20, 35, 2, 4, torch.float32), 2, 4)
    with pytest.raises(ValueError, match="row_sums are not the sums of the values"):
        dataclasses.replace(quantized, row_sums=quantized.row_sums + 1).validate()


# --- kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", keys("nm"))
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 16, 64])
def test_nm_linear_matches_the_oracle(key, tokens):
    dtype = DTYPES[key.dtype]
    for n, m in [*COMMON, (3, 5), (7, 64)]:
        for rows, cols in SIZES:
            weight = nm_matrix(rows, cols, n, m, dtype)
            packed = NMTensor.from_dense(weight, n, m)
            x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
            with backend.force_isa(key.isa):
                for b in (None, bias):
                    reference.assert_close(ops.nm_linear(x, packed, b), x, weight, b)


@pytest.mark.parametrize("key", keys("nm-int8"))
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 16, 64])
@pytest.mark.parametrize("bits", [8, 16])
def test_nm_int8_linear_is_exact_up_to_the_last_roundings(key, tokens, bits):
    dtype = DTYPES[key.dtype]
    for n, m in [*COMMON, (3, 5), (7, 64)]:
        for rows, cols in SIZES:
            for group_size in (None, 32) if m in (4, 8, 16) else (None,):
                quantized = Int8Bitmap.from_dense(nm_matrix(rows, cols, n, m, dtype), None, group_size)
                packed = NMInt8.from_int8(quantized, n, m)
                x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
                with backend.force_isa(key.isa):
                    y = ops.nm_int8_linear(x, packed, bias, bits)
                reference.assert_quantized_close(y, x, quantized, bias, bits)


@settings(max_examples=120, deadline=None)
@given(
    pattern=st.one_of(
        st.sampled_from(COMMON), st.integers(2, 64).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))
    ),
    rows=st.integers(1, 50),
    cols=st.integers(1, 200),
    tokens=st.integers(1, 64),
    bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(DTYPES.values())),
)  # fmt: skip
def test_random_patterns_on_every_level(pattern, rows, cols, tokens, bits, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = nm_matrix(rows, cols, *pattern, dtype, generator)
    x = torch.randn(tokens, cols, generator=generator).to(dtype)
    packed, quantized = NMTensor.from_dense(weight, *pattern), Int8Bitmap.from_dense(weight)
    packed8 = NMInt8.from_int8(quantized, *pattern)
    assert torch.equal(packed.to_dense(), weight)
    for isa, supported in backend.isa_levels():
        if supported:
            with backend.force_isa(isa):
                reference.assert_close(ops.nm_linear(x, packed), x, weight)
                y = ops.nm_int8_linear(x, packed8, None, bits)
            reference.assert_quantized_close(y, x, quantized, None, bits)


@pytest.mark.parametrize("key", keys("nm"))
@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_values_spread_as_in_the_dense_product(key, special):
    dtype = DTYPES[key.dtype]
    for n, m in COMMON:
        weight = nm_matrix(37, 51, n, m, dtype)
        for column in (0, 13, 50):  # kept here and there; the last lies in the tail
            x = torch.randn(3, 51).to(dtype)
            x[1, column] = special
            with backend.force_isa(key.isa):
                y = ops.nm_linear(x, NMTensor.from_dense(weight, n, m))
            expected = reference.linear(x, weight)
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y[~y.isnan()].double().isinf(), expected[~expected.isnan()].isinf())
            reference.assert_close(y[[0, 2]], x[[0, 2]], weight)
        loud = weight.clone()
        loud[20, 50] = special
        x = torch.randn(2, 51).to(dtype)
        packed = NMTensor.from_dense(loud, n, m, keep=loud.ne(0) | loud.isnan())
        with backend.force_isa(key.isa):
            y = ops.nm_linear(x, packed)
        assert torch.equal(y.isnan(), reference.linear(x, loud).isnan())


@pytest.mark.parametrize("key", keys("nm-int8"))
@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_a_non_finite_input_makes_its_token_nan_and_no_other(key, special):
    dtype = DTYPES[key.dtype]
    packed = NMInt8.from_dense(nm_matrix(37, 51, 2, 4, dtype), 2, 4)
    x = torch.randn(3, 51).to(dtype)
    x[1, 0] = special
    with backend.force_isa(key.isa):
        y = ops.nm_int8_linear(x, packed)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("key", [*keys("nm"), *keys("nm-int8")])
def test_bits_do_not_depend_on_threads_or_batch(key):
    dtype = DTYPES[key.dtype]
    weight = nm_matrix(700, 700, 2, 4, dtype)
    if key.format == "nm":
        packed = NMTensor.from_dense(weight, 2, 4)
        product = lambda x: ops.nm_linear(x, packed)  # noqa: E731
    else:
        quantized = NMInt8.from_dense(weight, 2, 4)
        product = lambda x: ops.nm_int8_linear(x, quantized)  # noqa: E731
    x = torch.randn(3, 700).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        with backend.force_isa(key.isa):
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(product(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("tokens", [65, 130])
def test_many_tokens_multiply_the_unpacked_weight(tokens):
    weight = nm_matrix(100, 258, 2, 8, torch.float32)
    x, bias = torch.randn(tokens, 258), torch.randn(100)
    reference.assert_close(ops.nm_linear(x, NMTensor.from_dense(weight, 2, 8), bias), x, weight, bias)
    quantized = NMInt8.from_dense(weight, 2, 8)
    reference.assert_close(ops.nm_int8_linear(x, quantized, bias), x, quantized.to_dense(), bias)


def test_inputs_of_any_rank_and_wrong_inputs():
    weight = nm_matrix(24, 30, 2, 4, torch.float32)
    packed, quantized = NMTensor.from_dense(weight, 2, 4), NMInt8.from_dense(weight, 2, 4)
    x = torch.randn(4, 5, 60)[..., ::2]
    reference.assert_close(ops.nm_linear(x, packed).flatten(0, 1), x.flatten(0, 1), weight)
    for product in (lambda v: ops.nm_linear(v, packed), lambda v: ops.nm_int8_linear(v, quantized)):
        assert product(torch.randn(30)).shape == (24,)
        assert product(torch.randn(0, 30)).shape == (0, 24)
        with pytest.raises(ValueError, match="x has 31 features, the weight takes 30"):
            product(torch.randn(1, 31))
    with pytest.raises(ValueError, match="x is torch.bfloat16, the weight torch.float32"):
        ops.nm_linear(torch.randn(1, 30).bfloat16(), packed)
    with pytest.raises(ValueError, match="activation_bits is 8 or 16, got 32"):
        ops.nm_int8_linear(torch.randn(1, 30), quantized, None, 32)
    short = dataclasses.replace(packed, values=packed.values[:-1])
    with pytest.raises(ValueError, match="values and indices hold"):
        ops.nm_linear(torch.randn(1, 30), short)
    shorter = dataclasses.replace(quantized, scales=quantized.scales.flatten()[:-1])
    with pytest.raises(ValueError, match="scales and row_sums hold 31 and 32 entries"):
        ops.nm_int8_linear(torch.randn(1, 30), shorter)


def test_autograd_and_operator_contract():
    weight = nm_matrix(24, 30, 2, 4, torch.float32)
    packed, quantized = NMTensor.from_dense(weight, 2, 4), NMInt8.from_dense(weight, 2, 4)
    for product, dense in (
        (lambda x, b: ops.nm_linear(x, packed, b), weight),
        (lambda x, b: ops.nm_int8_linear(x, quantized, b), quantized.to_dense()),
    ):
        x, bias = torch.randn(3, 30, requires_grad=True), torch.randn(24, requires_grad=True)
        product(x, bias).sum().backward()
        torch.testing.assert_close(x.grad, dense.sum(dim=0).expand(3, 30))
        torch.testing.assert_close(bias.grad, torch.full((24,), 3.0))
    x, bias = torch.randn(3, 30), torch.randn(24)
    torch.library.opcheck(
        torch.ops.pysparse.nm_linear.default, (x, packed.values, packed.indices, bias, 24, 2, 4)
    )
    arrays = quantized.matrix.values, quantized.matrix.indices, quantized.scales, quantized.row_sums
    torch.library.opcheck(torch.ops.pysparse.nm_int8_linear.default, (x, *arrays, bias, 24, 2, 4, 30, 8))
