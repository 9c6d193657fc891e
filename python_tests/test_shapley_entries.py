"""Walks over embedding entries: vectors, enumeration, oracles in NumPy, exact totals, threads, states, bad input."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from shapley_games import CODEBOOK, FM_LOGIT_PHI, FM_PHI, LINEAR, E, loss

from pysparse import backend, ops
from pysparse.ops import Crosses, DeepHead, EntryDraw, EntrySamples, EntryTotals, Mlp
from pysparse.shapley import (
    DeepModel,
    EntryRun,
    Exact,
    FactorisationMachine,
    FunctionGame,
    entry_shapley,
    score_shard,
)

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
LEVELS = [key.isa for key in backend.kernels(op="shapley", format="fm", supported_only=True)]
FM = FactorisationMachine()


def toy(label=1.0, repeat=1):
    """The three fields of the test vector, one row each."""
    f32 = np.float32
    ids = np.tile(np.arange(3, dtype=np.int32), (repeat, 1))
    return EntrySamples(
        E.astype(f32), CODEBOOK.astype(f32), ids, np.full(repeat, label, f32), np.full(repeat, LINEAR, f32)
    )


def data(samples=200, fields=5, values=30, cols=4, seed=0, scale=0.5):
    rng = np.random.default_rng(seed)
    table = (scale * rng.normal(size=(fields * values, cols))).astype(np.float32)
    base = (0.3 * scale * rng.normal(size=(fields, cols))).astype(np.float32)
    ids = rng.zipf(1.3, size=(samples, fields)) % values + np.arange(fields) * values
    labels = rng.integers(0, 2, samples).astype(np.float32)
    offset = rng.normal(size=samples).astype(np.float32)
    return EntrySamples(table, base, ids.astype(np.int32), labels, offset)


def head(kind, inputs, seed=0, widths=(24, 40, 16)):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    weights, biases, width = [], [], inputs
    for out in widths:
        weights.append(normal(out, width))
        biases.append(normal(out))
        width = out
    mlp = Mlp(tuple(weights), tuple(biases), normal(width), 0.2)
    if kind == "deepfm":
        return DeepHead(mlp, pairs=True)
    if kind.startswith("full"):
        x = Crosses("full", 0.3 * normal(3, inputs), normal(3, inputs, inputs))
    else:
        u, v = normal(3, 2, inputs, 7), normal(3, 2, inputs, 7)
        c, gates = normal(3, 2, 7, 7), normal(2, inputs)
        x = Crosses("mixture", 0.3 * normal(3, inputs), u=u, c=c, v=v, gates=gates)
    if kind.endswith("parallel"):
        x = dataclasses.replace(x, out=normal(inputs))
    return DeepHead(Mlp((), (), normal(inputs)) if kind == "full-only" else mlp, crosses=x)


KINDS = ["deepfm", "full", "full-parallel", "full-only", "mixture", "mixture-parallel"]


def logits(head, e):
    """In float64 by the formulas; e is [B, fields, cols]."""
    x0 = e.reshape(len(e), -1)
    x, t = x0, np.zeros(len(e))
    if head.pairs:
        t = t + 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)).sum(1)
    c = head.crosses
    for layer in range(0 if c is None else len(c.bias)):
        if c.kind == "full":
            x = x + x0 * (x @ c.weight[layer].T.astype(float) + c.bias[layer])
            continue
        step = np.zeros_like(x)
        for i in range(len(c.gates)):
            low = np.tanh(np.tanh(x @ c.v[layer, i].astype(float)) @ c.c[layer, i].T)
            step += (x @ c.gates[i].astype(float))[:, None] * x0 * (low @ c.u[layer, i].T + c.bias[layer])
        x = x + step
    h = x if c is not None and c.out is None else x0
    if c is not None and c.out is not None:
        t = t + x @ c.out
    if head.mlp is not None:
        for weight, bias in zip(head.mlp.weights, head.mlp.biases, strict=True):
            h = np.maximum(0, h @ weight.T.astype(float) + bias)
        t = t + h @ head.mlp.final + head.mlp.final_bias
    return t


def walked(samples, order, logit_of, sample=0):
    """Loss increases by player, removing in order, from the definition."""
    keep = np.ones((len(order) + 1, len(order)), bool)
    for step, player in enumerate(order):
        keep[step + 1 :, player] = False
    e = np.where(keep, samples.table[samples.ids[sample]].ravel().astype(float), samples.base.ravel())
    t = samples.offset[sample] + logit_of(e.reshape(-1, *samples.base.shape))
    result = np.empty(len(order))
    result[order] = np.diff(loss(t, samples.labels[sample]))
    return result


def fm_logit(e):
    return 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)).sum(1)


@pytest.mark.parametrize("isa", LEVELS)
def test_the_walk_of_the_test_vector(isa):
    order = np.array([[3, 0, 5, 1, 4, 2]], np.int32)
    with backend.force_isa(isa):
        found = ops.fm_marginals(toy(), EntryDraw(0, antithetic=False), order)[0]
    expected = (0.2699939897, 0.0855537447, 0.0837144913, -0.1339858686, -0.7066736565, -1.2352263725)
    assert found == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("label", [0, 1])
def test_all_orders_give_the_shapley_values(isa, label):
    orders = np.array(list(itertools.permutations(range(6))), np.int32)
    with backend.force_isa(isa):
        found = ops.fm_marginals(toy(label, len(orders)), EntryDraw(0, antithetic=False), orders)
        pairs = ops.fm_marginals(toy(label, len(orders)), EntryDraw(0), orders)
    assert found.astype(float).mean(0) == pytest.approx(FM_PHI[label], abs=2e-7)
    assert pairs.astype(float).mean(0) == pytest.approx(FM_PHI[label], abs=2e-7)


def test_the_closed_form_of_the_logit():
    middle = (E + CODEBOOK) / 2
    phi = (E - CODEBOOK) * (middle.sum(0) - middle)
    assert phi.ravel() == pytest.approx(FM_LOGIT_PHI, abs=1e-12)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(("fields", "cols"), [(1, 1), (3, 1), (5, 3), (2, 16), (39, 16), (4, 17), (3, 64)])
@pytest.mark.parametrize("antithetic", [False, True])
def test_marginals_are_those_of_the_definition(isa, fields, cols, antithetic):
    samples = data(6, fields, 7, cols, seed=cols, scale=0.3)
    draw = EntryDraw(9, first=123, visit=4, antithetic=antithetic)
    orders = ops.draw_permutations(9, 123, 6, fields * cols, visit=4)
    with backend.force_isa(isa):
        found = ops.fm_marginals(samples, draw)
        forced = ops.fm_marginals(samples, draw, orders)
    assert np.array_equal(found, forced)
    for s in range(6):
        expected = walked(samples, orders[s], fm_logit, s)
        if antithetic:
            expected = 0.5 * (expected + walked(samples, orders[s][::-1], fm_logit, s))
        assert np.abs(found[s] - expected).max() < 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", LEVELS)
def test_deep_heads_are_those_of_the_definition(kind, isa):
    samples = data(3, 7, 9, 10, seed=2)  # 70 players: more than a block of coalitions
    model = head(kind, 70)
    draw = EntryDraw(1, first=5)
    orders = ops.draw_permutations(1, 5, 3, 70)
    with backend.force_isa(isa):
        found = ops.head_marginals(samples, draw, model)
    for s in range(3):
        both = [walked(samples, o, lambda e: logits(model, e), s) for o in (orders[s], orders[s][::-1])]
        assert np.abs(found[s] - 0.5 * (both[0] + both[1])).max() < 2e-5


def test_estimates_agree_with_enumeration():
    samples = data(12, 3, 4, 2, seed=3, scale=1.0)
    result = entry_shapley(FM, samples, EntryRun(2 * 6 * 12 * 600, seed=4))
    truth = np.zeros(samples.table.shape)
    for s in range(12):

        def value(keep, s=s):
            rows = samples.table[samples.ids[s]].astype(float)
            e = np.where(keep.reshape(-1, 3, 2), rows, samples.base)
            return -loss(samples.offset[s] + fm_logit(e), samples.labels[s])

        phi = Exact().estimate(FunctionGame(value, 6), 64).mean.reshape(3, 2)
        np.add.at(truth, samples.ids[s], phi / 12)
    live = result.stderr > 0
    assert np.abs((result.mean - truth)[live] / result.stderr[live]).max() < 4.5
    unseen = np.setdiff1d(np.arange(12), samples.ids)
    assert not result.mean[unseen].any()
    assert not result.stderr[unseen].any()


def test_the_error_falls_as_the_root_of_the_passes():
    samples, truth = toy(1.0, 16), np.array(FM_PHI[1])
    errors, passes = [], np.array([1, 4, 16, 64])
    for count in passes:
        runs = [
            entry_shapley(FM, samples, EntryRun(12 * 16 * int(count), seed)).mean.ravel()
            for seed in range(60)
        ]
        errors.append(np.sqrt(np.mean((np.array(runs) - truth) ** 2)))
    assert -0.6 < np.polyfit(np.log(passes), np.log(errors), 1)[0] < -0.4, errors


def test_efficiency_of_whole_passes():
    samples = data(100)
    result = entry_shapley(FM, samples, EntryRun(3 * 100 * 40))
    full = samples.table[samples.ids].astype(float)
    ends = [
        samples.offset + fm_logit(e) for e in (full, np.broadcast_to(samples.base.astype(float), full.shape))
    ]
    total = np.mean(loss(ends[1], samples.labels) - loss(ends[0], samples.labels))
    assert result.passes == 3
    assert abs(result.mean.sum() - total) < 1e-6


def test_an_entry_that_is_its_own_base_is_worth_nothing():
    samples = data(50)
    table = samples.table.copy()
    table[:30, 2] = samples.base[0, 2]
    result = entry_shapley(FM, dataclasses.replace(samples, table=table), EntryRun(50 * 40))
    assert not result.mean[:30, 2].any()
    assert result.mean[:30, 1].any()


def same(one, other):
    return np.array_equal(one.mean, other.mean) and np.array_equal(one.stderr, other.stderr)


@pytest.mark.parametrize("walker", [FM, DeepModel(head("deepfm", 20)), DeepModel(head("mixture", 20))])
def test_threads_batches_and_shards_change_no_bit(walker):
    samples = data(130)
    before, results = torch.get_num_threads(), []
    try:
        for threads, batch in [(1, 1 << 16), (2, 1 << 16), (1, 7), (2, 50), (2, 1)]:
            torch.set_num_threads(threads)
            results.append(entry_shapley(walker, samples, EntryRun(2 * 130 * 40, seed=6, batch_size=batch)))
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], one) for one in results[1:])
    assert not same(results[0], entry_shapley(walker, samples, EntryRun(2 * 130 * 40, seed=7)))
    shards = [
        score_shard(walker, samples, EntryDraw(6, visit=visit), rows)
        for visit in (1, 0)
        for rows in ((90, 130), (0, 33), (33, 90))
    ]
    merged = shards.pop()
    for shard in shards:
        merged.merge(shard)
    assert np.array_equal(merged.mean(260), results[0].mean)


def test_the_order_of_the_samples_of_a_shard_is_no_matter_for_their_draws():
    samples = data(40)
    late = ops.fm_marginals(samples.part(25, 40), EntryDraw(3, first=25))
    assert np.array_equal(ops.fm_marginals(samples, EntryDraw(3))[25:], late)


def test_totals_stay_exact_beyond_the_lower_half():
    samples = toy(1.0, 64)
    plain, nearly_full = EntryTotals(3, 2), EntryTotals(3, 2)
    ops.fm_shapley(samples, EntryDraw(1), plain)
    nearly_full.sums[:] = (1 << 62) - 12345
    nearly_full.squares[:] = (1 << 62) - 777
    nearly_full.bound[:] = 2.0**62
    ops.fm_shapley(samples, EntryDraw(1), nearly_full)
    for low, high, start in (("sums", "sums_high", 12345), ("squares", "squares_high", 777)):
        found = getattr(nearly_full, high).astype(object) * 2**48 + getattr(nearly_full, low)
        assert (found - (2**62 - start) == getattr(plain, low)).all()
    assert nearly_full.sums_high.any()


@pytest.mark.parametrize("isa", LEVELS)
def test_kernels_of_the_totals_agree_bit_for_bit(isa):
    samples = data(60, cols=5)
    found = []
    for level in ("generic", isa):
        totals = EntryTotals(*samples.table.shape)
        marginals = ops.fm_marginals(samples, EntryDraw(2))
        with backend.force_isa(level):
            own = ops.fm_marginals(samples, EntryDraw(2))
            ops.fm_shapley(samples, EntryDraw(2), totals)
        rounded = np.zeros(samples.table.shape, np.int64)
        np.add.at(
            rounded, samples.ids, np.rint(own.astype(float) * 2.0**36).astype(np.int64).reshape(60, 5, 5)
        )
        assert np.array_equal(totals.sums, rounded)
        found.append(own)
        assert np.abs(own - marginals).max() < 1e-5
    assert np.abs(found[0] - found[1]).max() < 1e-5


def test_a_run_that_is_interrupted_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("pysparse.shapley.entries._SAVE_SECONDS", 0.0)
    samples, path = data(90), tmp_path / "entries.state"
    run = EntryRun(3 * 90 * 40, seed=1, batch_size=40, state=path)

    class Failing:
        calls = 0

        def __call__(self, *arguments):
            self.calls += 1
            if self.calls == 5:
                raise KeyboardInterrupt
            FM(*arguments)

        def fingerprint(self):
            return FM.fingerprint()

    with pytest.raises(KeyboardInterrupt):
        entry_shapley(Failing(), samples, run)
    whole = entry_shapley(FM, samples, dataclasses.replace(run, state=None))
    assert same(entry_shapley(FM, samples, run), whole)
    assert same(entry_shapley(FM, samples, run), whole)  # nothing is counted twice
    good = path.read_bytes()
    for damaged in (good[: len(good) // 2], good[:-1] + bytes([good[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            entry_shapley(FM, samples, run)
    path.write_bytes(good)
    with pytest.raises(ValueError, match="samples was"):
        entry_shapley(FM, data(90, seed=8), run)


def test_stops_after_a_pass_with_a_small_error():
    samples = data(400)
    result = entry_shapley(FM, samples, EntryRun(1000 * 400 * 40, stop=0.2))
    assert result.ratio < 0.2
    assert result.passes < 1000
    assert result.samples == 400 * result.passes


def test_bad_input_is_named():
    samples = data(20)
    totals, draw = EntryTotals(*samples.table.shape), EntryDraw(0)
    ids = samples.ids.copy()
    ids[3, 2] = 150
    with pytest.raises(ValueError, match=r"id 150 of sample 3, field 2 is not in \[0, 150\)"):
        ops.fm_shapley(dataclasses.replace(samples, ids=ids), draw, totals)
    ids[3, 2] = -1
    with pytest.raises(ValueError, match="id -1 of sample 3"):
        ops.fm_shapley(dataclasses.replace(samples, ids=ids), draw, totals)
    labels = samples.labels.copy()
    labels[7] = 2.0
    with pytest.raises(ValueError, match=r"label 2 of sample 7 is not in \[0, 1\]"):
        ops.fm_shapley(dataclasses.replace(samples, labels=labels), draw, totals)
    labels[7] = np.nan
    with pytest.raises(ValueError, match="label nan of sample 7"):
        ops.fm_shapley(dataclasses.replace(samples, labels=labels), draw, totals)
    assert not totals.sums.any(), "nothing was added"
    with pytest.raises(ValueError, match="not contiguous"):
        dataclasses.replace(samples, ids=samples.ids[:, ::-1])
    with pytest.raises(ValueError, match="ids is contiguous int32"):
        dataclasses.replace(samples, ids=samples.ids.astype(np.int64))
    table = samples.table.copy()
    table[4, 1] = np.inf
    with pytest.raises(ValueError, match="1 entries of table are not finite"):
        dataclasses.replace(samples, table=table)
    with pytest.raises(ValueError, match="20 samples of 20 players takes 800 evaluations, the budget is 799"):
        entry_shapley(FM, samples, EntryRun(799))
    with pytest.raises(ValueError, match="budget and batch_size are at least 1, got 0"):
        EntryRun(0)
    with pytest.raises(ValueError, match="there are no samples"):
        entry_shapley(FM, samples.part(0, 0), EntryRun(10))
    with pytest.raises(ValueError, match="must be finite and below 1024"):
        ops.fm_shapley(dataclasses.replace(samples, table=samples.table * 1000), draw, totals)
    with pytest.raises(ValueError, match="no permutation of 20 players"):
        ops.fm_marginals(samples, draw, np.zeros((20, 20), np.int32))
    with pytest.raises(ValueError, match=r"weight 0 is contiguous float32 \[24, 20\]"):
        ops.head_marginals(samples, draw, head("deepfm", 21))
    with pytest.raises(ValueError, match="totals of shape"):
        ops.fm_shapley(samples, draw, EntryTotals(3, 2))
