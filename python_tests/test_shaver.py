"""Shaver: the specification's vectors, planted truth, nested masks, models as the walks see them, tuning, bad input."""

import dataclasses

import numpy as np
import pytest
import torch
from shapley_games import CODEBOOK, FM_LOGIT_PHI, LINEAR, E
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from pysparse import backend
from pysparse.calib.clicks import Clicks, load_clicks
from pysparse.calib.clicks_synthetic import SyntheticClicks, SyntheticSpec, fm_logit, logit_shapley
from pysparse.measure.ranking import log_loss, roc_auc
from pysparse.methods.ctr_training import CtrTraining, logits_of, score_ctr, train_ctr
from pysparse.methods.shaver import (
    CodebookError,
    EntryMagnitude,
    EntryScores,
    EntryTaylor,
    RandomEntries,
    Shaver,
    entry_samples,
    field_codebook,
    prune_embedding,
    spread_over_entries,
    walker_of,
)
from pysparse.methods.shaver_bits import affine_values, load_affine, quantise_embedding, save_affine
from pysparse.methods.shaver_tuning import fine_tune
from pysparse.nn import SparseEmbedding
from pysparse.nn.ctr import CTR_KINDS, CtrConfig, CtrModel
from pysparse.ops import EntryDraw, fm_marginals, head_marginals

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
ROWS = Shaver(passes=2, players="field", se="permutation")
SCORERS = [Shaver(), ROWS, CodebookError(), EntryMagnitude(), EntryTaylor(), RandomEntries()]


def planted(samples=4000, **changes):
    """The generator's reference set, and the true machine as the model."""
    truth = SyntheticClicks(SyntheticSpec(**changes))
    clicks = truth.draw(samples)
    model = CtrModel(CtrConfig("fm", truth.field_sizes, truth.spec.dims)).eval()
    with torch.no_grad():
        model.table.copy_(torch.from_numpy(truth.table))
        model.bias.fill_(truth.offset)
    return truth, clicks, model


def small(kind, fields=4, values=9, dims=3, samples=120, **changes):
    """A model that has seen a batch, so that its batch normalisation has statistics."""
    rng = np.random.default_rng(5)
    ids = rng.integers(0, values, (samples, fields)) + np.arange(fields) * values
    clicks = Clicks(ids.astype(np.int32), (rng.random(samples) < 0.4).astype(np.float32), (values,) * fields)
    torch.manual_seed(3)
    model = CtrModel(CtrConfig(kind, clicks.field_sizes, dims, (12, 8), rank=5, experts=2, **changes))
    with torch.no_grad():
        model.table.normal_(std=0.5)
        if model.first is not None:
            model.first.weight.normal_(std=0.3)
        model.train()(torch.from_numpy(clicks.ids))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return clicks, model.eval()


# --- vectors ---------------------------------------------------------------------------------------------


def test_codebook_vector():
    table = np.array([[(2 * row + col) / 10 for col in range(2)] for row in range(8)])
    found = field_codebook(table, (2, 4, 2), np.array([5, 4, 5, 2, 1, 1, 8, 1]))
    expected = [[0.0888889, 0.1888889], [0.5555556, 0.6555556], [1.2222222, 1.3222222]]
    np.testing.assert_allclose(found, expected, atol=5e-8)


def test_the_logit_game_of_the_vector():
    ids = np.arange(3, dtype=np.int32)[None]
    assert fm_logit(E.astype(np.float32), ids)[0] + LINEAR == pytest.approx(-2.2, abs=1e-6)
    phi = logit_shapley(E.astype(np.float32), CODEBOOK, ids)
    np.testing.assert_allclose(phi.ravel(), np.asarray(FM_LOGIT_PHI).ravel(), atol=1e-6)


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=500).round(1).astype(np.float32)  # rounded: ties
    labels = rng.integers(0, 2, 500).astype(np.float32)
    assert roc_auc(logits, labels) == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    chances = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert log_loss(logits, labels) == pytest.approx(sklearn_log_loss(labels, chances), rel=1e-9)
    assert log_loss(np.array([800.0, -800.0]), np.array([0.0, 1.0])) == 800.0
    with pytest.raises(ValueError, match="AUC needs both labels, got 0 clicks and 3 others"):
        roc_auc(np.zeros(3), np.zeros(3))


# --- the game --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CTR_KINDS)
def test_the_walks_see_the_torch_model(kind):
    """Each walk's marginals, summed, are the loss without embeddings less the loss with them, sample by sample."""
    clicks, model = small(kind)
    samples = entry_samples(model, clicks)
    draw, head = EntryDraw(1), model.head()
    found = fm_marginals(samples, draw) if head is None else head_marginals(samples, draw, head)
    bare = prune_embedding(
        model, EntryScores(np.zeros(model.table.shape), samples.base, clicks.field_sizes), 1.0
    )
    losses = [
        torch.nn.functional.binary_cross_entropy_with_logits(
            torch.from_numpy(logits_of(one, clicks)), torch.from_numpy(clicks.labels), reduction="none"
        )
        for one in (bare, model)
    ]
    np.testing.assert_allclose(found.sum(1), (losses[0] - losses[1]).numpy(), atol=2e-5)
    assert walker_of(model).fingerprint() != walker_of(small("deepfm", dims=2)[1]).fingerprint()


@pytest.mark.parametrize("target", ["label", "model"])
def test_values_share_out_what_the_table_is_worth(target):
    _, clicks, model = planted(500)
    values = Shaver(target=target)(model, clicks).shapley
    labels = entry_samples(model, clicks, target=target).labels
    bare = prune_embedding(model, EntryMagnitude("codebook")(model, clicks), 1.0)
    gain = log_loss(logits_of(bare, clicks), labels) - log_loss(logits_of(model, clicks), labels)
    assert values.mean.sum() == pytest.approx(gain, abs=2e-6)  # float32 losses of 500 samples
    if target == "model":
        assert gain > 0  # an expected divergence


def test_planted_truth():
    truth, clicks, model = planted(20_000)
    found = Shaver(base="codebook")(model, clicks)
    per_field = found.shapley.mean.reshape(8, -1).sum(1)
    assert per_field[:3].min() > 10 * np.abs(per_field[-2:]).max()  # amplitudes 1, 0.8, 0.6 beside 0, 0
    assert np.abs(per_field[-2:]).max() < 5e-4
    exact = logit_shapley(truth.table, found.base.astype(np.float64), clicks.ids)
    unseen = clicks.counts() == 0
    assert (found.shapley.mean[unseen] == 0).all()
    assert (found.shapley.stderr[unseen] == 0).all()
    assert np.abs(exact.reshape(8, -1)).sum(1)[-2:].max() < 0.05 * np.abs(exact).sum()


def test_rows_share_their_value_out():
    _, clicks, model = planted(2000)
    with torch.no_grad():
        model.table[60] = torch.from_numpy(entry_samples(model, clicks).base[1])  # row 10 of field 1
    found = ROWS(model, clicks)
    rows, base = found.shapley.mean, np.repeat(found.base, clicks.field_sizes, axis=0)
    assert rows.shape == (400, 1)
    assert found.shapley.evaluations == ROWS.evaluations(clicks, 4) == 2 * 2 * 8 * 2000
    np.testing.assert_allclose(found.scores.sum(1), np.abs(rows[:, 0]), rtol=1e-12)
    distance = np.abs(model.table.detach().numpy().astype(float) - base)
    live = (found.scores > 0).all(1)
    shares = found.scores[live] / found.scores[live].sum(1, keepdims=True)
    np.testing.assert_allclose(shares, distance[live] / distance[live].sum(1, keepdims=True), rtol=1e-9)
    per_field = [one.shapley.mean.reshape(8, -1).sum(1) for one in (found, Shaver()(model, clicks))]
    np.testing.assert_allclose(
        *per_field, atol=0.1 * np.abs(per_field[0]).max()
    )  # of two games: near, not equal


def test_a_row_that_is_its_base_is_worth_nothing():
    values = spread_over_entries(np.array([[0.0], [3.0]]), np.array([[0.0, 0.0], [-1.0, 2.0]]))
    assert np.array_equal(values, [[0.0, 0.0], [1.0, 2.0]])


def test_copies_of_a_field_are_worth_the_same():
    _, clicks, model = planted(6000, copy_of=0)
    values = Shaver(passes=2)(model, clicks).shapley
    first, copy = (values.mean.reshape(9, 50, 4)[place] for place in (0, 8))
    error = np.hypot(*(values.stderr.reshape(9, 50, 4)[place] for place in (0, 8)))
    seen = error > 0
    assert seen.any()
    assert (np.abs(first - copy)[seen] < 4 * error[seen]).all()
    assert np.corrcoef(first.ravel(), copy.ravel())[0, 1] > 0.95


# --- masks and tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda one: type(one).__name__)
def test_masks_are_nested_and_exact(scorer):
    _, clicks, model = planted(800)
    scores = scorer(model, clicks)
    assert np.array_equal(scores.scores, scorer(model, clicks).scores)
    last = None
    for sparsity in (0.0, 0.333, 0.5, 0.95, 1.0):
        keep = scores.keep(sparsity)
        assert int((~keep).sum()) == int(keep.numel() * sparsity)
        assert last is None or not (keep & ~last).any()
        last = keep


@pytest.mark.parametrize("kind", CTR_KINDS)
def test_ends_of_the_budget(kind):
    clicks, model = small(kind)
    scores = Shaver()(model, clicks)
    before = logits_of(model, clicks)
    assert np.array_equal(logits_of(prune_embedding(model, scores, 0.0), clicks), before)
    bare = prune_embedding(model, scores, 1.0)
    rows = bare.embedding(torch.from_numpy(clicks.ids))
    assert torch.equal(rows, torch.from_numpy(scores.base).expand_as(rows))
    assert isinstance(bare.embedding, SparseEmbedding)
    assert np.array_equal(logits_of(model, clicks), before)  # the model is not changed


def test_the_weighted_mean_of_a_field_stays():
    _, clicks, model = planted(3000)
    scores = CodebookError()(model, clicks)
    bare = prune_embedding(model, scores, 1.0)
    ids = torch.from_numpy(clicks.ids)
    means = [one.embedding(ids).double().mean(0).detach() for one in (model, bare)]
    torch.testing.assert_close(means[0], means[1], atol=1e-6, rtol=0)


def test_scores_beat_chance_and_zeros():
    _, clicks, model = planted(12_000)
    train, test = clicks.split(0.5)
    losses = {
        name: score_ctr(prune_embedding(model, scorer(model, train), 0.8), test).log_loss
        for name, scorer in (
            ("shaver", Shaver()),
            ("zero", Shaver(base="zero")),
            ("rows", ROWS),
            ("error", CodebookError()),
            ("taylor", EntryTaylor()),
            ("random", RandomEntries()),
        )
    }
    assert (
        max(losses[name] for name in ("shaver", "zero", "rows", "error", "taylor")) < losses["random"] - 0.02
    )


# --- training, tuning, bits ------------------------------------------------------------------------------


def test_training_then_tuning_under_the_mask():
    clicks = load_clicks("digits").take(slice(None, None, 2))
    train, valid = clicks.split(0.7)
    torch.manual_seed(0)
    model = CtrModel(CtrConfig("deepfm", clicks.field_sizes, 2, (16,)))
    training = CtrTraining(epochs=6, batch_size=64, learning_rate=1e-2, patience=2)
    score = train_ctr(model, train, valid, training)
    assert score.auc > 0.85
    assert score_ctr(model, valid) == score  # the best epoch was kept
    scores = Shaver()(model, train)
    pruned = prune_embedding(model, scores, 0.95)
    tuned, tuned_score = fine_tune(
        model, scores, 0.95, train, valid, CtrTraining(epochs=3, batch_size=256, learning_rate=1e-3)
    )
    keep = scores.keep(0.95)
    rows, base = tuned.embedding.table.to_dense(), np.repeat(scores.base, clicks.field_sizes, axis=0)
    assert torch.equal(tuned.embedding.table.keep_mask(), keep)
    assert torch.equal(rows[~keep], torch.from_numpy(base)[~keep])  # the codebook is frozen
    assert tuned_score.auc >= score_ctr(pruned, valid).auc - 1e-6


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_bits(bits, tmp_path):
    values = np.random.default_rng(0).normal(size=1001).astype(np.float32)
    codes = affine_values(values, bits)
    assert np.abs(codes.values() - values).max() <= codes.scale * 1.001
    assert codes.nbytes <= 1001 * bits / 8 + 17
    assert len(np.unique(codes.values())) <= 2**bits
    for edge in (
        values[:0],
        np.full(3, 2.5, np.float32),
        np.full(3, -2.5, np.float32),
        np.zeros(3, np.float32),
    ):
        np.testing.assert_array_equal(affine_values(edge, bits).values(), edge)
    clicks, model = small("fm")
    pruned = prune_embedding(model, Shaver()(model, clicks), 0.5)
    rounded, kept = quantise_embedding(pruned, bits)
    change = (rounded.embedding.table.to_dense() - pruned.embedding.table.to_dense()).abs()
    assert float(change.max()) <= kept.scale * 1.001
    assert not change[~pruned.embedding.table.keep_mask()].any()
    path = tmp_path / "table.safetensors"
    save_affine(path, pruned.embedding, bits)
    ids = torch.from_numpy(clicks.ids)
    assert torch.equal(load_affine(path)(ids), rounded.embedding(ids))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        load_affine(path)
    pruned.embedding.save(path)
    with pytest.raises(
        ValueError, match="is not a pysparse-embedding-affine-1 file: format 'pysparse-embedding-1'"
    ):
        load_affine(path)


# --- bad input -------------------------------------------------------------------------------------------


def test_bad_input():
    clicks, model = small("fm")
    ids = clicks.ids.copy()
    ids[7, 1] = 3
    with pytest.raises(ValueError, match="sample 7 has id 3 in field 1, whose rows are 9 to 17"):
        dataclasses.replace(clicks, ids=ids)
    with pytest.raises(ValueError, match="labels are 0 or 1, sample 0 has 0.5"):
        dataclasses.replace(clicks, labels=np.full(len(clicks.ids), 0.5, np.float32))
    with pytest.raises(ValueError, match="field 1 .rows 2 to 3. does not occur"):
        field_codebook(np.ones((4, 2)), (2, 2), np.array([1, 1, 0, 0]))
    with pytest.raises(ValueError, match="there are no samples"):
        Shaver()(model, clicks.take(slice(0, 0)))
    with pytest.raises(ValueError, match="passes is at least 1, got 0"):
        Shaver(passes=0)
    with pytest.raises(ValueError, match="se='permutation' needs an even number of passes, got 3"):
        Shaver(passes=3, se="permutation")
    with pytest.raises(ValueError, match="players is 'entry' or 'field', got 'rows'"):
        Shaver(players="rows")
    with pytest.raises(ValueError, match="sparsity is in .0, 1., got 1.5"):
        Shaver()(model, clicks).keep(1.5)
    other = CtrModel(CtrConfig("fm", (10, 9, 9, 9), 3))
    with pytest.raises(ValueError, match="the model .10"):
        Shaver()(other, clicks)
    with torch.no_grad():
        model.table[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Shaver()(model, clicks)
    with pytest.raises(ValueError, match="kind is one of fm, deepfm, dcn-v2, dcn-mix, got 'mlp'"):
        CtrConfig("mlp", (3,))
    with pytest.raises(ValueError, match="bits is one of"):
        affine_values(np.ones(2, np.float32), 3)
    with pytest.raises(TypeError, match="only a packed table"):
        quantise_embedding(model, 8)


def test_a_run_goes_on_and_a_cut_state_is_refused(tmp_path):
    _, clicks, model = planted(300)
    whole = Shaver(passes=3)(model, clicks).shapley
    path = tmp_path / "state"
    Shaver(state=path)(model, clicks)
    resumed = Shaver(passes=3, state=path)(model, clicks).shapley
    assert np.array_equal(whole.mean, resumed.mean)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        Shaver(passes=3, state=path)(model, clicks)
