"""LoSA's arithmetic against its published vectors and a linear-programming solver."""

import math

import numpy as np
import pytest
import torch
from allocation_cases import block
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from pysparse.methods.losa import (
    LoSA,
    allocate_ranks,
    band_half_width,
    block_rates,
    centered_gram,
    cubic_ramp,
    linear_cka,
    redundancy,
)
from pysparse.pruning import Unstructured, exact_sparsities
from pysparse.pruning.counts import _fraction
from pysparse.pruning.structure import count_of

# --- the ramp --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (0.5, [0.244, 0.392, 0.468, 0.496, 0.5]),
        (0.6, [0.2928, 0.4704, 0.5616, 0.5952, 0.6]),
        (0.7, [0.3416, 0.5488, 0.6552, 0.6944, 0.7]),
    ],
)
def test_vector_of_the_ramp(final, expected):
    assert cubic_ramp(final, 5) == pytest.approx(expected, abs=1e-12)
    assert LoSA().sparsities(final) == cubic_ramp(final, 5)


def test_the_ramp_ends_at_the_target_exactly():
    assert [cubic_ramp(0.7, rounds)[-1] for rounds in (1, 2, 3, 7)] == [0.7] * 4
    assert cubic_ramp(0.0, 3) == [0, 0, 0]


@pytest.mark.parametrize("final", [-0.1, 1.0, math.nan])
def test_a_ramp_to_an_impossible_sparsity_is_refused(final):
    with pytest.raises(ValueError, match="sparsity"):
        cubic_ramp(final, 5)


def test_a_ramp_of_no_rounds_is_refused():
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        cubic_ramp(0.5, 0)


# --- similarity ------------------------------------------------------------------------------------------


def features(seed, n=12, p=40):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def cka(*found):
    return linear_cka([centered_gram(one) for one in found])


def test_vector_of_the_similarity():
    x, y = features(0), features(1, p=23)
    rotation, _ = torch.linalg.qr(features(2, 40, 40))
    same = cka(x, x, 3.7 * x, x @ rotation, x + features(3, 1))
    # the products are of float32: each entry is known to about sqrt(p) units in the last place
    torch.testing.assert_close(same, torch.ones(5, 5, dtype=torch.float64), rtol=0, atol=2e-6)
    assert float(cka(x, y)[0, 1]) < 0.9


def test_the_similarity_is_the_textbook_formula():
    found = [features(seed, 10, 30).double() for seed in range(3)]
    expected = np.eye(3)
    for i, x in enumerate(found):
        for j, y in enumerate(found):
            x, y = x - x.mean(0), y - y.mean(0)
            cross = (y.T @ x).square().sum()
            expected[i, j] = cross / ((x.T @ x).norm() * (y.T @ y).norm())
    actual = cka(*(one.float() for one in found))
    np.testing.assert_allclose(actual.numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(actual.numpy(), actual.numpy().T, atol=1e-15)


def test_shares_of_redundancy_add_up_and_follow_the_similarity():
    similarity = torch.tensor([[1, 0.9, 0.2], [0.9, 1, 0.3], [0.2, 0.3, 1]], dtype=torch.float64)
    assert redundancy(similarity) == pytest.approx([1.1 / 2.8, 1.2 / 2.8, 0.5 / 2.8])


@pytest.mark.parametrize(
    ("value", "message"), [(1.0, "block 1 is the same for all"), (math.nan, "block 1 is not finite")]
)
def test_features_without_a_similarity_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        cka(features(0), torch.full((12, 5), value))


# --- the linear programme --------------------------------------------------------------------------------


def optimum(shares, sizes, target, half_width, lowest=None, b=1.0):
    """The same programme by scipy's HiGHS."""
    weights = np.array(sizes, dtype=float) / sum(sizes)
    costs = weights * np.exp(-b * np.array(shares))
    low = np.maximum(target - half_width, np.zeros(len(sizes)) if lowest is None else lowest)
    high = np.maximum(min(target + half_width, 1), low)
    found = linprog(costs, A_eq=weights[None], b_eq=[target], bounds=np.stack([low, high], 1), method="highs")
    assert found.success, found.message
    return costs, found.fun


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 33),
    seed=st.integers(0, 9999),
    target=st.floats(0.05, 0.95),
    b=st.sampled_from([1.0, 100.0]),
)
def test_the_greedy_rates_are_the_optimum(blocks, seed, target, b):
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.ones(blocks)).tolist()
    for sizes in ([1000] * blocks, generator.integers(1, 5000, blocks).tolist()):
        width = band_half_width(target)
        lowest = (target - width * generator.random(blocks)).tolist() if seed % 2 else None
        if lowest is not None and np.average(lowest, weights=sizes) > target:
            continue
        rates = block_rates(shares, sizes, target, width, lowest)
        costs, best = optimum(shares, sizes, target, width, lowest, b)
        assert np.average(rates, weights=sizes) == pytest.approx(target, abs=1e-9)
        assert max(abs(rate - target) for rate in rates) <= width + 1e-12
        assert float(costs @ rates) <= best + 1e-9


def test_the_more_redundant_half_is_pruned_more():
    assert block_rates([0.1, 0.4, 0.3, 0.2], [7] * 4, 0.7, 0.03) == pytest.approx([0.67, 0.73, 0.73, 0.67])
    assert block_rates([0.2, 0.5, 0.3], [7] * 3, 0.5, 0.01) == pytest.approx(
        [0.49, 0.51, 0.5]
    )  # odd: the middle


def test_bands_are_the_authors():
    assert [band_half_width(s) for s in (0.1, 0.5, 0.51, 0.6, 0.7, 0.8)] == [
        0.01,
        0.01,
        0.02,
        0.02,
        0.03,
        0.03,
    ]


def test_rates_never_fall_and_stay_in_bounds():
    rates = block_rates([0.2, 0.3, 0.5], [10] * 3, 0.5, 0.01, [0.51, 0.2, 0.3])
    assert rates == pytest.approx([0.51, 0.49, 0.5])
    assert block_rates([0.5, 0.5], [1, 1], 0.005, 0.01) == pytest.approx([0.01, 0.0])  # never negative


def test_a_rate_that_cannot_be_met_is_refused():
    with pytest.raises(ValueError, match=r"0\.5 cannot be met: the blocks' bounds allow 0\.6 to"):
        block_rates([0.5, 0.5], [1, 1], 0.5, 0.01, [0.6, 0.6])
    with pytest.raises(ValueError, match="2 shares for 3 blocks"):
        block_rates([0.5, 0.5], [1, 1, 1], 0.5, 0.01)


# --- ranks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([1, 2, 3, 4], [2, 5, 7, 10]),
        ([0.1, 0.2, 0.3, 0.4, 5], [2, 2, 3, 3, 16]),  # the cap leaves 26 of 30 after the one pass
        ([1, 1, 2, 3, 5, 8], [2, 2, 4, 5, 9, 14]),
    ],
)
def test_vector_of_the_ranks(errors, expected):
    assert allocate_ranks(errors, 6) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(1, 16))
def test_ranks_never_pass_their_budget_by_much(errors, mean_rank):
    ranks = allocate_ranks(errors, mean_rank)
    assert all(1 <= rank <= 16 for rank in ranks)
    # one pass: it can give or take 1 a block, and clipping to 1 may add as much as 1 a block before
    assert sum(ranks) <= (mean_rank + 1) * len(errors)
    if not any(errors):
        assert ranks == [mean_rank] * len(errors)


def test_an_impossible_budget_of_rank_is_refused():
    for mean_rank in (0, 17):
        with pytest.raises(ValueError, match=f"mean rank of {mean_rank} a block cannot be met.*from 1 to 16"):
            allocate_ranks([1.0, 2.0], mean_rank)
    with pytest.raises(ValueError, match="mean rank of 17"):
        LoSA(first_rank=13)
    with pytest.raises(ValueError, match="mean rank of 0"):
        LoSA(first_rank=0)
    with pytest.raises(ValueError, match="rounds=0"):
        LoSA(rounds=0)
    with pytest.raises(ValueError, match="rank_step=-1"):
        LoSA(rank_step=-1)
    for error in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="reconstruction error of block 1"):
            allocate_ranks([1.0, error], 6)


def test_spread_and_ranks_can_be_turned_off():
    plain = LoSA(spread=0.0, rank_by_error=False)
    assert plain.half_width(0.7) == 0.0
    assert block_rates([0.1, 0.9], [3, 5], 0.7, plain.half_width(0.7)) == [0.7, 0.7]
    assert plain.ranks([1.0, 9.0], 2) == [7, 7]
    assert LoSA().half_width(0.7) == band_half_width(0.7)
    assert LoSA().ranks([1.0, 2.0, 3.0, 4.0], 1) == allocate_ranks([1.0, 2.0, 3.0, 4.0], 6)
    for spread in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"spread={spread}"):
            LoSA(spread=spread)


def test_the_budget_grows_by_one_a_round():
    assert [LoSA().mean_rank(step) for step in range(1, 6)] == [6, 7, 8, 9, 10]


# --- whole numbers of zeros ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 9), target=st.floats(0.05, 0.95), seed=st.integers(0, 99),
    group=st.sampled_from(["row", "matrix"]),
)  # fmt: skip
def test_layers_of_one_shape_get_exactly_the_zeros_of_one_rate(count, target, seed, group):
    """However the rates are spread, the total is that of the target in every layer, to the last weight."""
    generator = np.random.default_rng(seed)
    layers = [block(torch.ones(6, 37), index=index).layers[0].layer for index in range(count)]
    width = band_half_width(target)
    rates = block_rates(generator.random(count).tolist(), [1] * count, target, width)
    structure = Unstructured(group)
    found = exact_sparsities(layers, structure, rates, target)
    counts = [structure.pruned_count(6, 37, one) for one in found]
    assert sum(counts) == count * structure.pruned_count(6, 37, target)
    step = 6 if group == "row" else 1
    assert all(abs(n - rate * 222) <= 2 * step for n, rate in zip(counts, rates, strict=True))


def test_layers_of_unlike_shapes_come_as_near_as_whole_rows_allow():
    """Rows of 3 and 5: 3 a + 5 b with a, b near their wishes; a layer keeps what it lost already."""
    layers = [
        block(torch.ones(*shape), index=i).layers[0].layer for i, shape in enumerate([(3, 10), (5, 20)])
    ]
    structure = Unstructured()
    found = exact_sparsities(layers, structure, [0.6, 0.5], 0.5)
    assert [structure.pruned_count(*layer.shape, s) for layer, s in zip(layers, found, strict=True)] == [
        15,
        50,
    ]
    held = exact_sparsities(layers, structure, [0.5, 0.5], 0.5, [18, 0])
    assert [structure.pruned_count(*layer.shape, s) for layer, s in zip(layers, held, strict=True)] == [
        18,
        45,
    ]


def test_a_count_of_a_very_large_matrix_survives_the_division():
    for size in (11008 * 4096, 2**31 - 1):
        for count in (size // 3, size - 1, 7):
            assert count_of(size, _fraction(count, size)) == count
