"""The attention operations beside a float64 masked softmax, and what they promise about keys and lists."""

import math

import attention_cases as cases
import pytest
import torch

from pysparse import ops
from pysparse.formats import BlockIndex, StripeIndex

DTYPES = (torch.float32, torch.bfloat16)
REGION = ops.AnchorRegion(group_size=64, init=16, local=32)
SHAPES = [
    {},
    {"rows": 1, "past": 40},
    {"rows": 0},
    {"rows": 333, "heads": 4, "key_heads": 2, "dim": 80},
    {"rows": 150, "past": 70, "batch": 2, "padded": True, "dim": 48},
    {"rows": 90, "tail": 33, "dim": 33},
]
pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_stripes(case, group_size, seed=0, density=0.3, heads=None):
    groups = -(-(case.q_offset + case.q.shape[2]) // group_size)
    heads = case.q.shape[1] if heads is None else heads
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(case.q), heads, groups, case.k.shape[2], generator=generator) < density
    for b, (start, end) in enumerate(case.bounds):
        key = torch.arange(case.k.shape[2])
        for g in range(groups):
            mask[b, :, g] &= (key >= start) & (key < min(end, start + g * group_size))
    return StripeIndex.from_mask(mask, group_size)


def random_blocks(case, block_q, block_k, seed=0, density=0.4, heads=None):
    generator = torch.Generator().manual_seed(seed)
    heads = case.q.shape[1] if heads is None else heads
    q_blocks = -(-(case.q_offset + case.q.shape[2]) // block_q)
    key_blocks = -(-case.k.shape[2] // block_k)
    mask = torch.rand(len(case.q), heads, q_blocks, key_blocks, generator=generator) < density
    return BlockIndex.from_mask(mask, block_q, block_k)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_flash_is_exact_attention(dtype, shape, causal):
    case = cases.draw(1, dtype, **shape)
    mask = case.causal_mask() if causal else case.full_mask()
    actual = ops.flash_attention(case.q, case.k, case.v, causal=causal, **case.span)
    cases.assert_close(actual, cases.exact(case, mask), dtype)
    assert actual[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_anchor_region_is_what_it_says(dtype, shape):
    case = cases.draw(2, dtype, **shape)
    state = ops.anchor_state(case.q, case.k, case.v, REGION, **case.span)
    cases.assert_close((state.out, state.lse), cases.exact(case, cases.anchor_mask(case, REGION)), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stripes_alone_and_continued(dtype, shape):
    case = cases.draw(3, dtype, **shape)
    index = random_stripes(case, 64)
    alone = ops.stripe_attention(case.q, case.k, case.v, index, **case.span)
    stripes = cases.stripe_mask(case, index)
    cases.assert_close(alone, cases.exact(case, stripes), dtype)
    region = ops.AnchorRegion(64, 0, 0)  # each row's own group only: disjoint from every stripe
    state = ops.anchor_state(case.q, case.k, case.v, region, **case.span)
    both = ops.stripe_attention(case.q, case.k, case.v, index, state, **case.span)
    cases.assert_close(both, cases.exact(case, stripes | cases.anchor_mask(case, region)), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_blocks(dtype, shape, causal):
    case = cases.draw(4, dtype, **shape)
    index = random_blocks(case, 32, 48)
    mask = cases.block_mask(case, index) & (case.causal_mask() if causal else case.full_mask())
    actual = ops.block_sparse_attention(case.q, case.k, case.v, index, causal=causal, **case.span)
    cases.assert_close(actual, cases.exact(case, mask), dtype)
    state = ops.block_sparse_state(case.q, case.k, case.v, index, causal=causal, **case.span)
    cases.assert_close((state.out, state.lse), cases.exact(case, mask), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_infinite_theta_counts_every_key_once(dtype, shape):
    case = cases.draw(5, dtype, **shape)
    everything = ops.StripeRule(math.inf, pools=8)
    out, lse, index = ops.anchor_attention(case.q, case.k, case.v, REGION, everything, **case.span)
    cases.assert_close((out, lse), cases.exact(case, case.causal_mask()), dtype)
    chosen = cases.stripe_mask(case, index).int() + cases.anchor_mask(case, REGION).int()
    assert torch.equal(chosen, case.causal_mask().int().expand_as(chosen))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_theta_minus_infinity_is_sink_and_window(dtype, shape):
    case = cases.draw(6, dtype, **shape)
    nothing = ops.StripeRule(-math.inf, pools=8)
    out, lse, index = ops.anchor_attention(case.q, case.k, case.v, REGION, nothing, **case.span)
    assert index.nnz == 0
    cases.assert_close((out, lse), cases.exact(case, cases.anchor_mask(case, REGION)), dtype)


def test_states_merge(dtype):
    case = cases.draw(7, dtype, rows=100, past=60)
    half = {"q_offset": 60, "causal": False}
    parts = [
        ops.flash_attention_state(case.q, case.k, case.v, key_range=torch.tensor([bounds]), **half)
        for bounds in ([0, 70], [70, 70], [70, 160])
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    cases.assert_close((merged.out, merged.lse), cases.exact(case, case.full_mask()), dtype)
