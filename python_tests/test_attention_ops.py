"""The attention operations beside a float64 masked softmax, and what they promise about keys and lists."""

import dataclasses
import math

import attention_cases as cases
import pytest
import torch

from pysparse import ops
from pysparse.formats import BlockIndex, StripeIndex
from pysparse.ops import selection_reference

DTYPES = (torch.float32, torch.bfloat16)
REGION = ops.AnchorRegion(group_size=64, init=16, local=32)
SHAPES = [
    {"rows": 1, "past": 40},
    {"rows": 0},
    {"rows": 300, "heads": 4, "key_heads": 2, "dim": 80},
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
    mask = cases.block_mask(case, index, causal)
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


def pooled_case(dtype, **shape):
    """Few keys come near the threshold, and none so near that rounding decides: scores lie far apart."""
    case = cases.draw(8, dtype, rows=200, heads=4, key_heads=2, dim=48, **shape)
    strong = torch.rand(case.k.shape[:3], generator=torch.Generator().manual_seed(1)) < 0.2
    case.k.mul_(0.02)
    case.k[..., 0] = torch.where(strong, 4.0, 0.1)
    case.q.mul_(0.02)
    case.q[..., 0] = 4.0
    return case


SPANS = [{}, {"past": 100, "batch": 2, "padded": True}, {"past": 37, "tail": 20}]


@pytest.mark.parametrize("shape", SPANS, ids=str)
@pytest.mark.parametrize("share_kv", [False, True])
def test_stripes_are_those_of_the_rule(dtype, shape, share_kv):
    case = pooled_case(dtype, **shape)
    rule = ops.StripeRule(1.0, pools=32, share_kv=share_kv)
    state = ops.anchor_state(case.q, case.k, case.v, REGION, **case.span)
    index = ops.identify_stripes(case.q, case.k, state.max, REGION, rule, **case.span)
    mask = selection_reference.keep_mask(
        case.q, case.k, state.max, 48**-0.5, case.q_offset, case.bounds, (64, 16, 32), (1.0, 32, share_kv)
    )
    assert torch.equal(index.to_mask(), mask)
    assert 0 < index.nnz < mask.sum() + index.nnz
    out, lse, again = ops.anchor_attention(case.q, case.k, case.v, REGION, rule, **case.span)
    assert torch.equal(again.offsets, index.offsets)
    assert torch.equal(again.keys, index.keys)
    chosen = cases.stripe_mask(case, index) | cases.anchor_mask(case, REGION)
    cases.assert_close((out, lse), cases.exact(case, chosen), dtype)


@pytest.mark.parametrize("shape", SPANS[1:], ids=str)
@pytest.mark.parametrize("grid", [(1, 64, 4), (2, 16, 1), (2, 32, 16)], ids=str)
def test_proxy_scores(dtype, shape, grid):
    case = cases.draw(9, dtype, rows=200, heads=4, key_heads=2, dim=40, **shape)
    actual = ops.proxy_scores(case.q, case.k, ops.ProxyGrid(*grid), **case.span)
    expected = selection_reference.proxy_scores(case.q, case.k, 40**-0.5, case.q_offset, case.bounds, grid)
    assert torch.allclose(actual, expected, rtol=2e-3 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SPANS[1:], ids=str)
@pytest.mark.parametrize("block", [32, 144])
def test_block_mass(dtype, shape, block):
    case = cases.draw(10, dtype, rows=200, heads=4, key_heads=2, dim=40, **shape)
    actual = ops.block_mass(case.q, case.k, block, **case.span)
    expected = selection_reference.block_mass(case.q, case.k, 40**-0.5, case.q_offset, case.bounds, block)
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-6)
    assert torch.allclose(actual.sum(dim=-1), torch.ones(()), atol=1e-4)


def test_states_merge(dtype):
    case = cases.draw(7, dtype, rows=100, past=60)
    half = {"q_offset": 60, "causal": False}
    parts = [
        ops.flash_attention_state(case.q, case.k, case.v, key_range=torch.tensor([bounds]), **half)
        for bounds in ([0, 70], [70, 70], [70, 160])
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    cases.assert_close((merged.out, merged.lse), cases.exact(case, case.full_mask()), dtype)


def broken(case, **changes):
    """The arguments of stripe_attention's operation, with lists that no container would let pass."""
    lists = {
        "offsets": torch.tensor([0, 2, 2, 2, 2, 2, 2]),
        "keys": torch.tensor([3, 7], dtype=torch.int32),
    } | changes
    return torch.ops.pysparse.stripe_attention(
        case.q, case.k, case.v, lists["offsets"], lists["keys"], 2, 64, None, None, None, None, 0.1, 100
    )


def in_group_1(*keys):
    return {"offsets": torch.tensor([0, 0, 2, 2, 2, 2, 2]), "keys": torch.tensor(keys, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "before the group's first row"),  # group 0 has none before it
        ({"offsets": torch.tensor([0, 0, 2, 2, 2, 2, 3])}, "offsets"),
        ({"offsets": torch.tensor([0, 0, 9, 2, 2, 2, 2])}, "begins|offsets"),
        ({"offsets": torch.tensor([0, 0, 2, 2])}, "groups|lists|offsets"),
        (in_group_1(7, 3), "ascend"),
        (in_group_1(7, 7), "ascend"),
        (in_group_1(-1, 7), "must lie"),
        (in_group_1(7, 999), "must lie"),
        (in_group_1(7, 64), "before"),
    ],
)
def test_lists_are_refused_before_they_are_followed(dtype, changes, said):
    case = cases.draw(11, dtype, rows=50, past=100)
    with pytest.raises(ValueError, match=said):
        broken(case, **changes)


def test_lists_and_states_of_another_kind_are_named(dtype):
    case = cases.draw(11, dtype, rows=50, past=100)
    stripes, blocks = random_stripes(case, 64), random_blocks(case, 64, 64)
    place = {"q_offset": 100}
    meta = [tensor.to("meta") for tensor in (case.q, case.k, case.v)]
    for index, run in ((stripes, ops.stripe_attention), (blocks, ops.block_sparse_attention)):
        with pytest.raises(ValueError, match="q is on meta, the lists of the index on cpu, cpu"):
            run(*meta, index, **place)
    state = ops.anchor_state(case.q, case.k, case.v, REGION, **place)
    for changes, said in (
        (
            {"max": state.max.to("meta")},
            r"state.max is float32 \(1, 2, 50\) on cpu, got .* \(1, 2, 50\) on meta",
        ),
        ({"out": state.out.double()}, "state.out is float32 .* got torch.float64"),
        (
            {"denominator": state.denominator[..., :-1]},
            r"state.denominator is .* got torch.float32 \(1, 2, 49\)",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            ops.stripe_attention(
                case.q, case.k, case.v, stripes, dataclasses.replace(state, **changes), **place
            )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda q, k: ops.flash_attention(q[0], k, k), "batch, heads, length, dim"),
        (lambda q, k: ops.flash_attention(q, k[:, :, :, :8], k[:, :, :, :8]), "head dimension"),
        (lambda q, k: ops.flash_attention(q[:, :1], k.expand(1, 3, -1, -1), k.expand(1, 3, -1, -1)), "do not divide"),
        (lambda q, k: ops.flash_attention(q, k.double(), k.double()), "differ"),
        (lambda q, k: ops.flash_attention(q, k, k, scale=math.nan), "scale=nan"),
        (lambda q, k: ops.flash_attention(q, k, k, q_offset=5), "q_offset=5"),
        (lambda q, k: ops.flash_attention(q, k, k, key_range=torch.tensor([[3, 90]])), r"\[3, 90\)"),
        (lambda q, k: ops.flash_attention(q, k, k, key_range=torch.tensor([[3, 9]], dtype=torch.int32)), "int64"),
        (lambda q, k: ops.flash_attention(q.clone().requires_grad_(), k, k), "no backward"),
        (lambda q, k: ops.anchor_attention(q, k, k, ops.AnchorRegion(48), ops.StripeRule(pools=32)), "pools=32"),
        (lambda q, k: ops.proxy_scores(q, k, ops.ProxyGrid(proxies=3)), "proxies=3"),
        (lambda q, k: ops.AnchorRegion(group_size=100), "group_size=100"),
        (lambda q, k: ops.StripeRule(theta=math.nan), "theta is NaN"),
        (lambda q, k: ops.ProxyGrid(stride=5), "stride=5"),
    ],
)  # fmt: skip
def test_bad_input_is_named(dtype, make, said):
    case = cases.draw(12, dtype, rows=40, dim=16)
    with pytest.raises(ValueError, match=said):
        make(case.q, case.k)


@pytest.mark.parametrize("seed", range(4))
def test_prompts_of_any_length_count_every_key_once(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(1, 900, (), generator=generator))
    case = cases.draw(seed, dtype, rows=rows, heads=1, dim=16)
    rule = ops.StripeRule(math.inf)
    region = ops.AnchorRegion(*[(64, 16, 16), (128, 128, 0), (256, 0, 128), (16, 48, 32)][seed])
    out, lse, _ = ops.anchor_attention(case.q, case.k, case.v, region, rule)
    cases.assert_close((out, lse), cases.exact(case, case.causal_mask()), dtype)


def test_complete_groups_do_not_see_what_follows(dtype):
    case = cases.draw(13, dtype, rows=300, dim=32)
    rule = ops.StripeRule(1.0)
    whole = ops.anchor_attention(case.q, case.k, case.v, REGION, rule)[0]
    part = ops.anchor_attention(*(x[:, :, :192] for x in (case.q, case.k, case.v)), REGION, rule)[0]
    assert torch.equal(whole[:, :, :192], part)


def test_operations_trace_with_unknown_numbers_of_stripes(dtype):
    case = cases.draw(14, dtype, rows=200, dim=32)

    for name in ("flash_attention", "flash_attention_state"):
        torch.library.opcheck(
            getattr(torch.ops.pysparse, name).default,
            (case.q, case.k, case.v, None, 0.2, True, 0),
            test_utils=("test_schema", "test_faketensor"),
        )
    arguments = (case.q, case.k, case.v, None, 0.2, 0, 64, 16, 32, 1.0, 16, False)
    torch.library.opcheck(
        torch.ops.pysparse.anchor_attention.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
