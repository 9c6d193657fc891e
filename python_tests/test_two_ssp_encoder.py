"""2SSP of an encoder whose attention cannot go: widths can, and a refusal leaves nothing behind."""

import pytest
import tiny_models

import pysparse


def prune(method, place):
    texts = tiny_models.tokens(6, 12)
    return pysparse.prune(
        tiny_models.tiny("bert"), 0.2, method, calibration=texts, output_dir=place, progress=False
    )


def test_the_neurons_of_an_encoder_are_cut(tmp_path):
    report = prune("2ssp-width", tmp_path / "small").report
    assert report.sparsity == pytest.approx(0.2, abs=0.02)
    assert all(block.attention and block.width < block.width_before for block in report.blocks)
    assert (tmp_path / "small" / "config.json").is_file()


def test_a_refusal_leaves_no_progress_in_the_way(tmp_path):
    with pytest.raises(ValueError, match="cannot be removed"):
        prune("2ssp:n_attn=1", tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
    prune("2ssp-width", tmp_path / "small")
