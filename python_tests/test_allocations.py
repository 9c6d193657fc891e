"""OWL, DLP and ATP against their published vectors; projection, settings by name, allocations on models."""

import itertools
import math

import pytest
import tiny_models
import torch
from allocation_cases import block, stack
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse.calib import load_calibration
from pysparse.measure import torch_threads
from pysparse.methods import (
    ATP,
    DLP,
    OWL,
    DLPProfile,
    GlobalMagnitude,
    Profile,
    Wanda,
    allocation_for,
    beta_grid,
    parse_recipe,
    recipe_for,
    recipe_to_yaml,
    search_beta,
)
from pysparse.methods.atp import beta_bound
from pysparse.methods.dlp import BLOCK_STATISTICS
from pysparse.methods.owl import outlier_percent
from pysparse.models.discover import discover
from pysparse.pruning import (
    NM,
    Evidence,
    MixedNM,
    WeightsUnknownError,
    gather_evidence,
    plan,
    project,
    run,
)


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def mean(sparsities, layers):
    sizes = [evidence.layer.size for evidence in layers]
    return math.fsum(s * n for s, n in zip(sparsities, sizes, strict=True)) / sum(sizes)


# --- projection ------------------------------------------------------------------------------------------


def test_vectors_of_the_projection():
    assert project([0.2, 0.7, 0.99, 1.1], [1] * 4, 0.7, 0.0, 0.95) == [0.2, 0.7, 0.95, 0.95]
    feasible = [0.58, 0.64, 0.70, 0.88]
    assert project(feasible, [3] * 4, 0.7, 0.0, 0.95) == feasible


@settings(max_examples=200, deadline=None)
@given(
    raw=st.lists(st.floats(-3, 3), min_size=1, max_size=12),
    seed=st.integers(0, 99),
    target=st.floats(0, 0.95),
)
def test_projection_keeps_bounds_order_and_mean(raw, seed, target):
    sizes = torch.randint(1, 10**9, (len(raw),), generator=torch.Generator().manual_seed(seed)).tolist()
    found = project(raw, sizes, target, 0.0, 0.95)
    assert all(0.0 <= value <= 0.95 for value in found)
    assert math.fsum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(
        target, abs=1e-9
    )
    for i in range(len(raw)):
        for j in range(len(raw)):
            assert raw[i] > raw[j] or found[i] <= found[j]
    free = [k for k, value in enumerate(found) if 0.0 < value < 0.95]
    shifts = [found[k] - raw[k] for k in free]
    assert all(shift == pytest.approx(shifts[0], abs=1e-9) for shift in shifts)  # one shift for all


def test_projection_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"no sparsities between 0 and 0.9 have the mean 0.95"):
        project([0.5], [1], 0.95, 0.0, 0.9)
    with pytest.raises(ValueError, match="raw sparsity 1 is nan"):
        project([0.5, math.nan], [1, 1], 0.5)


# --- OWL -------------------------------------------------------------------------------------------------

SIZES = [4] * 4
VALUES = st.lists(st.floats(0, 1e3), min_size=2, max_size=9)
SPREAD = st.floats(0.01, 0.15)


def test_vector_of_owl():
    rates = OWL(lmbda=0.08).rates([4, 2, 1, 1], SIZES, 0.7)
    assert rates == pytest.approx([0.59333, 0.70, 0.75333, 0.75333], abs=5e-6)


@settings(max_examples=60, deadline=None)
@given(values=VALUES, spread=SPREAD, scale=st.floats(0.01, 100), shift=st.floats(0, 1e3))
def test_owl_has_the_target_as_mean_a_fixed_range_and_sees_no_affine_map(values, spread, scale, shift):
    sizes = [10] * len(values)
    rates = OWL(lmbda=spread).rates(values, sizes, 0.5)
    assert sum(rates) / len(rates) == pytest.approx(0.5, abs=1e-12)
    span = 2 * spread if max(values) > min(values) else 0.0
    assert max(rates) - min(rates) == pytest.approx(span, abs=1e-12)
    moved = [value * scale + shift for value in values]
    if max(moved) - min(moved) > 1e-3:  # what float64 can still tell apart
        assert OWL(lmbda=spread).rates(moved, sizes, 0.5) == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize("allocation", [OWL(lmbda=0.0), DLP(alpha=0.0), ATP(0.0)])
def test_without_a_band_the_allocation_is_uniform(allocation):
    assert allocation.rates([0, 1, 2], [5, 5, 5], 0.6) == [0.6] * 3


@pytest.mark.parametrize("allocation", [OWL(), DLP()])
def test_equal_blocks_get_the_target(allocation):
    assert allocation.rates([3.0, 3.0, 3.0], [5, 6, 7], 0.6) == [0.6] * 3


def test_outliers_are_counted_over_all_layers_of_a_block():
    wide, tall = torch.ones(2, 8), torch.ones(4, 4)
    wide[0, 0] = tall[3, 3] = 10.0  # mean (30 + 20) / 32 = 1.5625: above 5 times that
    assert outlier_percent(block(wide, tall), 5.0) == pytest.approx(100 * 2 / 32)
    assert outlier_percent(block(wide, tall), 7.0) == 0.0
    a = torch.tensor([1.0, 1, 1, 8])
    assert outlier_percent(block(torch.ones(4, 4), norms=a), 2.0) == 25.0  # outliers of the inputs count


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), exponent=st.integers(-8, 8))
def test_the_share_of_outliers_does_not_see_the_scale(seed, exponent):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) ** 3
    assert outlier_percent(block(weight), 3.0) == outlier_percent(block(weight * 2.0**exponent), 3.0)


# --- DLP -------------------------------------------------------------------------------------------------


def test_vector_of_dlp():
    rates = DLP(alpha=0.15).rates([1, 2, 3, 6], SIZES, 0.7)
    assert rates == pytest.approx([0.58, 0.64, 0.70, 0.88], abs=1e-12)
    # the paper's way: importance by the sum, inverted, min-max
    unimportance = torch.tensor([1.0, 2, 3, 6], dtype=torch.float64)
    importance = 1 - unimportance / unimportance.sum()
    assert importance.tolist() == pytest.approx([0.91667, 0.83333, 0.75, 0.5], abs=5e-6)
    d = 2 * 0.15 * (importance - importance.min()) / (importance.max() - importance.min())
    assert (0.7 - (d - d.mean())).tolist() == pytest.approx(rates, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(values=VALUES, scale=st.floats(0.01, 100), shift=st.floats(0, 1e3))
def test_dlp_orders_by_unimportance_and_sees_no_affine_map(values, scale, shift):
    sizes = [10] * len(values)
    rates = DLP().rates(values, sizes, 0.7)
    for i in range(len(values)):
        for j in range(len(values)):
            assert values[i] > values[j] or rates[i] <= rates[j]
    moved = [value * scale + shift for value in values]
    if max(moved) - min(moved) > 1e-3:
        assert DLP().rates(moved, sizes, 0.7) == pytest.approx(rates, abs=1e-6)


def test_the_statistics_of_a_block_are_those_of_all_its_scores():
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(5, 6, generator=generator), torch.randn(7, 6, generator=generator)]
    norms = torch.rand(6, generator=generator)
    scored = block(*weights, norms=norms)
    together = torch.cat([(w.abs() * norms).flatten() for w in weights])
    expected = {
        "median": together.median(), "mean": together.double().mean(), "max": together.max(),
        "sum": together.double().sum(), "var": together.double().var(), "std": together.double().std(),
    }  # fmt: skip
    assert set(expected) == set(BLOCK_STATISTICS)
    for name, value in expected.items():
        assert BLOCK_STATISTICS[name](scored) == pytest.approx(float(value), rel=1e-6), name
    assert BLOCK_STATISTICS["median"](scored) == float(together.median())  # exact


# --- ATP -------------------------------------------------------------------------------------------------


def test_vectors_of_atp():
    assert ATP(0.1).rates(range(4), SIZES, 0.6) == pytest.approx([0.45, 0.55, 0.65, 0.75], abs=1e-12)
    rates = ATP(0.018).rates(range(32), [7] * 32, 0.7)
    assert (rates[0], rates[-1]) == pytest.approx((0.421, 0.979), abs=1e-12)
    assert sum(rates) / 32 == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize(
    ("blocks", "target", "bound"),
    [(32, 0.5, 0.032258), (32, 0.6, 0.025806), (32, 0.7, 0.0193548), (32, 0.8, 0.0129032),
     (40, 0.7, 0.0153846), (80, 0.7, 0.0075949)],
)  # fmt: skip
def test_the_valid_range_of_atp(blocks, target, bound):
    found = beta_bound(range(blocks), [5] * blocks, target)
    assert found == pytest.approx(bound, abs=5e-7)
    assert max(ATP(found - 1e-9).rates(range(blocks), [5] * blocks, target)) < 1.0
    with pytest.raises(ValueError, match=r"drives a block out of .* take a beta below 0.0"):
        ATP(found + 1e-6).rates(range(blocks), [5] * blocks, target)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 40), target=st.floats(0.05, 0.95), part=st.floats(0, 0.999), seed=st.integers(0, 99)
)
def test_atp_is_a_progression_around_the_target_for_any_sizes(count, target, part, seed):
    sizes = torch.randint(1, 1000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    beta = part * beta_bound(range(count), sizes, target)
    rates = ATP(beta).rates(range(count), sizes, target)
    assert 0.0 <= min(rates) <= max(rates) < 1.0
    steps = [b - a for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([beta] * (count - 1), abs=1e-11)
    assert sum(s * n for s, n in zip(rates, sizes, strict=True)) / sum(sizes) == pytest.approx(
        target, abs=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(rates=st.lists(st.floats(0, 0.99), min_size=2, max_size=10), factor=st.floats(1.0, 3.0))
def test_sorting_rates_by_depth_never_increases_the_propagated_error(rates, factor):
    """The paper's argument, E_next = c * E + f(s) with c >= 1: the order with the least sum is the ascending one."""

    def total(order):
        error = summed = 0.0
        for rate in order:
            error = factor * error + rate**2
            summed += error
        return summed

    assert total(sorted(rates)) <= total(rates) * (1 + 1e-12) + 1e-12


def test_atp_without_a_beta_is_still_to_be_searched():
    layers = stack([4, 4])
    assert ATP().searched
    assert not ATP(0.1).searched
    with pytest.raises(ValueError, match="ATP has no beta yet"):
        ATP()(layers, 0.5)
    with pytest.raises(ValueError, match="must be 0 or more, got -0.1"):
        ATP(-0.1)
    assert ATP(0.3)(stack([4]), 0.5) == [0.5]  # one block
    assert beta_grid(stack([4]), 0.5) == [0.0]


def test_the_search_walks_the_valid_range_and_stops_after_two_rises():
    deep = stack([2] * 32)
    grid = beta_grid(deep, 0.7)
    assert grid == pytest.approx([0.002 * step for step in range(10)])  # nine trials and the uniform one
    assert max(beta_grid(stack([2] * 80), 0.7)) == pytest.approx(0.006)
    assert len(beta_grid(stack([2] * 6), 0.7)) == 10  # a short stack has a wide range, not sixty trials
    assert beta_grid(stack([2] * 6), 0.7)[-1] < beta_bound(range(6), [4] * 6, 0.7)
    merits = {0.0: 9.0, 0.1: 7.0, 0.2: 8.0, 0.3: 6.0, 0.4: 6.5, 0.5: 7.0, 0.6: 1.0}
    found = search_beta(list(merits), merits.__getitem__)
    assert found.beta == 0.3  # a single rise does not end it, two in a row do
    assert found.tried == tuple(list(merits.items())[:6])
    assert search_beta([0.0, 0.1], {0.0: 2.0, 0.1: 2.0}.__getitem__).beta == 0.0
    assert search_beta([0.0, 0.1], {0.0: math.inf, 0.1: 2.0}.__getitem__).beta == 0.1
    with pytest.raises(ValueError, match="no beta gave a finite figure"):
        search_beta([0.0, 0.1], lambda beta: math.nan)


# --- settings by name ------------------------------------------------------------------------------------


def test_settings_after_the_name():
    assert allocation_for("owl") == OWL(m=5.0, lmbda=0.08)
    assert allocation_for("owl:m=7,lmbda=0.1") == OWL(m=7, lmbda=0.1)
    assert allocation_for("dlp:statistic=mean") == DLP(statistic="mean")
    assert allocation_for("atp:beta=0.01") == ATP(0.01)
    for text, message in [
        (
            "owl:q=1",
            "allocation 'owl' has no setting 'q=1'; settings are key=value, one of m, lmbda, highest",
        ),
        ("uniform:a=1", "no setting 'a=1'; settings are key=value, none"),
        ("dlp:statistic=mode", "allocation 'dlp': statistic is one of median, mean, .* got 'mode'"),
        ("owl:m=0", "m, the outlier threshold in mean scores, must be above 0, got 0"),
        ("owl:m=x", "allocation 'owl'"),
        ("owl:lmbda=0.6", r"lmbda is half the width of the band of sparsities, in \[0, 0.5\], got 0.6"),
        ("dlp:alpha=-1", "alpha is half the width"),
        ("owle", "unknown allocation 'owle' .did you mean 'owl'"),
    ]:
        with pytest.raises(ValueError, match=message):
            allocation_for(text)


@pytest.mark.parametrize(
    "allocation",
    [OWL(m=7.0), DLP(statistic="mean"), ATP(0.01), ATP(), GlobalMagnitude("l2"), DLPProfile("llama-7b"),
     Profile(blocks=(0.4, 0.6)), Profile(layers=(("re:q_proj", 0.4), ("*", 0.6)))],
    ids=str,
)  # fmt: skip
def test_recipes_with_allocations_survive_yaml(allocation):
    recipe = recipe_for("wanda", "4:8", allocation)
    assert recipe.structure == MixedNM(4, 8)
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe
    assert recipe_for("wanda", "4:8", "uniform").structure == NM(4, 8)


def test_what_yaml_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="an allocation that is a function cannot be saved"):
        recipe_to_yaml(recipe_for("wanda", None, lambda layers, target: []))
    long = Profile(layers=tuple((f"model.layers.{index}.self_attn.q_proj", 0.5) for index in range(200)))
    with pytest.raises(ValueError, match="may have 4096: name layers of a profile by patterns"):
        recipe_to_yaml(recipe_for("wanda", None, long))


# --- on models -------------------------------------------------------------------------------------------

BY_ACTIVATION = [OWL(m=3.0), DLP(), DLP(statistic="mean")]


def test_sparsity_zero_changes_no_bit_under_any_allocation():
    calibration = load_calibration(tiny_models.tokens())
    for method in ("magnitude", "wanda", "sparsegpt"):
        for allocation in ("uniform", "owl", "dlp", "atp:beta=0", "global", [0.0] * 3):
            model, dense = tiny_models.tiny("llama"), tiny_models.tiny("llama")
            report = run(discover(model), recipe_for(method, None, allocation), 0.0, calibration)
            assert report.sparsity == 0.0
            for name, parameter in dense.named_parameters():
                assert torch.equal(model.get_parameter(name), parameter), (method, allocation, name)


def test_every_method_takes_every_allocation():
    calibration = load_calibration(tiny_models.tokens())
    for method in ("magnitude", "magnitude-row", "magnitude-global", "wanda", "wanda-variant", "sparsegpt"):
        for allocation in ("owl", "dlp", "atp:beta=0.1", "global"):
            for pattern in (None, "4:8"):
                model = tiny_models.tiny("llama")
                report = run(discover(model), recipe_for(method, pattern, allocation), None, calibration)
                assert report.sparsity == pytest.approx(0.5, abs=0.0 if pattern else 0.02), (
                    method,
                    allocation,
                )
                assert len({layer.requested for layer in report.layers}) > 1 or pattern


@pytest.mark.parametrize("allocation", BY_ACTIVATION, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_allocations_by_activation_look_at_the_dense_model(allocation, name):
    model, calibration = tiny_models.tiny(name), load_calibration(tiny_models.tokens())
    recipe = recipe_for("wanda", None, allocation)
    evidence = gather_evidence(discover(model), recipe, calibration)
    planned = plan(discover(model), recipe, 0.6, evidence)
    expected = {}
    for index in range(3):  # by joining all scores of a block
        ours = [one for one in evidence if one.layer.block == index]
        scores = torch.cat([Wanda()(one.layer.weight, one.stats).flatten() for one in ours])
        if isinstance(allocation, OWL):
            expected[index] = -float((scores > allocation.m * scores.double().mean()).double().mean())
        else:
            expected[index] = float(
                scores.median() if allocation.statistic == "median" else scores.double().mean()
            )
    order = sorted(range(3), key=expected.__getitem__)
    report = run(discover(model), recipe, 0.6, calibration)
    asked = {layer.block: layer.requested for layer in report.layers}
    assert len({(layer.block, layer.requested) for layer in report.layers}) == 3  # one rate a block
    assert asked[order[0]] < asked[order[2]]
    assert asked[order[2]] - asked[order[0]] == pytest.approx(
        2 * (allocation.lmbda if isinstance(allocation, OWL) else allocation.alpha), abs=1e-6
    )
    values = [expected[index] for index in range(3)]
    middle = (values[order[1]] - values[order[0]]) / (values[order[2]] - values[order[0]])
    assert (asked[order[1]] - asked[order[0]]) / (asked[order[2]] - asked[order[0]]) == pytest.approx(
        middle, abs=1e-4
    )
    assert sum(layer.requested * layer.size for layer in report.layers) / report.weights == pytest.approx(
        0.6, abs=1e-6
    )
    assert [(layer.sparsity, layer.pruned) for layer in planned.layers] == [
        (layer.requested, layer.pruned) for layer in report.layers
    ]


def test_extreme_targets_are_clipped_and_still_met():
    model, calibration = tiny_models.tiny("llama"), load_calibration(tiny_models.tokens())
    for target in (0.05, 0.95, 0.995):
        evidence = gather_evidence(discover(model), recipe_for("wanda", None, DLP()), calibration)
        rates = DLP(alpha=0.3)(evidence, target)
        assert 0.0 <= min(rates) <= max(rates) <= max(0.99, target)
        assert mean(rates, evidence) == pytest.approx(target, abs=1e-9)


def test_plans_say_what_is_not_known_yet():
    model = tiny_models.tiny("llama")
    with torch.device("meta"):
        skeleton = tiny_models.tiny("llama")
    for allocation, layout, words in [
        ("owl", discover(model), "OWL decides from activations; pass calibration"),
        ("atp", discover(model), "ATP searches its setting"),
        ("global", discover(skeleton), "GlobalMagnitude looks at the weights"),
    ]:
        planned = plan(layout, recipe_for("magnitude", None, allocation), 0.6)
        assert not planned.known
        assert planned.pruned == round(0.6 * planned.weights)
        assert words in planned.warnings[0]
        assert planned.layers[0].sparsity is planned.layers[0].packed_bytes is None
        assert planned.table().row_count == 22
        exact = plan(layout, recipe_for("magnitude"), 0.6)
        assert planned.packed_bytes == pytest.approx(exact.packed_bytes, rel=1e-3)
    assert plan(discover(model), recipe_for("magnitude-global"), 0.6).known
    with pytest.raises(WeightsUnknownError):
        GlobalMagnitude()([Evidence(layer, {}) for layer in discover(skeleton).layers], 0.5)


def test_a_damaged_weight_is_named():
    model = tiny_models.tiny("llama")
    layers = gather_evidence(
        discover(model), recipe_for("wanda", None, "dlp"), load_calibration(tiny_models.tokens())
    )
    layers[8].layer.module.weight.data[0, 0] = math.inf
    for allocation in (OWL(), DLP()):
        with pytest.raises(ValueError, match=rf"{layers[8].layer.path}: the scores hold NaN or infinity"):
            allocation(layers, 0.5)
