"""What the sampling estimators and captum's face take: budgets, and arguments beside the inputs."""

import math

import numpy as np
import pytest
import torch

from pysparse.shapley import (
    Exact,
    FunctionGame,
    Options,
    Permutation,
    ShapleyValueSampling,
    TopK,
    Truncated,
)

GAME = FunctionGame(lambda coalitions: coalitions.sum(axis=1) * 1.0, n_players=3)


@pytest.mark.parametrize("budget", [math.inf, math.nan, 100.5, 100.0, "100", True, None])
@pytest.mark.parametrize(
    "estimate",
    [Permutation().estimate, Truncated(0.1).estimate, Exact().estimate, TopK(1).find],
    ids=["permutation", "truncated", "exact", "top-k"],
)
def test_a_budget_that_is_no_whole_number_is_refused(estimate, budget):
    with pytest.raises(ValueError, match=f"budget is a whole number of evaluations, got {budget!r}"):
        estimate(GAME, budget=budget)


def test_an_unlimited_budget_with_a_stop_is_refused_too():
    with pytest.raises(ValueError, match="whole number of evaluations, got inf"):
        Permutation().estimate(GAME, budget=math.inf, options=Options(stop=0.01))


def test_whole_numbers_of_numpy_are_budgets():
    found = Permutation().estimate(GAME, budget=np.int64(100))
    np.testing.assert_allclose(found.mean, 1.0, rtol=0, atol=4 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("at_once", [1, 2, 5, 64])
def test_each_input_keeps_its_own_row_of_the_arguments(at_once):
    """With forward = sum of a * b the attributions to a, against zeros, are a * b in every order."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    shared = torch.randn(4, dtype=torch.float64, generator=generator)

    def forward(x, y, weights, scale):
        assert len(y) == len(x)
        return scale * (x * y * weights).sum(1)

    found = ShapleyValueSampling(forward).attribute(
        a, additional_forward_args=(b, shared, 2.0), n_samples=2, perturbations_per_eval=at_once
    )
    torch.testing.assert_close(found, 2 * a * b * shared, rtol=0, atol=1e-14)


def test_a_single_argument_needs_no_tuple():
    a, b = torch.eye(3), torch.full((3, 3), 2.0)
    sampling = ShapleyValueSampling(lambda x, y: (x * y).sum(1))
    for given in (b, (b,)):
        torch.testing.assert_close(sampling.attribute(a, additional_forward_args=given), a * b)
