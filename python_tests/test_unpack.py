"""Unpacking int8 and n:m weights for many tokens: every level writes the very numbers of the container."""

import pytest
import reference
import torch
from test_nm import COMMON, OTHERS, nm_matrix

from pysparse import backend, ops
from pysparse.formats import Int8Bitmap, NMInt8, NMTensor, TiledInt8

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = [(0, 5), (5, 0), (1, 1), (16, 64), (17, 65), (15, 63), (33, 130), (31, 516), (48, 1024)]


def keys(format):
    return [
        pytest.param(
            key, id=str(key), marks=() if key.supported else pytest.mark.skip(reason=f"this CPU lacks {key.isa}")
        )
        for key in backend.kernels(op="unpack", format=format)
    ]  # fmt: skip


@pytest.mark.parametrize("key", keys("bitmap-int8"))
@pytest.mark.parametrize("group_size", [None, 4, 16, 36, 128])
def test_int8_bitmaps(key, group_size):
    dtype = DTYPES[key.dtype]
    for rows, cols in SIZES:
        for sparsity in (0.0, 0.6, 1.0):
            weight = reference.sparse_matrix(rows, cols, sparsity, torch.float32)
            quantized = Int8Bitmap.from_dense(weight, group_size=group_size)
            with backend.force_isa(key.isa):
                dense = ops.int8_unpack(TiledInt8.from_int8(quantized), dtype)
            assert torch.equal(dense, quantized.to_dense(dtype)), (rows, cols, sparsity)


@pytest.mark.parametrize("key", keys("nm"))
@pytest.mark.parametrize("pattern", COMMON + OTHERS, ids=lambda p: f"{p[0]}:{p[1]}")
def test_n_of_m(key, pattern):
    dtype = DTYPES[key.dtype]
    for rows, cols in SIZES:
        for fewer in (False, True):
            weight = nm_matrix(rows, cols, *pattern, dtype, fewer=fewer)
            with backend.force_isa(key.isa):
                assert torch.equal(ops.nm_unpack(NMTensor.from_dense(weight, *pattern)), weight), (rows, cols)


@pytest.mark.parametrize("key", keys("nm-int8"))
@pytest.mark.parametrize("pattern", COMMON + OTHERS, ids=lambda p: f"{p[0]}:{p[1]}")
def test_n_of_m_int8(key, pattern):
    dtype = DTYPES[key.dtype]
    block = backend.core().nm_block_cols(*pattern, 1)
    for rows, cols in SIZES:
        for group_size in (None, block if block % 4 == 0 else None, 16 * block):
            weight = nm_matrix(rows, cols, *pattern, torch.float32)
            quantized = Int8Bitmap.from_dense(weight, group_size=group_size)
            with backend.force_isa(key.isa):
                dense = ops.nm_int8_unpack(NMInt8.from_int8(quantized, *pattern), dtype)
            assert torch.equal(dense, quantized.to_dense(dtype)), (rows, cols, group_size)


@pytest.mark.parametrize("key", [*keys("bitmap-int8"), *keys("nm-int8")])
def test_denormals_and_extremes_are_rounded_like_others(key):
    dtype = DTYPES[key.dtype]
    weight = nm_matrix(33, 128, 2, 4, torch.float32)
    weight *= torch.logspace(-44, 37, 33)[:, None]
    quantized = Int8Bitmap.from_dense(weight)
    with backend.force_isa(key.isa):
        if key.format == "bitmap-int8":
            dense = ops.int8_unpack(TiledInt8.from_int8(quantized), dtype)
        else:
            dense = ops.nm_int8_unpack(NMInt8.from_int8(quantized, 2, 4), dtype)
    assert torch.equal(dense, quantized.to_dense(dtype))


@pytest.mark.parametrize("isa", [name for name, supported in backend.isa_levels() if supported])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_many_tokens_are_the_product_with_the_unpacked_weight(isa, dtype):
    weight = nm_matrix(100, 264, 2, 8, dtype)
    x, bias = torch.randn(3, 43, 264).to(dtype), torch.randn(100).to(dtype)
    quantized = Int8Bitmap.from_dense(weight, group_size=32)
    products = (
        (lambda: ops.int8_linear(x, TiledInt8.from_int8(quantized), bias), quantized.to_dense(dtype)),
        (lambda: ops.nm_int8_linear(x, NMInt8.from_int8(quantized, 2, 8), bias), quantized.to_dense(dtype)),
        (lambda: ops.nm_linear(x, NMTensor.from_dense(weight, 2, 8), bias), weight),
    )
    with backend.force_isa(isa):
        for product, dense in products:
            y = product()
            assert y.shape == (3, 43, 100)
            reference.assert_close(y.flatten(0, 1), x.flatten(0, 1), dense, bias)
