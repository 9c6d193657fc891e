"""How to draw a weight for each family of compiled kernels, (op, format), and how to judge its answer.

The tests enumerate ``backend.kernels()``: a kernel of a known family is covered without an edit, a new family
needs one entry of FAMILIES (or of TESTED_ELSEWHERE), and a test fails while it has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, ColumnPairs, Int8Bitmap, NMInt8, NMTensor, TiledBitmap, TiledInt8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATTERNS = [(2, 4), (4, 8), (1, 4), (2, 8), (1, 8), (2, 16), (1, 2), (3, 5), (63, 64), (7, 33)]
GROUPS = (None, 4, 32, 128)


@dataclass(frozen=True, slots=True)
class Family:
    """One operation on one packing; ``option`` is a number that a case draws (pattern, group size, bits)."""

    pack: Callable[[torch.Tensor, int], Any]
    run: Callable[[torch.Tensor, Any, torch.Tensor | None, int], torch.Tensor]
    judge: Callable[..., None]  # (actual, x, weight, packed, bias, option)
    fit: Callable[[torch.Tensor, int], torch.Tensor] = lambda weight, option: weight  # to what it can hold
    non_finite_weights: bool = True
    spreads: bool = True  # a non-finite input makes what it makes in the dense product; else its token NaN
    max_tokens: int = 70


def tiled(weight):
    keep = weight.ne(0) | weight.isnan() | (weight.eq(0) & weight.signbit())
    return TiledBitmap.from_bitmap(BitmapTensor.from_dense(weight, keep))


def pattern_of(option):
    return PATTERNS[option % len(PATTERNS)]


def fit_pattern(weight, option):
    """Zero all but the first n kept of every m weights; the columns after the last whole group stay."""
    n, m = pattern_of(option)
    groups = weight.shape[1] // m
    whole = weight[:, : groups * m].reshape(len(weight), groups, m)
    kept = whole.ne(0) | whole.isnan()
    weight = weight.clone()
    weight[:, : groups * m] = whole.masked_fill(~(kept & (kept.cumsum(2) <= n)), 0).flatten(1)
    return weight


def nm(weight, option):
    return NMTensor.from_dense(weight, *pattern_of(option), keep=weight.ne(0) | weight.isnan())


def nm_int8(weight, option):
    return NMInt8.from_int8(Int8Bitmap.from_dense(weight), *pattern_of(option))


def int8(weight, option):
    return TiledInt8.from_int8(Int8Bitmap.from_dense(weight, group_size=GROUPS[option % len(GROUPS)]))


def bits_of(option):
    return 8 if option % 2 else 16


def judge_product(actual, x, weight, packed, bias, option):
    reference.assert_close(actual, x, weight, bias)


def judge_quantised(actual, x, weight, packed, bias, option):
    finite = x.float().isfinite().all(dim=1)
    assert actual[~finite].isnan().all(), "a non-finite input must make its token NaN"
    quantised = packed.to_int8()
    reference.assert_quantized_close(actual[finite], x[finite], quantised, bias, bits_of(option))


def judge_unpacked(actual, x, weight, packed, bias, option):
    bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
    same = actual.view(bits) == weight.view(bits)
    assert same.all(), f"{int((~same).sum())} weights differ in their bits"


def judge_values(actual, x, weight, packed, bias, option):
    """The stored weights exactly; n:m holds no negative zeros."""
    same = (actual == weight) | (actual.isnan() & weight.isnan())
    assert same.all(), f"{int((~same).sum())} weights differ"


def judge_dequantised(actual, x, weight, packed, bias, option):
    assert torch.equal(actual, packed.to_int8().to_dense(weight.dtype)), "not the container's numbers"


FAMILIES = {
    ("linear", "bitmap"): Family(
        lambda weight, _: tiled(weight), lambda x, packed, bias, _: ops.bitmap_linear(x, packed, bias), judge_product
    ),
    ("linear", "pairs"): Family(
        lambda weight, _: ColumnPairs.from_tiled(tiled(weight)),
        lambda x, packed, bias, _: ops.pairs_linear(x, packed, bias),
        judge_product,
        max_tokens=140,
    ),
    ("linear", "dense"): Family(
        lambda weight, _: weight, lambda x, weight, bias, _: ops.dense_linear(x, weight, bias), judge_product,
        max_tokens=ops.DENSE_TOKENS,
    ),
    ("unpack", "bitmap"): Family(
        lambda weight, _: tiled(weight), lambda x, packed, bias, _: ops.bitmap_unpack(packed), judge_unpacked
    ),
    ("linear", "bitmap-int8"): Family(
        int8, lambda x, packed, bias, option: ops.int8_linear(x, packed, bias, bits_of(option)), judge_quantised,
        non_finite_weights=False, spreads=False, max_tokens=64,
    ),
    ("linear", "nm"): Family(
        nm, lambda x, packed, bias, _: ops.nm_linear(x, packed, bias), judge_product, fit_pattern, max_tokens=64
    ),
    ("linear", "nm-int8"): Family(
        nm_int8, lambda x, packed, bias, option: ops.nm_int8_linear(x, packed, bias, bits_of(option)),
        judge_quantised, fit_pattern, non_finite_weights=False, spreads=False, max_tokens=64,
    ),
    ("unpack", "bitmap-int8"): Family(
        int8, lambda x, packed, bias, _: ops.int8_unpack(packed, x.dtype), judge_dequantised, non_finite_weights=False
    ),
    ("unpack", "nm"): Family(nm, lambda x, packed, bias, _: ops.nm_unpack(packed), judge_values, fit_pattern),
    ("unpack", "nm-int8"): Family(
        nm_int8, lambda x, packed, bias, _: ops.nm_int8_unpack(packed, x.dtype), judge_dequantised, fit_pattern,
        non_finite_weights=False,
    ),
}  # fmt: skip


# Operations that multiply no activations; their files enumerate the kernels in the same way.
TESTED_ELSEWHERE = {
    "select": "test_select.py",
    "sweep": "test_sparsegpt.py",
    "product": "test_sparsegpt.py",
    "gate": "test_fused.py",
    "attention": "test_attention_kernels.py",
    "embedding": "test_embedding.py",
    "lowrank": "test_lowrank.py",
    "shapley": "test_shapley.py",
    "ridge": "test_ridge.py",
    "rotary": "test_rotary.py",
    "row-attention": "test_row_attention.py",
    "norm": "test_norm.py",
}


def family_of(key):
    if (key.op, key.format) not in FAMILIES:
        pytest.fail(f"{key} belongs to no family of {__file__}: add an entry for it")
    return FAMILIES[key.op, key.format]


def kernel_params():
    """Every compiled kernel as a test parameter; those that this CPU lacks are skipped by name."""
    return [
        pytest.param(
            key, id=str(key), marks=() if key.supported else pytest.mark.skip(reason=f"this CPU lacks {key.isa}")
        )
        for key in products()
    ]  # fmt: skip


def products():
    return [key for key in backend.kernels() if key.op not in TESTED_ELSEWHERE]


def kernels_by_family():
    """{(op, format, dtype): the supported kernels of every level}."""
    found = {}
    for key in filter(lambda key: key.supported, products()):
        found.setdefault((key.op, key.format, key.dtype), []).append(key)
    return found
