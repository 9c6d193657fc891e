"""Whole rows as players, and standard errors of the orders alone: definitions, oracles, bits, bad input."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from test_shapley_entries import KINDS, LEVELS, data, fm_logit, head, logits, loss, same

from pysparse import backend, ops
from pysparse.ops import EntryDraw, EntryTotals
from pysparse.shapley import (
    DeepModel,
    EntryRun,
    FactorisationMachine,
    entry_shapley,
    score_shard,
)

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
FM = FactorisationMachine()


def rows_walked(samples, order, logit_of, sample):
    """Loss increases by field, removing whole rows in order, from the definition."""
    gone = np.zeros((len(order) + 1, len(order)), bool)
    for step, field in enumerate(order):
        gone[step + 1 :, field] = True
    e = np.where(gone[:, :, None], samples.base, samples.table[samples.ids[sample]].astype(float))
    result = np.empty(len(order))
    result[order] = np.diff(loss(samples.offset[sample] + logit_of(e), samples.labels[sample]))
    return result


def both_orders(samples, orders, logit_of, antithetic):
    found = np.stack([rows_walked(samples, order, logit_of, s) for s, order in enumerate(orders)])
    if antithetic:
        found += np.stack([rows_walked(samples, order[::-1], logit_of, s) for s, order in enumerate(orders)])
        found /= 2
    return found


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(("fields", "cols"), [(1, 1), (5, 3), (39, 16), (17, 17), (3, 64), (4, 40)])
@pytest.mark.parametrize("antithetic", [False, True])
def test_rows_of_a_factorisation_machine(isa, fields, cols, antithetic):
    samples = data(6, fields, 7, cols, seed=cols, scale=0.3)
    draw = EntryDraw(9, first=123, visit=4, antithetic=antithetic, players="field")
    orders = ops.draw_permutations(9, 123, 6, fields, visit=4)
    with backend.force_isa(isa):
        found = ops.fm_marginals(samples, draw)
        assert np.array_equal(found, ops.fm_marginals(samples, draw, orders))
    expected = both_orders(samples, orders, fm_logit, antithetic)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("isa", LEVELS)
def test_what_walks_of_other_shapes_leave_in_memory_is_not_read(isa):
    draw = EntryDraw(2, players="field")
    for fields, cols in ((39, 64), (39, 16), (4, 40), (3, 17), (3, 3)):
        samples = data(30, fields, 7, cols, scale=0.3)
        totals, expected = EntryTotals(7 * fields, 1), np.zeros((7 * fields, 1), np.int64)
        with backend.force_isa(isa):
            ops.fm_shapley(samples, draw, totals)
            marginals = ops.fm_marginals(samples, draw).astype(float)
        np.add.at(expected, samples.ids, np.rint(marginals * 2.0**36).astype(np.int64)[:, :, None])
        assert np.array_equal(totals.sums, expected), (fields, cols)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_deep_heads(kind):
    samples, model = data(3, 7, 9, 10, seed=2), head(kind, 70)
    draw = EntryDraw(1, first=5, players="field")
    found = ops.head_marginals(samples, draw, model)
    orders = ops.draw_permutations(1, 5, 3, 7)
    assert np.abs(found - both_orders(samples, orders, lambda e: logits(model, e), True)).max() < 2e-5
    np.testing.assert_allclose(ops.head_marginals_torch(samples, draw, model), found, atol=2e-5)


def test_estimates_of_rows_agree_with_all_orders():
    samples = data(10, 4, 5, 6, seed=3)
    run = EntryRun(8 * 10 * 400, seed=2, players="field", se="permutation")
    found = entry_shapley(FM, samples, run)
    truth = np.zeros((20, 1))
    for s in range(10):
        all_orders = [
            rows_walked(samples, np.array(o), fm_logit, s) for o in itertools.permutations(range(4))
        ]
        np.add.at(truth, samples.ids[s], np.mean(all_orders, axis=0)[:, None] / 10)
    live = found.stderr > 0
    assert found.mean.shape == (20, 1)
    assert (found.samples, found.evaluations, found.passes) == (4000, 8 * 4000, 400)
    # 20 rows by two to a few hundred degrees of freedom each
    assert np.abs((found.mean - truth)[live] / found.stderr[live]).max() < 5
    np.testing.assert_allclose(found.mean[~live], truth[~live], atol=1e-7)


@pytest.mark.parametrize("players", ["entry", "field"])
def test_errors_of_the_orders_are_those_of_the_definition(players):
    samples = data(40, 4, 8, 3)
    cost = 2 * 4 * (3 if players == "entry" else 1)
    run = EntryRun(cost * 40 * 6, seed=8, players=players, se="permutation")
    found = entry_shapley(FM, samples, run)
    visits = np.stack(
        [ops.fm_marginals(samples, EntryDraw(8, visit=v, players=players)) for v in range(6)]
    ).astype(float)
    shares = (visits[0::2] - visits[1::2]).reshape(3, 40, 4, -1)
    squares = np.zeros(found.mean.shape)
    for one in shares:
        np.add.at(squares, samples.ids, one**2)
    np.testing.assert_allclose(found.stderr, np.sqrt(squares) / 240, rtol=0, atol=1e-7)  # 2^-40 a square
    plain = entry_shapley(FM, samples, dataclasses.replace(run, se="population"))
    assert np.array_equal(found.mean, plain.mean)  # the draws are the same
    assert (found.samples, found.evaluations, found.passes) == (
        plain.samples,
        plain.evaluations,
        plain.passes,
    )
    assert found.stderr.sum() < 0.5 * plain.stderr.sum()  # samples differ more than orders of one


def test_errors_of_the_orders_are_how_runs_differ():
    samples = data(60, 4, 3, 2, scale=1.0)
    runs = [
        entry_shapley(FM, samples, EntryRun(9 * 60 * 4, seed, antithetic=False, se="permutation"))
        for seed in range(200)
    ]
    spread = np.std([run.mean for run in runs], axis=0, ddof=1)
    reported = np.sqrt(np.mean([run.stderr**2 for run in runs], axis=0))
    # a standard deviation from 200 runs is known to 1/sqrt(400) = 5 %, 24 of them
    assert np.abs(spread / reported - 1).max() < 0.2
    assert abs((spread / reported).mean() - 1) < 0.05


@pytest.mark.parametrize("walker", [FM, DeepModel(head("deepfm", 20))])
@pytest.mark.parametrize("players", ["entry", "field"])
def test_threads_batches_and_shards_change_no_bit(walker, players):
    samples = data(50)
    run = EntryRun(2 * 2 * 50 * (20 if players == "entry" else 5), seed=6, players=players, se="permutation")
    before, results = torch.get_num_threads(), []
    try:
        for threads, batch in [(1, 1 << 16), (2, 1 << 16), (2, 17), (1, 7)]:
            torch.set_num_threads(threads)
            results.append(entry_shapley(walker, samples, dataclasses.replace(run, batch_size=batch)))
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], one) for one in results[1:])
    merged = run.totals(samples)
    for visit in range(results[0].samples // 100):
        for rows in ((40, 50), (0, 13), (13, 40)):
            merged.merge(score_shard(walker, samples, run.draw(0, visit), rows))
    assert np.array_equal(merged.mean(results[0].samples), results[0].mean)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("twice", [False, True])
def test_large_marginals_do_not_overflow(isa, twice):
    """The largest that are taken, all of one row: a tile's squares are beyond 2^63 units together."""
    samples = data(400, 3, 1, 4, scale=0.1)
    base, offset = np.zeros((3, 4), np.float32), np.full(400, -500.0 if twice else -1000.0, np.float32)
    table = np.zeros_like(samples.table)
    table[:2, 0] = np.sqrt(-offset[0]) * 1.4
    samples = dataclasses.replace(samples, table=table, base=base, offset=offset, labels=np.ones_like(offset))
    draw = EntryDraw(3, antithetic=False, twice=twice)
    marginals = [ops.fm_marginals(samples, dataclasses.replace(draw, visit=v)) for v in range(1 + twice)]
    assert (400 if twice else 900) < np.abs(marginals).max() < (512 if twice else 1024)
    spread = (marginals[0] - marginals[-1] if twice else marginals[0]).astype(float)
    totals = EntryTotals(3, 4)
    with backend.force_isa(isa):
        ops.fm_shapley(samples, draw, totals)
    exact = (spread.reshape(400, 3, 4) ** 2).sum(0)
    assert exact.max() * 2.0**40 > 2.0**63
    np.testing.assert_allclose(totals.mean_square(1), exact, rtol=1e-6)
    with pytest.raises(ValueError, match="must be finite and below " + ("512" if twice else "1024")):
        ops.fm_shapley(dataclasses.replace(samples, offset=1.2 * offset), draw, totals)


def test_bad_input_is_named():
    samples = data(20)
    with pytest.raises(ValueError, match="players is 'entry' or 'field', got 'row'"):
        EntryRun(100, players="row")
    with pytest.raises(ValueError, match="players is 'entry' or 'field', got 'row'"):
        EntryDraw(1, players="row")
    with pytest.raises(ValueError, match="se is 'population' or 'permutation', got 'both'"):
        EntryRun(100, se="both")
    with pytest.raises(
        ValueError, match=r"totals of shape \(150, 4\) for a table \(150, 4\) and players 'fi"
    ):
        ops.fm_shapley(samples, EntryDraw(0, players="field"), EntryTotals(150, 4))
    with pytest.raises(ValueError, match="takes 1600 evaluations, the budget is 1599"):
        entry_shapley(FM, samples, EntryRun(1599, se="permutation"))
    with pytest.raises(ValueError, match=f"visit {1 << 23} is beyond"):
        ops.fm_shapley(samples, EntryDraw(0, visit=(1 << 23) - 1, twice=True), EntryTotals(150, 4))
    with pytest.raises(ValueError, match="no permutation of 5 players"):
        ops.fm_marginals(samples, EntryDraw(0, players="field"), np.zeros((20, 5), np.int32))


def test_a_state_belongs_to_its_players(tmp_path):
    samples, path = data(30), tmp_path / "state"
    entry_shapley(FM, samples, EntryRun(10 * 30 * 4, players="field", se="permutation", state=path))
    again = EntryRun(10 * 30 * 8, players="field", se="permutation", state=path)
    assert same(
        entry_shapley(FM, samples, again),
        entry_shapley(FM, samples, dataclasses.replace(again, state=None)),
    )
    with pytest.raises(ValueError, match="players was 'field', is 'entry'"):
        entry_shapley(FM, samples, EntryRun(4 * 30 * 40, se="permutation", state=path))
    with pytest.raises(ValueError, match="se was 'permutation', is 'population'"):
        entry_shapley(FM, samples, EntryRun(4 * 30 * 40, players="field", state=path))
