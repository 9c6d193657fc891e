"""A sparsity that whole weights a row cannot reach is said in the report."""

import pytest
import tiny_models

import pysparse


def warnings_of(sparsity, method):
    report = pysparse.prune(tiny_models.tiny("llama"), sparsity, method, progress=False).report
    return report.sparsity, [text for text in report.warnings if "were asked for" in text]


def test_rows_too_short_for_the_sparsity_are_named():
    reached, texts = warnings_of(0.115, "magnitude-row")  # 3 of 32 weights: 9.4 %
    assert reached < 0.115 - 0.005
    assert texts == [
        f"{reached:.2%} of the weights were pruned, 11.50% were asked for: each row loses a whole number of weights, "
        "rounded down"
    ]


@pytest.mark.parametrize(("sparsity", "method"), [(0.5, "magnitude-row"), (0.115, "magnitude")])
def test_a_sparsity_that_is_met_needs_no_word(sparsity, method):
    reached, texts = warnings_of(sparsity, method)
    assert reached == pytest.approx(sparsity, abs=0.005)
    assert not texts
