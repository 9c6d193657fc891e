"""prepare_decoding_: one switch, and what it leaves as it was."""

import pytest
import tiny_models
import torch
from torch import nn
from transformers.models.llama import modeling_llama

import pysparse
from pysparse import backend
from pysparse.nn import unfuse_rotary_

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)


@pytest.fixture
def llama():
    model = tiny_models.tiny("llama")
    yield model
    unfuse_rotary_(model)


@torch.no_grad()
def test_a_prepared_model_generates_the_same_tokens(llama):
    prompt = tiny_models.tokens(1, 7)
    expected = llama.generate(prompt, max_new_tokens=6, do_sample=False)
    logits = llama(prompt).logits
    report = pysparse.prepare_decoding_(llama)
    assert report.attention == "pysparse_flash"
    assert len(report.norms) == 2 * llama.config.num_hidden_layers + 1
    assert set(report.norms.values()) == {"rounded"}
    assert report.rotary == (modeling_llama.__name__,)
    assert torch.equal(llama.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    torch.testing.assert_close(llama(prompt).logits, logits)
    assert pysparse.prepare_decoding_(llama) == report


def test_a_planner_that_was_chosen_stays(llama):
    llama.set_attn_implementation("pysparse_anchor")
    assert pysparse.prepare_decoding_(llama).attention == "pysparse_anchor"
    assert llama.config._attn_implementation == "pysparse_anchor"


def test_a_model_without_such_parts_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    report = pysparse.prepare_decoding_(model)
    assert (report.attention, report.norms, report.rotary) == ("", {}, ())
