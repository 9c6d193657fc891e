"""Where the regressor's noise estimate and its error bars are not to be trusted."""

import numpy as np
import pytest

from pysparse import bayes

pytest.importorskip("sklearn")


def problem(samples, features, seed=0):
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((samples, features))
    truth = np.zeros(features)
    truth[:2] = 1.0, -2.0
    return matrix, truth, matrix @ truth + 0.3 * generator.standard_normal(samples)


@pytest.mark.parametrize("features", [20, 40])
def test_noise_from_too_few_samples_is_warned_of(features):
    matrix, _, y = problem(20, features)
    with pytest.warns(UserWarning, match=f"{features} features for 20 samples: .* give noise_variance"):
        bayes.EBFRegressor().fit(matrix, y)
    bayes.EBFRegressor(noise_variance=0.09).fit(matrix, y)  # warnings are errors here


def test_enough_samples_need_no_warning():
    matrix, _, y = problem(21, 20)
    assert bayes.EBFRegressor().fit(matrix, y).noise_variance_ > 0  # a warning would be an error here


def coverage(settings):
    hits = []
    for seed in range(100):
        matrix, truth, y = problem(60, 10, seed)
        model = bayes.EBFRegressor(**settings).fit(matrix, y)
        hits.append(np.abs(model.coef_ - truth)[:2] < 1.96 * np.sqrt(model.coef_variance_[:2]))
    return float(np.mean(hits))


@pytest.mark.slow
def test_error_bars_cover_what_the_readme_says():
    """Of 200 intervals: the standard error of a share near 0.6 is 0.035, near 0.93 it is 0.018."""
    shrunken, weaker, refitted = (coverage(one) for one in ({}, {"kappa": 1.0}, {"refit": True}))
    assert shrunken < weaker < refitted
    assert (shrunken, weaker, refitted) == pytest.approx((0.56, 0.78, 0.93), abs=0.03)
