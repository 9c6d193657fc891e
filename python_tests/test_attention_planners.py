"""Planners: what they select, what is computed of it, and what must not depend on how a prompt is cut or padded."""

import dataclasses
import itertools
import math

import pytest
import torch

from pysparse.attention import AttentionInput, AttentionOptions, AttentionPlan, dense, execute, run_attention
from pysparse.attention.dispatch import row_recall
from pysparse.attention.selection import (
    block_means,
    block_sums,
    cumulative_budget,
    rank_descending,
    top_mass,
)
from pysparse.attention.synthetic import SINKS, Synthetic
from pysparse.methods import (
    PLANNERS,
    AnchorAttention,
    FlexPrefill,
    ProxyAttention,
    StreamingAttention,
    VerticalSlash,
    XAttention,
    planner_for,
)
from pysparse.methods.flexprefill import divergence
from pysparse.ops.attention import anchor_attention, proxy_scores

SMALL = {
    "anchor": AnchorAttention(theta=6.0, group_size=128, step=8, init=32, local=32),
    "anchor-shared": AnchorAttention(theta=6.0, group_size=128, step=8, init=32, local=32, share_kv=True),
    "proxy": ProxyAttention(gamma=0.9, proxies=2, block=32, minimum=64),
    "proxy-causal": ProxyAttention(gamma=0.9, block=32, minimum=0, budget="causal"),
    "streaming": StreamingAttention(sink=32, window=64, block=32),
    "vertical-slash": VerticalSlash(vertical=40, slash=60, probe=16, block=32),
    "flexprefill": FlexPrefill(gamma=0.9, tau=0.3, minimum=64, block=32),
    "xattention": XAttention(threshold=0.8, stride=8, block=32),
}
TOLERANCE = 2e-5  # float32 sums of up to some thousand terms of size one


def inputs(length=320, rows=None, batch=1, key_range=None, seed=0, structure=True):
    made = Synthetic(
        length, query_heads=4, kv_heads=2, head_dim=64, batch=batch, seed=seed, stripe_fraction=0.05, dwell=100,
        structure=structure,
    ).make(torch.float32)  # fmt: skip
    query, key, value = made
    query = query if rows is None else query[:, :, length - rows :]
    return AttentionInput.of(query, key, value, key_range=key_range)


def plan_mask(given, plan):
    """The pairs of a plan, [B, Hq, N, M], straight from the definitions; every key's times of being counted."""
    batch, heads, rows, _ = given.query.shape
    keys = given.key.shape[2]
    counted = torch.zeros(batch, heads, rows, keys, dtype=torch.int64)
    for b in range(batch):
        start, stop = (0, keys) if given.key_range is None else given.key_range[b].tolist()
        p = torch.arange(rows)[:, None] + given.q_offset - start
        j = torch.arange(keys)[None] - start
        visible = (j <= p) & (j >= 0) & (j < stop - start) & (p >= 0) & (p < stop - start)
        if plan.region is not None:
            region = plan.region
            local = (p // region.group_size * region.group_size - region.local).clamp(min=region.init)
            counted[b] += visible & ((j < region.init) | (j >= local))
        for index, unit in ((plan.stripes, 1), (plan.blocks, None)):
            if index is None:
                continue
            mask = index.to_mask()[b].repeat_interleave(heads // index.shape[1], 0)
            size = index.group_size if unit else index.block_q
            row = (p // size).clamp(0, mask.shape[1] - 1).expand(rows, keys)
            column = (
                (j + start if unit else j // index.block_k).clamp(0, mask.shape[2] - 1).expand(rows, keys)
            )
            counted[b] += mask[:, row, column] & visible
    return counted


def masked_attention(given, mask):
    ratio = given.query.shape[1] // given.key.shape[1]
    key, value = (t.double().repeat_interleave(ratio, 1) for t in (given.key, given.value))
    logits = (given.query.double() @ key.transpose(2, 3) * given.scale).masked_fill(~mask, -math.inf)
    out = logits.softmax(-1).nan_to_num(0.0) @ value
    return out, logits.logsumexp(-1)


CASES = [
    {},
    {"length": 270, "rows": 77},
    {"length": 200, "batch": 2, "key_range": torch.tensor([[37, 200], [0, 161]])},
    {"length": 31},
    {"length": 1},
]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_plan_computes_what_it_says_and_every_key_once(name, case):
    given = inputs(**CASES[case])
    plan = SMALL[name].plan(given)
    counted = plan_mask(given, plan)
    assert counted.max() <= 1
    assert plan.pairs(given) == counted.sum()
    visible = plan_mask(given, StreamingAttention(sink=10**6, window=10**6, block=32).plan(given))
    assert plan.density(given) == pytest.approx(float(counted.sum() / visible.sum()))
    has_row = visible.any(-1)
    assert (counted.any(-1) == has_row).all()  # no row without a key
    out, lse = execute(given, plan)
    expected, expected_lse = masked_attention(given, counted.bool())
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE, rtol=1e-4)
    torch.testing.assert_close(lse.double()[has_row.expand_as(lse)], expected_lse[has_row.expand_as(lse)],
                               atol=TOLERANCE, rtol=1e-5)  # fmt: skip


EVERYTHING = {
    "anchor": dataclasses.replace(SMALL["anchor"], theta=math.inf),
    "anchor-shared": dataclasses.replace(SMALL["anchor-shared"], theta=math.inf),
    "proxy": dataclasses.replace(SMALL["proxy"], gamma=1.0),
    "proxy-causal": dataclasses.replace(SMALL["proxy-causal"], gamma=1.0),
    "streaming": StreamingAttention(sink=0, window=10**6, block=32),
    "vertical-slash": VerticalSlash(vertical=10**6, slash=10**6, block=32),
    "flexprefill": dataclasses.replace(SMALL["flexprefill"], gamma=1.0),
    "xattention": dataclasses.replace(SMALL["xattention"], threshold=1.0),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_widest_setting_is_exact_attention(name):
    given = inputs(length=260, batch=2, key_range=torch.tensor([[37, 260], [0, 191]]))
    plan = EVERYTHING[name].plan(given)
    assert plan.density(given) == 1.0
    torch.testing.assert_close(execute(given, plan), dense(given), atol=TOLERANCE, rtol=1e-4)


def random_lengths(count, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, 5001, (count,), generator=random).tolist()


@pytest.mark.parametrize(
    "length",
    [*random_lengths(3, 1), *(pytest.param(n, marks=pytest.mark.slow) for n in random_lengths(40, 2))],
)
def test_an_infinite_theta_is_exact_for_any_length(length):
    made = Synthetic(length, query_heads=2, kv_heads=1, head_dim=64, seed=length).make(torch.float32)
    given = AttentionInput.of(*made)
    planner = AnchorAttention(theta=math.inf, group_size=512)
    exact = dense(given)
    torch.testing.assert_close(execute(given, planner.plan(given)), exact, atol=TOLERANCE, rtol=1e-4)
    fused = planner.attend(given)
    assert fused.density == 1.0
    torch.testing.assert_close((fused.out, fused.lse), exact, atol=TOLERANCE, rtol=1e-4)


def test_theta_minus_infinity_is_sink_and_window():
    given = inputs(length=700)
    planner = dataclasses.replace(SMALL["anchor"], theta=-math.inf)
    plan = planner.plan(given)
    assert plan.stripes.nnz == 0
    position, key = torch.arange(700)[:, None], torch.arange(700)[None]
    seen = (key <= position) & ((key < 32) | (key >= position // 128 * 128 - 32))
    expected, _ = masked_attention(given, seen.expand(1, 4, 700, 700))
    torch.testing.assert_close(execute(given, plan)[0].double(), expected, atol=TOLERANCE, rtol=1e-4)


def test_stripes_recall_and_density_rise_with_theta():
    given = inputs(length=640)
    rows = torch.arange(0, 640, 7)
    masks, recalls = [], []
    for theta in (-2.0, 2.0, 6.0, 10.0, 30.0):
        plan = dataclasses.replace(SMALL["anchor"], theta=theta).plan(given)
        masks.append(plan.stripes.to_mask())
        recalls.append(row_recall(given, execute(given, plan)[1], rows))
    for narrow, wide in itertools.pairwise(masks):
        assert not (narrow & ~wide).any()  # nested, not only more
    for narrow, wide in itertools.pairwise(recalls):
        assert (wide >= narrow - 1e-5).all()
    assert recalls[0].mean() < 0.9 < recalls[-1].mean()
    assert recalls[-1].max() <= 1 + 1e-4  # more would be a key counted twice


def test_without_pooling_the_missed_mass_obeys_the_bound():
    given = inputs(length=600)
    theta = 4.0
    planner = AnchorAttention(theta=theta, group_size=16, step=16, init=16, local=16)  # each row its own pool
    plan = planner.plan(given)
    dropped = (torch.arange(600)[None] <= torch.arange(600)[:, None]) & (plan_mask(given, plan) == 0)
    mass, _ = masked_attention(given, torch.ones(600, 600).tril().bool().expand(1, 4, 600, 600))
    lse = masked_attention(given, plan_mask(given, plan).bool())[1]
    whole = masked_attention(given, torch.ones(600, 600).tril().bool().expand(1, 4, 600, 600))[1]
    missed = (whole - lse).expm1()  # relative to the mass that was kept, which holds the anchor's unit
    assert (missed <= dropped.sum(-1) * math.exp(-theta) * (1 + 1e-4) + 1e-6).all()
    assert dropped.any()
    assert mass.isfinite().all()


@pytest.mark.parametrize("longer", [769, 1000])
def test_complete_groups_do_not_change_when_the_prompt_grows(longer):
    made = Synthetic(longer, query_heads=4, kv_heads=2, head_dim=64).make(torch.float32)
    planner = SMALL["anchor"]
    whole = planner.attend(AttentionInput.of(*made))
    for length in (640, 700):
        complete = length // 128 * 128
        part = planner.attend(AttentionInput.of(*(t[:, :, :length] for t in made)))
        assert torch.equal(part.out[:, :, :complete], whole.out[:, :, :complete])


def test_chunks_of_whole_groups_give_what_one_call_gives():
    made = Synthetic(640, query_heads=4, kv_heads=2, head_dim=64).make(torch.float32)
    planner = SMALL["anchor"]
    whole = planner.attend(AttentionInput.of(*made)).out
    query, key, value = made
    for begin in range(0, 640, 256):
        end = min(640, begin + 256)
        chunk = AttentionInput.of(query[:, :, begin:end], key[:, :, :end], value[:, :, :end])
        torch.testing.assert_close(
            planner.attend(chunk).out, whole[:, :, begin:end], atol=TOLERANCE, rtol=1e-4
        )


@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_nothing(name):
    alone = inputs(length=300)
    planner = SMALL[name]
    expected = execute(alone, planner.plan(alone))[0]
    for before, after in ((0, 41), (53, 0), (16, 16)):
        pad = (0, 0, before, after)
        padded = [torch.nn.functional.pad(t, pad, value=9.0) for t in (alone.query, alone.key, alone.value)]
        given = AttentionInput.of(*padded, key_range=torch.tensor([[before, before + 300]]))
        out = execute(given, planner.plan(given))[0]
        torch.testing.assert_close(out[:, :, before : before + 300], expected, atol=TOLERANCE, rtol=1e-4)
        assert (out[:, :, :before] == 0).all()
        assert (out[:, :, before + 300 :] == 0).all()


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_is_its_sequences(name):
    both = inputs(length=300, batch=2)
    planner = SMALL[name]
    out = execute(both, planner.plan(both))[0]
    for b in range(2):
        one = AttentionInput.of(*(t[b : b + 1] for t in (both.query, both.key, both.value)))
        torch.testing.assert_close(
            execute(one, planner.plan(one))[0], out[b : b + 1], atol=TOLERANCE, rtol=1e-4
        )


def test_adding_a_constant_to_all_logits_changes_nothing():
    given = inputs(length=500)
    moved = AttentionInput(
        torch.cat([given.query, torch.full((1, 4, 500, 1), 4.0)], -1),
        torch.cat([given.key, torch.full((1, 2, 500, 1), 3.0)], -1),
        torch.cat([given.value, torch.zeros(1, 2, 500, 1)], -1), given.scale, 0,
    )  # fmt: skip
    one, other = (SMALL["anchor"].plan(x) for x in (given, moved))
    assert torch.equal(one.stripes.keys, other.stripes.keys)
    out = execute(moved, other)[0][..., :64]
    torch.testing.assert_close(out, execute(given, one)[0], atol=1e-4, rtol=1e-3)


def test_permuting_candidates_permutes_the_stripes_only():
    given = inputs(length=512)
    planner = dataclasses.replace(SMALL["anchor"], theta=3.0)
    order = torch.arange(512)
    order[32:224] = order[32:224][torch.randperm(192, generator=torch.Generator().manual_seed(0))]
    last = AttentionInput(given.query[:, :, 384:], given.key, given.value, given.scale, 384)  # group 3 alone
    moved = AttentionInput(last.query, last.key[:, :, order], last.value[:, :, order], last.scale, 384)
    one, other = planner.plan(last), planner.plan(moved)
    assert torch.equal(one.stripes.to_mask()[..., order], other.stripes.to_mask())
    assert 0 < one.stripes.nnz < one.stripes.to_mask()[:, :, 3].numel()
    torch.testing.assert_close(execute(last, one)[0], execute(moved, other)[0], atol=TOLERANCE, rtol=1e-4)


def test_the_output_is_a_mean_of_values_and_linear_in_them():
    given = inputs(length=400)
    out = execute(given, SMALL["anchor"].plan(given))[0]
    low, high = given.value.amin(2, keepdim=True), given.value.amax(2, keepdim=True)
    low, high = low.repeat_interleave(2, 1), high.repeat_interleave(2, 1)
    assert (out >= low - 1e-5).all()
    assert (out <= high + 1e-5).all()
    scaled = dataclasses.replace(given, value=3 * given.value)
    torch.testing.assert_close(
        execute(scaled, SMALL["anchor"].plan(scaled))[0], 3 * out, atol=1e-4, rtol=1e-4
    )


def test_a_shared_list_is_the_union_over_the_query_heads():
    given = inputs(length=600)
    own = SMALL["anchor"].plan(given).stripes.to_mask()
    shared = SMALL["anchor-shared"].plan(given).stripes.to_mask()
    assert torch.equal(shared, own.unflatten(1, (2, 2)).any(2))


def test_grouped_heads_equal_repeated_ones():
    given = inputs(length=300)
    repeated = dataclasses.replace(
        given, key=given.key.repeat_interleave(2, 1), value=given.value.repeat_interleave(2, 1)
    )
    for name in ("anchor", "streaming", "vertical-slash", "flexprefill", "xattention"):
        out = [execute(x, SMALL[name].plan(x))[0] for x in (given, repeated)]
        torch.testing.assert_close(*out, atol=TOLERANCE, rtol=1e-4)


def test_proxy_blocks_nest_in_gamma_and_minimum():
    given = inputs(length=640)
    base = SMALL["proxy"]
    for name, values in (("gamma", (0.3, 0.6, 0.9, 1.0)), ("minimum", (0, 64, 256, 1024))):
        masks = [dataclasses.replace(base, **{name: v}).plan(given).blocks.to_mask() for v in values]
        for narrow, wide in itertools.pairwise(masks):
            assert not (narrow & ~wide).any()
        assert masks[0].sum() < masks[-1].sum()


def test_proxy_selection_ignores_values_and_the_order_of_heads_in_a_group():
    given = inputs(length=400)
    base = SMALL["proxy"]
    louder = dataclasses.replace(given, value=100 * given.value)
    assert torch.equal(base.plan(given).blocks.blocks, base.plan(louder).blocks.blocks)
    order = [1, 0, 3, 2]
    swapped = given.query[:, order]
    torch.testing.assert_close(
        proxy_scores(given.query, given.key, base.grid), proxy_scores(swapped, given.key, base.grid)
    )


def test_proxies_must_divide_the_key_heads():
    given = inputs(length=64)
    with pytest.raises(ValueError, match="proxies=3"):
        ProxyAttention(proxies=3).plan(given)


def test_the_fused_pass_is_the_three_steps():
    given = inputs(length=700)
    planner = SMALL["anchor"]
    plan = planner.plan(given)
    fused = planner.attend(given)
    torch.testing.assert_close((fused.out, fused.lse), execute(given, plan), atol=TOLERANCE, rtol=1e-4)
    stripes = anchor_attention(given.query, given.key, given.value, planner.region, planner.rule)[2]
    assert torch.equal(stripes.keys, plan.stripes.keys)
    assert fused.density == plan.density(given)


def test_the_estimate_is_near_the_density_and_dense_prompts_are_exact():
    given = inputs(length=1000)
    for theta in (-math.inf, 4.0, math.inf):
        planner = dataclasses.replace(SMALL["anchor"], theta=theta)
        assert planner.estimate(given) == pytest.approx(planner.plan(given).density(given), abs=0.1)
        outcome = run_attention(given, AttentionOptions(planner, min_length=0, max_density=0.7))
        assert outcome.reason == ("density above 0.70" if theta == math.inf else "")
        assert outcome.way == ("dense" if theta == math.inf else "sparse")
    assert SMALL["anchor"].estimate(inputs(length=60)) == 1.0


def test_a_plan_may_not_count_twice_or_compute_nothing():
    given = inputs(length=64)
    plan = SMALL["anchor"].plan(given)
    blocks = SMALL["streaming"].plan(given).blocks
    with pytest.raises(ValueError, match="count twice"):
        AttentionPlan(blocks=blocks, region=plan.region, carry=plan.carry)
    with pytest.raises(ValueError, match="computes nothing"):
        AttentionPlan()
    with pytest.raises(ValueError, match="comes with the state"):
        AttentionPlan(stripes=plan.stripes, region=plan.region)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AnchorAttention(theta=math.nan), "theta is NaN"),
        (lambda: AnchorAttention(group_size=100), "group_size=100"),
        (lambda: AnchorAttention(step=7), "pools=7 do not divide"),
        (lambda: AnchorAttention(init=-16), "init=-16"),
        (lambda: ProxyAttention(gamma=0), "gamma=0"),
        (lambda: ProxyAttention(gamma=math.nan), "gamma=nan"),
        (lambda: ProxyAttention(stride=3), "stride=3"),
        (lambda: ProxyAttention(minimum=-1), "minimum=-1"),
        (lambda: ProxyAttention(budget="most"), "budget='most'"),
        (lambda: StreamingAttention(window=-1), "window=-1"),
        (lambda: VerticalSlash(probe=0), "probe=0"),
        (lambda: FlexPrefill(gamma=-1.0), "gamma=-1.0"),
        (lambda: XAttention(stride=24), "stride=24"),
        (lambda: Synthetic(0), "length=0"),
        (lambda: Synthetic(10, query_heads=3), "query_heads=3"),
        (lambda: Synthetic(10, head_dim=16), "head_dim=16"),
        (lambda: planner_for("anchr"), "did you mean 'anchor'"),
    ],
)
def test_wrong_settings_name_the_value(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_planner_for_takes_names_and_planners():
    assert planner_for("proxy") is PLANNERS["proxy"]
    assert planner_for(SMALL["anchor"]) is SMALL["anchor"]


def test_the_generator_makes_what_it_promises():
    made = Synthetic(3000, query_heads=4, kv_heads=2, sharpness=(1.0, 1.0))
    query, key, _ = made.make(torch.float32)
    logits = query[0, 0, 2500:] @ key[0, 0].T * 128**-0.5
    assert logits[:, :SINKS].mean() == pytest.approx(made.sink, abs=1.5)
    near = logits[torch.arange(500), torch.arange(2500, 3000)]
    assert near.mean() == pytest.approx(made.local, abs=1.5)
    assert logits[:, SINKS:2000].std() < 3.5
    again = made.make(torch.float32)
    assert torch.equal(query, again[0])
    flat = Synthetic(3000, structure=False).make(torch.float32)[0]
    assert flat.std() == pytest.approx(1.0, abs=0.01)


def test_structure_is_what_makes_selection_pay():
    planner = AnchorAttention(theta=4.0, group_size=128, step=8, init=32, local=32)
    rows = torch.arange(0, 1000, 11)
    recall = {}
    for structure in (True, False):
        given = inputs(length=1000, structure=structure)
        plan = planner.plan(given)
        recall[structure] = row_recall(given, execute(given, plan)[1], rows).mean(), plan.density(given)
    assert recall[True][0] > 0.95
    assert recall[True][1] < 0.6
    # without structure every key is as good as another: the recall is no better than the share computed
    assert recall[False][0] < recall[False][1] + 0.1


@pytest.mark.parametrize(("step", "found"), [(4, False), (64, True)])
def test_one_needle_row_shows_what_pooling_loses(step, found):
    query, key, value = (torch.zeros(1, 1, 512, 64) for _ in range(3))
    query[..., 1] = key[0, 0, 0, 1] = 9.0  # every row sees the first key at about 10
    query[0, 0, 400, 0] = key[0, 0, 100, 0] = 13.0  # one row sees one key at about 21, its pool of 16 at 1.3
    given = AttentionInput.of(query, key, value)
    plan = AnchorAttention(theta=4.0, group_size=64, step=step, init=16, local=16).plan(given)
    recall = float(row_recall(given, execute(given, plan)[1], torch.tensor([400])))
    assert (recall > 0.99) == found
    assert plan.stripes.keys.tolist() == ([100] if found else [])


def test_selection_helpers():
    scores = torch.tensor([[0.2, 0.5, 0.5, 0.1]])
    assert rank_descending(scores).tolist() == [[2, 0, 1, 3]]
    mass = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert cumulative_budget(mass, 0.5).tolist() == [1, 0]
    assert cumulative_budget(mass, 0.51).tolist() == [2, 0]
    assert cumulative_budget(mass, 1.0).tolist() == [4, 4]
    assert top_mass(mass, 0.6, minimum=1).tolist() == [
        [True, True, False, False],
        [True, False, False, False],
    ]
    assert block_sums(torch.ones(7), 4, lead=2).tolist() == [2.0, 4.0, 1.0]
    assert block_means(torch.arange(5.0)[:, None], 2, lead=1).flatten().tolist() == [0.0, 1.5, 3.5]
    same = torch.tensor([0.25, 0.75])
    assert divergence(same, same) == 0
    assert divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(math.log(2))
