"""Games, estimators and their promises: known values, axioms, budgets, seeds, batches, states, bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapley_games import (
    FM_LOGIT_PHI,
    FM_PHI,
    FM_PHI_ZERO_BASE,
    FmGame,
    Table,
    airport,
    enumerated,
    glove,
    majority,
    random_table,
    table_of,
)

from pysparse import backend, ops
from pysparse.shapley import (
    Banzhaf,
    Exact,
    FunctionGame,
    KernelSHAP,
    Options,
    Owen,
    Permutation,
    PositionStratified,
    Quadratic,
    TopK,
    Truncated,
    fit_quadratic,
)
from pysparse.shapley.estimators import pair_chance

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
UNIT_ESTIMATORS = [
    Permutation(),
    Permutation(antithetic=False),
    PositionStratified(),
    Owen(),
    Banzhaf(),
    KernelSHAP(),
]
SHARING = [Permutation(), Permutation(antithetic=False), PositionStratified(), KernelSHAP()]


def exact(game, index="shapley"):
    return Exact(index).estimate(game, 1 << game.n_players).mean


def test_known_games():
    assert exact(glove()) == pytest.approx([0.65, 0.65, 7 / 30, 7 / 30, 7 / 30], abs=1e-12)
    assert exact(airport()) == pytest.approx([0.25, 7 / 12, 13 / 12, 37 / 12], abs=1e-12)
    assert exact(majority()) == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=1e-12)
    assert exact(table_of(5, lambda s: len(s) ** 2)) == pytest.approx([5.0] * 5, abs=1e-12)
    weights = np.array([3.0, -1.0, 0.0, 2.5])
    assert exact(table_of(4, lambda s: sum(weights[i] for i in s))) == pytest.approx(weights, abs=1e-12)


@pytest.mark.parametrize("label", [0, 1])
def test_factorisation_machine_vectors(label):
    assert exact(FmGame(label=label)) == pytest.approx(FM_PHI[label], abs=1e-10)


def test_factorisation_machine_with_zero_base_and_of_the_logit():
    assert exact(FmGame(base=np.zeros((3, 2)), label=1)) == pytest.approx(FM_PHI_ZERO_BASE, abs=1e-10)
    assert exact(FmGame()) == pytest.approx(FM_LOGIT_PHI, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_one_antithetic_pair_is_exact_for_interactions_of_order_two(seed):
    pair = Permutation().estimate(FmGame(), budget=12, seed=seed)
    assert (pair.samples, pair.evaluations) == (1, 12)
    assert pair.mean == pytest.approx(FM_LOGIT_PHI, abs=1e-12)


def test_the_regression_over_all_proper_coalitions_is_the_shapley_value():
    game = FmGame(label=1)
    n = game.n_players
    codes = np.arange(1, (1 << n) - 1)
    z = (codes[:, None] >> np.arange(n) & 1).astype(bool)
    size = z.sum(1)
    weight = np.array([1.0 / (s * (n - s)) / math.comb(n, s) for s in size])
    weight /= weight.sum()
    values = np.stack([game(z), game(~z)], axis=1)
    ends = game(np.array([[False] * n, [True] * n]))
    samples = KernelSHAP().samples(z, values, *ends)
    assert weight @ samples == pytest.approx(FM_PHI[1], abs=1e-10)


@pytest.mark.parametrize(("n", "chance"), [(3, 1 / 6), (4, 5 / 22), (6, 0.2810219), (10, 0.3232571)])
def test_the_exact_matrix_of_kernel_shap(n, chance):
    assert pair_chance(n) == pytest.approx(chance, abs=5e-8)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_exact_is_the_definition(n):
    game = random_table(n, n)
    assert exact(game) == pytest.approx(enumerated(game), abs=1e-12)


@pytest.mark.parametrize("n", [8, 12])
@pytest.mark.parametrize("estimator", UNIT_ESTIMATORS, ids=str)
def test_estimates_lie_within_their_errors(estimator, n):
    game = random_table(n, 40 + n)
    result = estimator.estimate(game, budget=30_000, seed=7)
    z = (result.mean - exact(game, estimator.index)) / result.stderr
    assert np.abs(z).max() < 4.5
    assert 0.3 < np.sqrt((z**2).mean()) < 1.8


@pytest.mark.parametrize("estimator", [Permutation(), Owen(), KernelSHAP()], ids=str)
def test_the_error_falls_as_the_root_of_the_budget(estimator):
    game = FmGame(label=1)
    cost = estimator.cost(6)
    units = 4 ** np.arange(0, 5) * 4
    errors = []
    for count in units:
        runs = [estimator.estimate(game, 2 + cost * int(count), seed=s).mean for s in range(60)]
        errors.append(np.sqrt(np.mean((np.array(runs) - FM_PHI[1]) ** 2)))
    slope = np.polyfit(np.log(units), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4, errors


tables = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.floats(-8, 8), min_size=1 << n, max_size=1 << n).map(Table)
)


@given(tables, st.sampled_from(SHARING), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_efficiency_after_any_number_of_samples(game, estimator, seed):
    result = estimator.estimate(game, budget=2 + 3 * max(1, estimator.cost(game.n_players)), seed=seed)
    assert abs(result.residual) < 1e-9


@given(tables, st.floats(-3, 3), st.sampled_from([*UNIT_ESTIMATORS, Exact()]))
@settings(max_examples=40, deadline=None)
def test_linearity(game, factor, estimator):
    other = random_table(game.n_players, 3)
    both = Table(game.values + factor * other.values)
    budget = max(1 << game.n_players, 2 + 2 * estimator.cost(game.n_players)) if estimator != Exact() else 64
    first, second, total = (estimator.estimate(g, budget, seed=5).mean for g in (game, other, both))
    assert total == pytest.approx(first + factor * second, abs=1e-9)


@given(tables, st.integers(0, 5), st.sampled_from(UNIT_ESTIMATORS[:-1]))
@settings(max_examples=40, deadline=None)
def test_a_player_that_adds_nothing_gets_exactly_nothing(game, dummy, estimator):
    dummy %= game.n_players
    codes = np.arange(len(game.values)) & ~(1 << dummy)
    idle = Table(game.values[codes])
    result = estimator.estimate(idle, 2 + 3 * max(1, estimator.cost(game.n_players)), seed=1)
    assert result.mean[dummy] == 0.0
    assert result.stderr[dummy] == 0.0


def test_symmetric_players_get_the_same():
    game = table_of(6, lambda s: len(s & {0, 1}) ** 2 + 3.0 * (2 in s) * len(s))
    result = Permutation().estimate(game, 4000, seed=2)
    assert abs(result.mean[0] - result.mean[1]) < 4 * np.hypot(result.stderr[0], result.stderr[1]) + 1e-12
    assert exact(game)[0] == pytest.approx(exact(game)[1], abs=1e-12)


@pytest.mark.parametrize("estimator", [*UNIT_ESTIMATORS, Truncated(0.1)], ids=str)
def test_batches_and_threads_change_no_bit(estimator):
    game = random_table(7, 0)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for size in (1, 7, 64, 5000):
                options = Options(batch_size=size)
                results.append(estimator.estimate(game, 3000, 3, options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert np.array_equal(other.mean, results[0].mean)
        assert np.array_equal(other.stderr, results[0].stderr)
        assert other.evaluations == results[0].evaluations
    assert not np.array_equal(estimator.estimate(game, 3000, 4).mean, results[0].mean)


@pytest.mark.parametrize("estimator", [*UNIT_ESTIMATORS, Truncated(0.0), Truncated(0.3)], ids=str)
def test_no_more_evaluations_than_the_budget_and_all_are_counted(estimator):
    table, seen = random_table(6, 1), []

    def counted(coalitions):
        seen.append(len(coalitions))
        return table(coalitions)

    result = estimator.estimate(FunctionGame(counted, 6), 501, 0)
    assert sum(seen) == result.evaluations <= 501
    if isinstance(estimator, Permutation):
        assert result.evaluations == estimator.plan(6, 501)


def test_stops_when_the_error_is_small_enough():
    game = FmGame(label=1)
    result = Permutation().estimate(game, 100_000, 0, Options(stop=0.02))
    assert result.ratio < 0.02
    assert result.evaluations < 50_000
    same = Permutation().estimate(game, 100_000, 0, Options(stop=0.02, batch_size=3))
    assert np.array_equal(result.mean, same.mean)


def test_torch_and_numpy_functions_are_one_game():
    weights = np.array([1.0, -2.0, 0.5])
    game = FunctionGame(lambda z: (z @ weights) ** 2, 3)
    tensors = FunctionGame(
        lambda z: (z.double() @ torch.from_numpy(weights))[:, None] ** 2, 3, inputs="torch"
    )
    assert np.array_equal(exact(game), exact(tensors))


def test_single_player():
    game = Table([2.0, 5.0])
    for estimator in SHARING:
        assert estimator.estimate(game, 4, 0).mean == pytest.approx([3.0])
    assert Truncated(0.0).estimate(game, 4, 0).mean == pytest.approx([3.0])


def test_control_variate_keeps_the_mean_and_cuts_the_error():
    game = FmGame(label=1)
    control = fit_quadratic(game, 200, seed=9)
    plain = Permutation(antithetic=False).estimate(game, 2000, 1)
    controlled = Permutation(antithetic=False).estimate(game, 2000, 1, Options(control=control))
    assert controlled.stderr.mean() < 0.5 * plain.stderr.mean()
    assert np.abs((controlled.mean - FM_PHI[1]) / controlled.stderr).max() < 4.5
    assert abs(controlled.residual) < 1e-9


def test_a_quadratic_game_is_fitted_and_known_exactly():
    rng = np.random.default_rng(0)
    pairs = np.triu(rng.normal(size=(5, 5)), 1)
    truth = Quadratic(0.3, rng.normal(size=5), pairs + pairs.T)
    assert truth.values == pytest.approx(exact(truth), abs=1e-12)
    assert truth.values == pytest.approx(exact(truth, "banzhaf"), abs=1e-12)
    assert fit_quadratic(truth, 200, ridge=0.0).values == pytest.approx(truth.values, abs=1e-9)
    with pytest.raises(ValueError, match="16 coefficients of 5 players need 16"):
        fit_quadratic(truth, 15)


def test_the_layer_game_of_three_weights():
    weight, gram = np.array([1.0, -2.0, 0.5]), np.array([[2.0, 1, 0], [1, 3, -1], [0, -1, 1]])

    def value(coalitions):
        absent = np.where(coalitions, 0.0, weight)
        return -np.einsum("bi,ij,bj->b", absent, gram, absent)

    assert exact(FunctionGame(value, 3)) == pytest.approx([0, 11, 1.25], abs=1e-12)


def test_the_best_players_are_found_with_fewer_evaluations():
    strong = np.linspace(0, 3, 20)
    noise = np.random.default_rng(1).normal(size=(20, 20)) * 0.05

    def value(z):
        z = z.astype(float)
        return z @ strong + np.tanh((z @ noise * z).sum(1))

    game = FunctionGame(value, 20)
    found = TopK(4).find(game, 20_000, seed=0)
    assert set(found.players) == {16, 17, 18, 19}
    assert not len(found.undecided)
    assert found.values.evaluations < 5000
    assert found.counts.min() < found.counts.max() or found.counts.min() == 16
    again = TopK(4).find(game, 20_000, 0, Options(batch_size=5))
    assert np.array_equal(found.values.mean, again.values.mean)


def test_the_best_players_are_sampled_more_near_the_boundary():
    game = FunctionGame(lambda z: np.sin(z @ np.array([5.0, 1.0, 0.9, 0.1, 0.05, 0.0])), 6)
    found = TopK(2, round_size=8).find(game, 30_000, seed=0)
    assert found.counts[[1, 2]].min() >= found.counts[[4, 5]].max()


def test_truncation_saves_evaluations_and_its_bias_is_bounded():
    saturating = table_of(8, lambda s: min(len(s), 3))
    whole = Truncated(0.0).estimate(saturating, 3000, 0)
    short = Truncated(0.5).estimate(saturating, 3000, 0)
    assert short.samples > 1.5 * whole.samples
    assert abs(short.residual) <= 0.5
    assert np.abs((short.mean - exact(saturating)) / short.stderr).max() < 4.5


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("estimator", [Permutation(), KernelSHAP()], ids=str)
def test_an_interrupted_run_goes_on_and_counts_nothing_twice(estimator, tmp_path, monkeypatch):
    monkeypatch.setattr("pysparse.shapley.sampling._SAVE_SECONDS", 0.0)
    table, path, calls = random_table(6, 3), tmp_path / "run.state", [0]

    def failing(coalitions):
        calls[0] += 1
        if calls[0] == 9:
            raise Interrupted
        return table(coalitions)

    options = Options(batch_size=11, state=path)
    with pytest.raises(Interrupted):
        estimator.estimate(FunctionGame(failing, 6), 900, 2, options)
    resumed = estimator.estimate(table, 900, 2, options)
    whole = estimator.estimate(table, 900, 2)
    assert np.array_equal(resumed.mean, whole.mean)
    assert np.array_equal(resumed.stderr, whole.stderr)
    assert (resumed.samples, resumed.evaluations) == (whole.samples, whole.evaluations)
    again = estimator.estimate(table, 900, 2, options)  # nothing left to do
    assert np.array_equal(again.mean, whole.mean)
    longer = estimator.estimate(table, 1500, 2, options)
    assert np.array_equal(longer.mean, estimator.estimate(table, 1500, 2).mean)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("how", [Exact(), Truncated(0.3), TopK(3)], ids=str)
def test_estimators_without_units_go_on_too(how, tmp_path, monkeypatch):
    monkeypatch.setattr("pysparse.shapley.state.SAVE_SECONDS", 0.0)
    table, path, seen = random_table(8, 3), tmp_path / "run.state", []

    def failing(coalitions):
        seen.append(len(coalitions))
        if len(seen) == 20:
            raise Interrupted
        return table(coalitions)

    def run(game, budget, options):
        if isinstance(how, TopK):
            return how.find(game, budget, 2, options).values
        return how.estimate(game, budget, 2, options)

    options = Options(batch_size=13, state=path)
    with pytest.raises(Interrupted):
        run(FunctionGame(failing, 8), 1400, options)
    before = sum(seen[:-1])
    seen[:] = [0] * 20  # from here on it counts alone
    resumed, whole = run(FunctionGame(failing, 8), 1400, options), run(table, 1400, Options())
    assert np.array_equal(resumed.mean, whole.mean)
    assert np.array_equal(resumed.stderr, whole.stderr)
    assert (resumed.samples, resumed.evaluations) == (whole.samples, whole.evaluations)
    assert sum(seen) < whole.evaluations < before + sum(seen)  # what was saved is not made again
    assert np.array_equal(run(table, 1400, options).mean, whole.mean)  # nothing left to do
    with pytest.raises(ValueError, match="belongs to another game"):
        run(Table(-table.values), 1400, options)
    with pytest.raises(ValueError, match="players was 8, is 6"):
        run(random_table(6, 3), 1400, options)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged"):
        run(table, 1400, options)


def test_truncated_walks_stop_at_a_small_error():
    table = random_table(6, 1)
    found = Truncated(0.05).estimate(table, 100_000, 1, Options(stop=0.1))
    assert found.ratio < 0.1
    assert found.evaluations < 50_000
    assert found.samples % 16 == 0  # where it is looked at, whatever the batches
    small = Truncated(0.05).estimate(table, 100_000, 1, Options(stop=0.1, batch_size=5))
    assert np.array_equal(found.mean, small.mean)


def test_a_state_that_is_damaged_or_of_another_run_is_refused(tmp_path):
    path, table = tmp_path / "run.state", random_table(5, 3)
    options = Options(state=path)
    Permutation().estimate(table, 100, 2, options)
    good = path.read_bytes()
    for damaged in (good[:-1], good[:40], b"", good[:-8] + bytes(8), b"x" * len(good)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            Permutation().estimate(table, 100, 2, options)
    path.write_bytes(good)
    with pytest.raises(ValueError, match="seed was 2, is 3"):
        Permutation().estimate(table, 100, 3, options)
    with pytest.raises(ValueError, match="estimator was"):
        KernelSHAP().estimate(table, 100, 2, options)
    with pytest.raises(ValueError, match="another game"):
        Permutation().estimate(random_table(5, 4), 100, 2, options)


def test_bad_input_is_named():
    game = random_table(5, 0)
    for estimator in UNIT_ESTIMATORS:
        for budget in (0, -3, 1 + estimator.cost(5)):
            with pytest.raises(ValueError, match=rf"needs a budget of \d+ evaluations or more, got {budget}"):
                estimator.estimate(game, budget)
    with pytest.raises(ValueError, match="need 32 evaluations, got 31"):
        Exact().estimate(game, 31)
    with pytest.raises(ValueError, match="2\\^25 coalitions"):
        Exact().plan(25, 1 << 40)
    with pytest.raises(ValueError, match="1 to 16777216 players, got 0"):
        FunctionGame(game, 0)
    with pytest.raises(ValueError, match="seed -1"):
        Permutation().estimate(game, 100, seed=-1)
    with pytest.raises(ValueError, match="batch_size is at least 1, got 0"):
        Options(batch_size=0)
    with pytest.raises(ValueError, match="stop is a positive ratio, got nan"):
        Options(stop=float("nan"))
    with pytest.raises(ValueError, match="k=5 is not below"):
        TopK(5).find(game, 1000)
    with pytest.raises(ValueError, match="stops when all are decided"):
        TopK(2).find(game, 1000, options=Options(stop=0.1))
    with pytest.raises(ValueError, match="tolerance is 0 or more"):
        Truncated(-1.0)
    with pytest.raises(ValueError, match="has 6 players, the game 5"):
        Permutation().estimate(game, 100, 0, Options(control=Quadratic(0.0, np.zeros(6), np.zeros((6, 6)))))


@pytest.mark.parametrize("estimator", [*UNIT_ESTIMATORS, Exact(), Truncated(0.0)], ids=str)
def test_a_value_that_is_not_finite_is_named(estimator):
    table = random_table(4, 0)
    damaged = Table(table.values.copy())
    damaged.values[0b1111] = np.nan
    with pytest.raises(ValueError, match=r"coalition \{0, 1, 2, 3\} \(4 players\) is nan"):
        estimator.estimate(damaged, 1000)


def test_a_game_with_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 coalitions"):
        Permutation().estimate(FunctionGame(lambda z: np.zeros(3), 4), 100)


def test_philox_known_answers():
    ones = 0xFFFFFFFF
    cases = [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (ones,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for key, counter, words in cases:
        assert ops.philox(key, counter) == words


LEVELS = [key.isa for key in backend.kernels(op="shapley", format="permutation", supported_only=True)]


@pytest.mark.parametrize("isa", LEVELS)
def test_words_are_philox_blocks_in_order(isa):
    seed, sample, visit, purpose = 0x123456789ABCDEF, (1 << 39) + 5, 77, 3
    with backend.force_isa(isa):
        words = ops.draw_words(seed, sample, 2, 131, visit=visit, purpose=purpose)
    for row in range(2):
        number = sample + row
        counter = (number & 0xFFFFFFFF, number >> 32 | visit << 8, purpose)
        blocks = [ops.philox(seed, (*counter, block)) for block in range(33)]
        assert words[row].tolist() == np.array(blocks).ravel()[:131].tolist()


def shuffled(seed, sample, players):
    """Fisher-Yates with Lemire's rejection, in plain Python."""
    words = ops.draw_words(seed, sample, 1, players, purpose=0)[0].tolist()
    order, rejected = list(range(players)), 0
    for i, word in enumerate(words):
        span = players - i
        wide, attempt = word * span, 0
        while wide % 2**32 < 2**32 % span:
            counter = (sample & 0xFFFFFFFF, sample >> 32 | 1 << 31, 0, i << 8 | attempt)
            wide, attempt = ops.philox(seed, counter)[0] * span, attempt + 1
            rejected += 1
        j = i + (wide >> 32)
        order[i], order[j] = order[j], order[i]
    return order, rejected


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("players", [0, 1, 2, 15, 16, 17, 63, 64, 65, 624])
def test_permutations_are_fisher_yates(isa, players):
    with backend.force_isa(isa):
        orders = ops.draw_permutations(11, 2**40 - 3, 3, players)
    for row, order in enumerate(orders.tolist()):
        assert order == shuffled(11, 2**40 - 3 + row, players)[0]


@pytest.mark.parametrize("isa", LEVELS)
def test_rejected_words_are_drawn_again(isa):
    players, total = 200_000, 0
    for sample in range(2):
        with backend.force_isa(isa):
            found = ops.draw_permutations(5, sample, 1, players)[0]
        expected, rejected = shuffled(5, sample, players)
        total += rejected
        assert found.tolist() == expected
    assert total > 0, "no word was rejected: the test tests nothing"


def test_permutations_are_uniform():
    orders = ops.draw_permutations(1, 0, 24_000, 4)
    codes = np.unique(orders @ np.array([64, 16, 4, 1]), return_counts=True)[1]
    assert len(codes) == 24
    assert (
        (codes - 1000.0) ** 2 / 1000
    ).sum() < 55  # 99.9 % of chi-squared with 23 degrees of freedom is 49.7


def test_counters_out_of_range_are_refused():
    with pytest.raises(ValueError, match="are beyond 1099511627776"):
        ops.draw_permutations(0, 2**40 - 1, 2, 4)
    with pytest.raises(ValueError, match="visit 8388608 is beyond"):
        ops.draw_words(0, 0, 1, 1, visit=1 << 23)
    with pytest.raises(ValueError, match="players are more than"):
        ops.draw_permutations(0, 0, 0, (1 << 24) + 1)
    with pytest.raises(ValueError, match="sample -1 is negative"):
        ops.draw_words(0, -1, 1, 1)
