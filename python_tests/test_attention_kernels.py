"""Every compiled attention kernel beside a float64 softmax, whatever the operation shows to its tiles."""

import math
import os

import attention_cases as cases
import pytest
import torch
from test_attention_ops import DTYPES, REGION, random_blocks, random_stripes

from pysparse import backend, ops
from pysparse.formats import StripeIndex

KERNELS = backend.kernels("attention", supported_only=True)
SHAPES = [
    {"rows": 150, "past": 71, "heads": 4, "key_heads": 2, "dim": 128},
    {"rows": 67, "batch": 2, "padded": True, "dim": 33},
    {"rows": 1, "past": 20, "dim": 256},
]


@pytest.fixture(params=KERNELS, ids=str)
def kernel(request):
    with backend.force_isa(request.param.isa):
        yield request.param


@pytest.fixture
def dtype(kernel):
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[kernel.dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_operation(kernel, dtype, shape):
    case = cases.draw(20, dtype, **shape)
    qkv = (case.q, case.k, case.v)
    cases.assert_close(ops.flash_attention(*qkv, **case.span), cases.exact(case, case.causal_mask()), dtype)
    cases.assert_close(
        ops.flash_attention(*qkv, causal=False, **case.span), cases.exact(case, case.full_mask()), dtype
    )
    out, lse, _ = ops.anchor_attention(*qkv, REGION, ops.StripeRule(math.inf), **case.span)
    cases.assert_close((out, lse), cases.exact(case, case.causal_mask()), dtype)
    stripes, blocks = random_stripes(case, 64), random_blocks(case, 32, 48)
    cases.assert_close(
        ops.stripe_attention(*qkv, stripes, **case.span),
        cases.exact(case, cases.stripe_mask(case, stripes)),
        dtype,
    )
    cases.assert_close(
        ops.block_sparse_attention(*qkv, blocks, **case.span),
        cases.exact(case, cases.block_mask(case, blocks)),
        dtype,
    )
    mass = ops.block_mass(case.q, case.k, 16, **case.span)
    assert torch.allclose(mass.sum(dim=-1), torch.ones(()), atol=1e-4)


def test_large_logits_rescale(kernel, dtype):
    """Row maxima that climb by thousands along the keys: the running state is rescaled at every panel."""
    case = cases.draw(21, dtype, rows=300, dim=64, spread=4.0)
    case.k.mul_(torch.linspace(1, 40, 300)[:, None].to(dtype))
    out, _ = ops.flash_attention(case.q, case.k, case.v)
    expected, _ = cases.exact(case, case.causal_mask())
    # A logit's rounding error grows with its size: 1e4 units x 2^-24 x the chain of 64 sums.
    assert float((out.double() - expected).norm() / expected.norm()) < (
        2e-2 if dtype == torch.bfloat16 else 2e-3
    )


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_spreads_to_the_rows_that_see_it(kernel, dtype, where, value):
    case = cases.draw(22, dtype, rows=200, dim=32, heads=1)
    {"q": case.q, "k": case.k, "v": case.v}[where][0, 0, 70, 3] = value
    rule = ops.StripeRule(math.inf)
    for out in (
        ops.flash_attention(case.q, case.k, case.v)[0],
        ops.anchor_attention(case.q, case.k, case.v, REGION, rule)[0],
    ):
        spoilt = ~out[0, 0].isfinite()
        if where == "q":
            assert spoilt[70].all() or value == math.inf
            assert not spoilt[:70].any()
            assert not spoilt[71:].any()
        elif where == "v":
            assert spoilt[70:, 3].all()
            assert not spoilt[:, :3].any()
            assert not spoilt[:, 4:].any()
        elif math.isnan(value):
            assert spoilt[70:].all()
            assert not spoilt[:64].any()  # a row of the same tile may be spoilt by a masked weight, 0 x NaN


def test_a_state_continues_where_it_stopped(kernel, dtype):
    case = cases.draw(23, dtype, rows=140, past=64, dim=48)
    region = ops.AnchorRegion(64, 0, 0)
    everything = torch.ones(1, 2, 4, 204, dtype=torch.bool)
    for g in range(4):
        everything[:, :, g, g * 64 :] = False
    index = StripeIndex.from_mask(everything, 64)
    state = ops.anchor_state(case.q, case.k, case.v, region)
    both = ops.stripe_attention(case.q, case.k, case.v, index, state)
    cases.assert_close(both, cases.exact(case, case.causal_mask()), dtype)


def test_any_strides(kernel, dtype):
    """transformers hands over transposed views, and a cache its longer storage."""
    case = cases.draw(24, dtype, rows=90, heads=4, key_heads=2, dim=64)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    store = torch.full((1, 2, 120, 80), math.nan, dtype=dtype)
    store[:, :, :90, 8:72] = case.k
    k = store[:, :, :90, 8:72]
    v = case.v.repeat_interleave(2, dim=3)[..., ::2]  # the last dimension itself is strided
    plain, strided = ops.flash_attention(case.q, case.k, case.v), ops.flash_attention(q, k, v)
    assert torch.equal(plain[0], strided[0])
    assert torch.equal(plain[1], strided[1])


def test_unused_tail_of_a_cache_is_never_read(kernel, dtype):
    case = cases.draw(25, dtype, rows=50, past=20, tail=40, dim=64)
    case.k[:, :, 70:] = case.v[:, :, 70:] = math.nan
    out, lse = ops.flash_attention(case.q, case.k, case.v, **case.span)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.skipif("PYSPARSE_NUM_THREADS" in os.environ, reason="the number of threads is fixed")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    case = cases.draw(26, dtype, rows=400, heads=4, key_heads=2, dim=64)
    rule, blocks = ops.StripeRule(2.0), random_blocks(case, 64, 64)

    def answers():
        return [
            *ops.flash_attention(case.q, case.k, case.v),
            *ops.anchor_attention(case.q, case.k, case.v, REGION, rule)[:2],
            *ops.block_sparse_attention(case.q, case.k, case.v, blocks),
            ops.proxy_scores(case.q, case.k, ops.ProxyGrid(2, 32)),
            ops.block_mass(case.q, case.k),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = answers()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(alone, answers(), strict=True))
    finally:
        torch.set_num_threads(before)
