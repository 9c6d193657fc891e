"""OWL, DLP, ATP, profiles and the global threshold against their published vectors; projection and mixed n:m."""

import dataclasses
import itertools
import json
import math

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pysparse.calib import load_calibration
from pysparse.measure import torch_threads
from pysparse.methods import (
    ALLOCATIONS,
    ATP,
    DLP,
    METHODS,
    OWL,
    Custom,
    DLPProfile,
    GlobalMagnitude,
    Profile,
    Wanda,
    allocation_for,
    beta_grid,
    load_profile,
    parse_recipe,
    recipe_for,
    recipe_to_yaml,
    search_beta,
)
from pysparse.methods.atp import beta_bound
from pysparse.methods.blockwise import ScoredBlock
from pysparse.methods.dlp import BLOCK_STATISTICS
from pysparse.methods.owl import outlier_percent
from pysparse.methods.profile import DLP_PROFILES
from pysparse.models.discover import discover
from pysparse.pruning import (
    NM,
    Evidence,
    MixedNM,
    PrunableLayer,
    Unstructured,
    WeightsUnknownError,
    gather_evidence,
    plan,
    project,
    run,
)
from pysparse.pruning import order_statistics as order_module
from pysparse.pruning.mixed import pattern_of
from pysparse.pruning.order_statistics import kth_smallest


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def block(*weights, norms=None, index=0):
    """A scored block of the given weights; without ``norms`` every input channel has norm 1."""
    layers = []
    for number, weight in enumerate(weights):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight.data = weight
        a = torch.ones(weight.shape[1]) if norms is None else norms
        layers.append(
            Evidence(PrunableLayer(f"{index}.{number}", module, index), {"squared_norm": a.square()})
        )
    return ScoredBlock(tuple(layers))


def stack(sizes, seed=0):
    """Evidence of one square layer a block, of random weights of different strengths."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, size, generator=generator) ** (1 + i % 3) for i, size in enumerate(sizes)]
    return [block(weight, index=index).layers[0] for index, weight in enumerate(weights)]


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


# --- the k-th smallest -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 999), levels=st.sampled_from([3, 1000, None]), chunk=st.sampled_from([7, 1 << 22]))
def test_kth_smallest_of_several_tensors(seed, levels, chunk):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(int(n), generator=generator) for n in torch.randint(1, 60, (3,), generator=generator)]
    if levels is not None:
        parts = [(part * levels).floor() for part in parts]  # ties
    everything = torch.cat(parts).sort().values
    count = int(torch.randint(1, len(everything) + 1, (1,), generator=generator))
    before = order_module._CHUNK
    try:
        order_module._CHUNK = chunk
        assert kth_smallest(lambda: parts, count) == float(everything[count - 1])
    finally:
        order_module._CHUNK = before


def test_kth_smallest_refuses_what_is_not_ordered_by_its_bits():
    for bad in (torch.tensor([1.0, math.nan]), torch.tensor([-1.0, 2.0])):
        with pytest.raises(ValueError, match="NaN or negative"):
            kth_smallest(lambda bad=bad: [bad], 1)
    with pytest.raises(ValueError, match="count=3 is not between 1 and the 2 scores"):
        kth_smallest(lambda: [torch.ones(2)], 3)
    with pytest.raises(TypeError, match="scores are float32"):
        kth_smallest(lambda: [torch.ones(2).double()], 1)
    assert kth_smallest(lambda: [torch.tensor([math.inf, 1.0])], 2) == math.inf


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


# --- profiles --------------------------------------------------------------------------------------------

PUBLISHED = {  # blocks, first, last but one, last
    "llama-2-7b": (32, 0.5348, 0.8348, 0.8277), "llama-7b": (32, 0.5324, 0.8324, 0.8138),
    "llama-2-13b": (40, 0.5019, 0.8019, 0.7874), "llama-13b": (40, 0.5029, 0.8029, 0.7857),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_profiles(model):
    blocks, first, peak, last = PUBLISHED[model]
    layers = stack([2] * blocks)
    rates = DLPProfile(model)(layers, 0.7)
    assert (rates[0], rates[-2], rates[-1]) == pytest.approx((first, peak, last), abs=1e-4)
    assert sum(rates) / blocks == pytest.approx(0.7, abs=1e-9)
    assert max(rates) - min(rates) == pytest.approx(0.3, abs=1e-4)
    assert DLP_PROFILES[model].index(max(DLP_PROFILES[model])) == blocks - 2
    lower = DLPProfile(model)(layers, 0.5)
    assert [b - a for a, b in zip(lower, rates, strict=True)] == pytest.approx([0.2] * blocks, abs=1e-9)
    assert max(DLPProfile(model)(layers, 0.9)) <= 0.99  # clipped, and the mean is kept
    assert sum(DLPProfile(model)(layers, 0.9)) / blocks == pytest.approx(0.9, abs=1e-9)
    assert ALLOCATIONS[f"dlp-{model}"] == DLPProfile(model)
    with pytest.raises(ValueError, match=rf"profile of {model} has sparsities for {blocks} blocks, .* has 3"):
        DLPProfile(model)(stack([2, 2, 2]), 0.7)


def test_llama_2_7b_in_full_precision_at_the_ends():
    """The JSON of the released code holds densities: 0.46519035 of block 0, 0.16519032 of 30, 0.17230450 of 31."""
    rates = DLP_PROFILES["llama-2-7b"]
    assert (rates[0], rates[30], rates[31]) == pytest.approx(
        (1 - 0.46519035, 1 - 0.16519032, 1 - 0.17230450), abs=5e-5
    )


def test_profiles_from_lists_mappings_and_files(tmp_path):
    layers = stack([4, 4])
    file = tmp_path / "profile.json"
    for content in ([0.4, 0.6], {"sparsities": [0.4, 0.6]}, {"densities": [0.6, 0.4]},
                    {"0.0": 0.4, "re:^1": 0.6}):  # fmt: skip
        file.write_text(json.dumps(content))
        for value in (content, file, str(file)):
            assert allocation_for(value)(layers, 0.5) == pytest.approx([0.4, 0.6])
    rounded = Profile(blocks=(0.4, 0.602))(layers, 0.5)  # figures that were rounded
    assert sum(rounded) / 2 == pytest.approx(0.5, abs=1e-12)
    assert rounded[1] - rounded[0] == pytest.approx(0.202)
    globbed = Profile(layers=(("0.*", 0.4), ("*", 0.6)))
    assert globbed(layers, 0.5) == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([0.4, 0.4], "have the mean 0.4000 over this model's weights, not 0.5: pass sparsity=0.4000"),
        ([0.5], "sparsities for 1 blocks, this model has 2"),
        ({"0.0": 0.5}, "names no sparsity for 1.0"),
        ({"0.0": 0.5, "1.0": 0.5, "7.0": 0.5}, "names 7.0, which no layer"),
        ([0.4, 60], "did you mean 0.6"),
        ([], "a profile lists a sparsity for each block"),
        ({"densities": 3}, "densities of a profile holds a int"),
        ([0.5, "0.5"], "holds '0.5', expected numbers"),
        ([0.5, None], "holds None, expected numbers"),
        (0.5, "a profile is a list or a mapping of sparsities, got float"),
    ],
)
def test_profiles_with_mistakes(content, message, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_profile(tmp_path / "p.json")(stack([4, 4]), 0.5)


def test_damaged_and_missing_profile_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such allocation profile"):
        allocation_for(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[0.5,")
    with pytest.raises(ValueError, match=r"bad.json: Expecting value"):
        allocation_for(tmp_path / "bad.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep.json"):
        allocation_for(tmp_path / "deep.json")
    (tmp_path / "long.json").write_text("[" + "0.5," * (1 << 19))
    with pytest.raises(ValueError, match="a profile has at most"):
        allocation_for(tmp_path / "long.json")


def test_a_function_may_allocate():
    layers = stack([4, 8])
    assert allocation_for(lambda layers, target: [0.9, 0.4])(layers, 0.5) == [0.9, 0.4]
    asking = Custom(lambda layers, target: [target] * len(layers), needs=("squared_norm",))
    assert allocation_for(asking) is asking
    assert allocation_for(OWL(m=7)) == OWL(m=7)
    report = run(_layout(layers), recipe_for("magnitude", None, lambda layers, target: [0.9, 0.4]), 0.5)
    assert [layer.pruned for layer in report.layers] == [14, 25]
    assert report.recipe["allocation"]["function"].endswith("<lambda>")
    with pytest.raises(TypeError, match="allocation is a int"):
        allocation_for(3)


def _layout(layers):
    """A layout of the modules in ``layers``, one a block."""
    return discover(nn.Sequential(*(nn.Sequential(evidence.layer.module) for evidence in layers)))


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
    with pytest.raises(ValueError, match="allocation Custom cannot be saved"):
        recipe_to_yaml(recipe_for("wanda", None, lambda layers, target: []))
    long = Profile(layers=tuple((f"model.layers.{index}.self_attn.q_proj", 0.5) for index in range(200)))
    with pytest.raises(ValueError, match="may have 4096: name layers of a profile by patterns"):
        recipe_to_yaml(recipe_for("wanda", None, long))


# --- one threshold for all -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(sparsity=st.floats(0, 0.9), seed=st.integers(0, 99), coarse=st.booleans())
def test_global_magnitude_prunes_exactly_the_smallest_of_all(sparsity, seed, coarse):
    layers = stack([8, 12, 5], seed)
    if coarse:
        for evidence in layers:
            evidence.layer.module.weight.data = (evidence.layer.weight * 2).round() / 2  # ties
    everything = torch.cat([evidence.layer.weight.abs().flatten() for evidence in layers])
    count = int(sparsity * len(everything) + 1e-9)
    gone = torch.zeros(len(everything), dtype=torch.bool)
    gone[everything.argsort(stable=True)[:count]] = True
    expected = gone.split([evidence.layer.size for evidence in layers])
    if any(bool(part.all()) for part in expected):
        return
    report = run(_layout(layers), METHODS["magnitude-global"], sparsity)
    assert [layer.pruned for layer in report.layers] == [int(part.sum()) for part in expected]
    for evidence, part in zip(layers, expected, strict=True):
        assert (evidence.layer.weight.flatten()[part] == 0).all()


def test_norms_make_the_global_threshold_blind_to_the_scale_of_a_layer():
    def rates(norm, scale):
        layers = stack([8, 8])
        layers[0].layer.module.weight.data *= scale
        return GlobalMagnitude(norm)(layers, 0.5)

    assert rates("none", 4.0)[0] < rates("none", 1.0)[0]
    for norm in ("l1", "l2"):
        assert rates(norm, 4.0) == rates(norm, 1.0)
    with pytest.raises(ValueError, match="norm is one of none, l1, l2, got 'l3'"):
        GlobalMagnitude("l3")


def test_a_layer_that_would_vanish_is_named():
    layers = stack([8, 8])
    layers[1].layer.module.weight.data *= 1e-3
    with pytest.raises(ValueError, match=r"would prune 1.0 entirely"):
        GlobalMagnitude()(layers, 0.6)
    layers[1].layer.module.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^1.0: the weights hold NaN"):
        GlobalMagnitude()(layers, 0.3)


def test_magnitude_by_row():
    report = run(_layout(stack([8, 8])), METHODS["magnitude-row"], 0.5)
    assert {layer.structure for layer in report.layers} == {"unstructured, by row"}
    assert [layer.pruned for layer in report.layers] == [32, 32]


# --- mixed n:m -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 12), pattern=st.sampled_from([(4, 8), (2, 4), (1, 4), (3, 5), (2, 8)]),
    spread=st.floats(0, 0.3), seed=st.integers(0, 99), unequal=st.booleans(),
)  # fmt: skip
def test_mixed_patterns_have_exactly_the_zeros_of_the_plain_one(count, pattern, spread, seed, unequal):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(1, 4, (count,), generator=generator).tolist() if unequal else [2] * count
    layers = [block(torch.ones(6, width * m + (1 if unequal else 0)), index=i).layers[0]
              for i, width in enumerate(widths)]  # fmt: skip
    wishes = project(
        [1 - n / m + spread * float(torch.randn(1, generator=generator)) for _ in range(count)],
        [evidence.layer.size for evidence in layers], 1 - n / m, 0.0, 1 - 1 / m,
    )  # fmt: skip
    structure = MixedNM(n, m)
    try:
        found = structure.round([evidence.layer for evidence in layers], wishes)
    except ValueError as error:
        assert unequal
        assert "sizes have too little in common" in str(error)  # noqa: PT017
        return
    pruned = sum(
        structure.pruned_count(*evidence.layer.shape, s) for evidence, s in zip(layers, found, strict=True)
    )
    assert pruned == sum(NM(n, m).pruned_count(*evidence.layer.shape, 1 - n / m) for evidence in layers)
    if not unequal:  # at most a whole step away, and never in the wrong order
        assert all(abs(s - wish) * m < 1 + 1e-9 for s, wish in zip(found, wishes, strict=True))
        order = sorted(range(count), key=lambda i: wishes[i])
        assert all(found[a] <= found[b] for a, b in itertools.pairwise(order))


def test_the_rounding_is_the_nearest():
    layers = [block(torch.ones(4, 8), index=i).layers[0].layer for i in range(4)]
    assert MixedNM(4, 8).round(layers, [0.30, 0.45, 0.58, 0.67]) == [0.25, 0.5, 0.625, 0.625]
    assert MixedNM(2, 4).round(layers, [0.45, 0.48, 0.52, 0.55]) == [0.5] * 4
    big = [block(torch.ones(8, 8), index=0).layers[0].layer, *layers]  # twice the others' weights
    found = MixedNM(4, 8).round(big, [0.55, 0.45, 0.45, 0.45, 0.55])
    assert 2 * found[0] + sum(found[1:]) == 6 * 0.5


def test_layers_of_a_block_share_an_answer_where_that_is_exact():
    pairs = [block(torch.ones(4, 8), torch.ones(8, 8), index=i).layers for i in range(3)]
    layers = [evidence.layer for pair in pairs for evidence in pair]
    found = MixedNM(4, 8).round(layers, [0.38] * 2 + [0.5] * 2 + [0.62] * 2)
    assert found == [0.375] * 2 + [0.5] * 2 + [0.625] * 2


def test_a_layers_pattern():
    structure = MixedNM(4, 8)
    assert pattern_of(structure, 0.375) == NM(5, 8)
    assert pattern_of(structure, 0.0) == Unstructured()
    assert pattern_of(NM(2, 4), 0.5) == NM(2, 4)
    scores = torch.rand(3, 16)
    assert structure.keep(scores, 0.625).sum() == 3 * 2 * 3
    assert torch.equal(structure.keep_columns(scores[:, 8:], 0.625, 8), structure.keep(scores, 0.625)[:, 8:])
    assert structure.step(20) == NM(4, 8).step(20)
    for sparsity in (0.4, 1.0):
        with pytest.raises(ValueError, match=rf"sparsity={sparsity:g} is not one of 0/8 .. 7/8"):
            structure.of(sparsity)
    with pytest.raises(ValueError, match="keeps 0 < n < m <= 64 weights, got 4:4"):
        MixedNM(4, 4)


def test_mixed_patterns_in_the_loop_and_in_the_plan(caplog):
    model, calibration = tiny_models.tiny("llama"), load_calibration(tiny_models.tokens())
    recipe = recipe_for("wanda", "4:8", ATP(0.2))
    planned = plan(discover(model), recipe)
    report = run(discover(model), recipe, None, calibration)
    assert [layer.structure for layer in report.layers] == ["6:8"] * 7 + ["4:8"] * 7 + ["2:8"] * 7
    assert [(layer.pruned, layer.structure) for layer in planned.layers] == [
        (layer.pruned, layer.structure) for layer in report.layers
    ]
    assert report.sparsity == 0.5
    assert "7 layers 2:8, 7 layers 4:8, 7 layers 6:8" in report.warnings[0]
    assert "n:m differs by layer" in caplog.text
    for layer in discover(model).layers:
        kept = (layer.weight != 0).unflatten(1, (-1, 8)).sum(dim=2)
        assert int(kept.max()) == (6, 4, 2)[layer.block]
    narrow = plan(discover(model), recipe_for("wanda", "2:4", ATP(0.01)))
    assert "differs too little between layers to move any from 2:4" in narrow.warnings[0]


def test_a_fixed_pattern_refuses_an_allocation():
    recipe = dataclasses.replace(recipe_for("magnitude", "2:4"), allocation=ATP(0.1))
    with pytest.raises(ValueError, match=r"fixes it at 0.5: use the uniform allocation, .* or MixedNM"):
        run(discover(tiny_models.tiny("llama")), recipe)


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
