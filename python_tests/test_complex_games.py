"""Games whose values are complex: refused, since a Shapley value of half a number would be wrong."""

import numpy as np
import pytest
import torch

from pysparse.shapley import Exact, Permutation
from pysparse.shapley.game import as_values


class Complex:
    n_players = 3

    def __call__(self, coalitions):
        return coalitions.sum(1) * (1.0 + 2.0j)


class ComplexWalk:
    n_players = 3

    def __call__(self, coalitions):
        return coalitions.sum(1) * 1.0

    def walk(self, orders):
        return np.arange(orders.shape[1] + 1) * np.ones((len(orders), 1)) * 1j


@pytest.mark.parametrize(
    "estimate",
    [
        lambda: Exact().estimate(Complex(), budget=8),
        lambda: Permutation().estimate(Complex(), budget=20),
        lambda: as_values(torch.ones(2, dtype=torch.complex64)),
    ],
)
def test_complex_values_are_refused(estimate):
    with pytest.raises(ValueError, match="a game's values are real numbers, got complex"):
        estimate()


def test_a_walk_of_complex_values_is_refused():
    with pytest.raises(ValueError, match="a game's values are real numbers, got complex128"):
        Permutation().estimate(ComplexWalk(), budget=20)


def test_whole_numbers_and_bools_stay_values():
    assert as_values([[1], [2]]).tolist() == [1.0, 2.0]
    assert as_values(torch.tensor([True, False])).dtype == np.float64
