"""int8 weights: quantisation, containers, every kernel against exact sums, and the accuracy that follows."""

import dataclasses

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, Int8Bitmap, TiledInt8

needs_core = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = [(0, 5), (5, 0), (1, 1), (16, 64), (17, 65), (15, 63), (33, 130), (100, 257), (48, 1024)]


def keys():
    return [
        pytest.param(
            key, id=str(key), marks=() if key.supported else pytest.mark.skip(reason=f"this CPU lacks {key.isa}")
        )
        for key in backend.kernels(op="linear", format="bitmap-int8")
    ]  # fmt: skip


def quantized(weight, keep=None, group_size=None):
    return Int8Bitmap.from_dense(weight, keep, group_size)


def run(x, packed, bias=None, bits=8):
    return ops.int8_linear(x, TiledInt8.from_int8(packed), bias, bits)


# --- containers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantisation_error_is_half_a_step_and_zeros_stay(dtype, group_size):
    for rows, cols in SIZES:
        weight = reference.sparse_matrix(rows, cols, 0.6, dtype)
        packed = quantized(weight, group_size=group_size)
        packed.validate()
        back = packed.to_dense()
        assert torch.equal(packed.to_bitmap().keep_mask(), weight != 0)
        group = group_size or max(1, cols)
        step = packed.scales.repeat_interleave(group, dim=1)[:, :cols]
        assert ((back - weight.float()).abs() <= step * 0.5 * (1 + 1e-5)).all()
        assert torch.equal(back[weight == 0], torch.zeros(int((weight == 0).sum())))
        assert int(packed.values.abs().max() if packed.nnz else 0) <= 127


def test_ties_round_to_even_kept_zeros_stay_and_empty_rows_are_safe():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5, 0.25], [0, 0, 0, 0, 0], [1e-44, 0, -1e-45, 0, 0]])
    keep = torch.ones_like(weight, dtype=torch.bool)
    packed = quantized(weight, keep)
    assert packed.values.tolist()[:5] == [127, 0, 2, -2, 0]
    assert packed.nnz == 15  # what rounds to zero is still kept
    assert packed.scales[:, 0].tolist() == [1.0, 0.0, 0.0]  # 1e-44 / 127 is no float32
    assert torch.equal(packed.to_dense()[1:], torch.zeros(2, 5))


def test_byte_layout_is_the_published_one():
    weight = torch.zeros(2, 10)
    weight[0, 0], weight[0, 9], weight[1, 3] = 127.0, -254.0, 1.0
    packed = quantized(weight)
    assert packed.values.tolist() == [64, -127, 127]  # 127 / 2 = 63.5 rounds to the even 64
    assert packed.bitmask.tolist() == [[1, 2], [8, 0]]
    assert packed.row_offsets.tolist() == [0, 2]
    assert torch.equal(packed.scales, torch.tensor([[2.0], [1 / 127]]))
    assert packed.nbytes == 3 + 4 + 2 * 8 + 2 * 4
    tiled = TiledInt8.from_int8(packed)
    assert tiled.masks.tolist() == [[1 | 1 << 7, 0, 2]]  # bit 4 r + c of quad q
    assert tiled.row_sums[0, :2].tolist() == [-63, 127]
    assert tiled.nbytes == (3 + 64) + 3 * 8 + 2 * 8 + 16 * 4 + 16 * 4


@needs_core
@pytest.mark.parametrize("group_size", [None, 8, 128])
def test_tiles_round_trip_exactly(group_size):
    for rows, cols in SIZES:
        for sparsity in (0.0, 0.6, 1.0):
            packed = quantized(
                reference.sparse_matrix(rows, cols, sparsity, torch.bfloat16), None, group_size
            )
            tiled = TiledInt8.from_int8(packed)
            back = tiled.to_int8()
            for name in ("values", "bitmask", "row_offsets", "scales"):
                assert torch.equal(getattr(back, name), getattr(packed, name))
            assert (back.group_size, back.shape, tiled.nnz) == (packed.group_size, packed.shape, packed.nnz)
            assert torch.equal(ops.int8_unpack(tiled, torch.float32), packed.to_dense())
            assert torch.equal(ops.int8_unpack(tiled, torch.bfloat16), packed.to_dense(torch.bfloat16))


@needs_core
def test_compiled_quantisation_agrees_with_plain_torch(monkeypatch):
    bitmap = BitmapTensor.from_dense(reference.sparse_matrix(50, 300, 0.7, torch.bfloat16))
    for group_size in (None, 128):
        compiled = Int8Bitmap.from_bitmap(bitmap, group_size)
        dense = compiled.to_dense()
        with monkeypatch.context() as without_core:
            without_core.setattr(backend, "_core", None)
            plain = Int8Bitmap.from_bitmap(bitmap, group_size)
            assert torch.equal(plain.to_dense(), dense)
        assert torch.equal(plain.values, compiled.values)
        assert torch.equal(plain.scales, compiled.scales)


def test_damage_and_impossible_requests_are_refused():
    weight = reference.sparse_matrix(24, 30, 0.5, torch.float32)
    packed = quantized(weight)
    for damaged, message in [
        (dataclasses.replace(packed, values=packed.values[:-1]), "values, but .* are stored"),
        (dataclasses.replace(packed, values=packed.values.float()), "values must be an int8 vector"),
        (dataclasses.replace(packed, scales=packed.scales[:-1]), r"scales must be float32 \(24, 1\)"),
        (dataclasses.replace(packed, scales=-packed.scales), "scales must be finite and not negative"),
        (dataclasses.replace(packed, row_offsets=packed.row_offsets + 1), "row_offsets"),
    ]:
        with pytest.raises(ValueError, match=message):
            damaged.validate()
    with pytest.raises(ValueError, match="group_size is a positive multiple of 4 inputs up to 65536, got 30"):
        quantized(weight, group_size=30)
    with pytest.raises(ValueError, match="65537 columns: beyond 65536 a 32-bit sum"):
        quantized(torch.zeros(1, 65537))
    weight[3, 3] = float("inf")
    with pytest.raises(ValueError, match="1 weights are NaN or infinite"):
        quantized(weight)


# --- kernels ----------------------------------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("key", keys())
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("bits", [8, 16])
def test_int8_linear_is_exact_up_to_the_last_roundings(key, tokens, bits):
    dtype = DTYPES[key.dtype]
    for rows, cols in SIZES:
        for sparsity, group_size in ((0.0, None), (0.5, 64), (0.9, None), (1.0, 4)):
            packed = quantized(reference.sparse_matrix(rows, cols, sparsity, dtype), None, group_size)
            x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
            with backend.force_isa(key.isa):
                for b in (None, bias):
                    reference.assert_quantized_close(run(x, packed, b, bits), x, packed, b, bits)


@needs_core
@pytest.mark.parametrize("key", keys())
@pytest.mark.parametrize("bits", [8, 16])
def test_columns_of_unlike_density_in_one_tile(key, bits):
    """A kernel that judges a tile by its first columns must be right about the others as well."""
    dtype, keep = DTYPES[key.dtype], torch.rand(33, 1280) < 0.1
    for dense in (slice(640, None), slice(0, 640), slice(0, None, 2)):
        uneven = keep.clone()
        uneven[:, dense] = torch.rand(33, len(range(1280)[dense])) < 0.95
        packed = quantized((torch.randn(33, 1280) * uneven).to(dtype))
        x = torch.randn(1, 1280).to(dtype)
        with backend.force_isa(key.isa):
            reference.assert_quantized_close(run(x, packed, None, bits), x, packed, None, bits)


@needs_core
@pytest.mark.parametrize("tokens", [65, 130])
def test_many_tokens_multiply_the_dequantised_weight(tokens):
    packed = quantized(reference.sparse_matrix(100, 257, 0.5, torch.float32), None, 128)
    x, bias = torch.randn(tokens, 257), torch.randn(100)
    reference.assert_close(run(x, packed, bias), x, packed.to_dense(), bias)


@needs_core
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    tokens=st.integers(1, 64),
    sparsity=st.floats(0, 1),
    group_size=st.sampled_from([None, 4, 32, 128]),
    bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_random_shapes_on_every_level(rows, cols, tokens, sparsity, group_size, bits, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    packed = quantized(reference.sparse_matrix(rows, cols, sparsity, dtype, generator), None, group_size)
    x = torch.randn(tokens, cols, generator=generator).to(dtype)
    for isa, supported in backend.isa_levels():
        if supported:
            with backend.force_isa(isa):
                reference.assert_quantized_close(run(x, packed, None, bits), x, packed, None, bits)


@needs_core
@pytest.mark.parametrize("key", keys())
def test_the_largest_sums_do_not_overflow(key):
    cols = 65536  # the most columns allowed, all weights and inputs at their largest
    weight = torch.ones(17, cols)
    weight[3] = -1
    x = torch.stack([torch.ones(cols), -torch.ones(cols)]).to(DTYPES[key.dtype])
    packed = quantized(weight.to(x.dtype))
    for bits in (8, 16):
        with backend.force_isa(key.isa):
            reference.assert_quantized_close(run(x, packed, None, bits), x, packed, None, bits)


@needs_core
@pytest.mark.parametrize("key", keys())
@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_non_finite_input_makes_its_token_nan_and_no_other(key, special, bits):
    dtype = DTYPES[key.dtype]
    packed = quantized(reference.sparse_matrix(37, 51, 0.5, dtype))
    x = torch.randn(3, 51).to(dtype)
    x[1, 50] = special
    with backend.force_isa(key.isa):
        y = run(x, packed, torch.randn(37).to(dtype), bits)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@needs_core
@pytest.mark.parametrize("key", keys())
def test_tokens_of_zeros_denormals_and_extremes(key):
    dtype = DTYPES[key.dtype]
    packed = quantized(reference.sparse_matrix(20, 40, 0.5, dtype))
    x = torch.zeros(5, 40)
    x[1] = -0.0
    x[2], x[3, ::2], x[4] = 1e-39, 1e-38, torch.randn(40) * 1e30
    x = x.to(dtype)
    for bits in (8, 16):
        with backend.force_isa(key.isa):
            y = run(x, packed, None, bits)
        assert torch.equal(y[:3], torch.zeros(3, 20, dtype=dtype))
        assert y.isfinite().all()
        reference.assert_quantized_close(y, x, packed, None, bits)


@needs_core
@pytest.mark.parametrize("key", keys())
def test_bits_do_not_depend_on_threads_or_batch(key):
    dtype = DTYPES[key.dtype]
    packed = quantized(reference.sparse_matrix(700, 700, 0.5, dtype))
    x = torch.randn(5, 700).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        with backend.force_isa(key.isa):
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(run(x, packed))
            alone = torch.cat([run(x[i : i + 1], packed) for i in range(5)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in (*results[1:], alone))


@needs_core
def test_levels_agree_bit_for_bit_where_one_scale_covers_a_row():
    packed = quantized(reference.sparse_matrix(100, 512, 0.6, torch.bfloat16))
    x = torch.randn(4, 512).bfloat16()
    results = []
    for isa, supported in backend.isa_levels():
        if supported:
            with backend.force_isa(isa):
                results.append(run(x, packed))
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_core
def test_accuracy_against_the_float_product():
    generator = torch.Generator().manual_seed(3)
    weight = reference.sparse_matrix(512, 4096, 0.7, torch.float32, generator)
    x = torch.randn(8, 4096, generator=generator)
    expected = reference.linear(x, weight)

    def error(y):
        return ((y.double() - expected).norm() / expected.norm()).item()

    assert error(run(x, quantized(weight))) < 0.017  # measured 1.1 to 1.3 %
    assert error(run(x, quantized(weight), bits=16)) < 0.012  # the weights' share
    assert error(run(x, quantized(weight, group_size=128), bits=16)) < 0.009
    outlier = x.clone()
    outlier[:, 7] = 500.0  # one loud channel, as language models have: 8 bits drown the rest
    rest = weight.clone()
    rest[:, 7] = 0
    expected = reference.linear(outlier, rest)
    assert error(run(outlier, quantized(rest))) > 0.3
    assert error(run(outlier, quantized(rest), bits=16)) < 0.012


@needs_core
def test_inputs_of_any_rank_and_stride():
    packed = quantized(reference.sparse_matrix(24, 30, 0.5, torch.float32))
    x = torch.randn(4, 5, 60)[..., ::2]
    y = run(x, packed)
    assert y.shape == (4, 5, 24)
    reference.assert_quantized_close(y.flatten(0, 1), x.flatten(0, 1), packed, None, 8)
    assert run(torch.randn(30), packed).shape == (24,)
    assert run(torch.randn(0, 30), packed).shape == (0, 24)


@needs_core
def test_wrong_inputs_are_refused():
    packed = TiledInt8.from_int8(quantized(reference.sparse_matrix(24, 30, 0.5, torch.float32)))
    x = torch.randn(1, 30)
    for call, message in [
        (lambda: ops.int8_linear(torch.randn(1, 31), packed), "x has 31 features, the weight takes 30"),
        (
            lambda: ops.int8_linear(x.half(), packed),
            "x is torch.float16: int8 weights take float32 or bfloat16",
        ),
        (lambda: ops.int8_linear(x, packed, torch.randn(24).bfloat16()), "the bias torch.bfloat16"),
        (lambda: ops.int8_linear(x, packed, None, 4), "activation_bits is 8 or 16, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for field, message in [
        ("values", "values are there, 64 of them padding"),
        ("masks", "masks hold 15 words, a 24 x 30 weight has 16"),
        ("tile_offsets", "tile_offsets hold 2 entries, expected 3"),
        ("scales", "scales and row_sums hold 31 and 32 entries, expected 1 x 32"),
        ("row_sums", "scales and row_sums hold 32 and 31 entries, expected 1 x 32"),
    ]:
        short = dataclasses.replace(packed, **{field: getattr(packed, field).flatten()[:-1]})
        with pytest.raises(ValueError, match=message):
            ops.int8_linear(x, short)


@needs_core
def test_autograd_and_operator_contract():
    packed = TiledInt8.from_int8(quantized(reference.sparse_matrix(24, 30, 0.5, torch.float32)))
    weight = packed.to_int8().to_dense()
    x, bias = torch.randn(3, 30, requires_grad=True), torch.randn(24, requires_grad=True)
    ops.int8_linear(x, packed, bias, 16).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(3, 30))
    torch.testing.assert_close(bias.grad, torch.full((24,), 3.0))
    arrays = (packed.values, packed.masks, packed.tile_offsets, packed.scales, packed.row_sums)
    arguments = (x.detach(), *arrays, bias.detach(), 24, packed.group_size, 8)
    torch.library.opcheck(torch.ops.pysparse.int8_linear.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")])
def test_a_non_finite_weight_is_refused(special, dtype):
    weight = reference.sparse_matrix(24, 30, 0.5, dtype)
    weight[3, 3] = special
    with pytest.raises(ValueError, match="1 weights are NaN or infinite: int8 has no value for them"):
        quantized(weight, keep=torch.ones(24, 30, dtype=torch.bool))
