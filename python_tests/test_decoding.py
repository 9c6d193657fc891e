"""prepare_decoding_: one switch, and what it leaves as it was."""

import copy
import pickle

import pytest
import tiny_models
import torch
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama

import pysparse
from pysparse import backend
from pysparse.huggingface.cache import RoomyLayer, make_room_
from pysparse.nn import fuse_, fuse_norms_, fuse_rotary_, unfuse_rotary_

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
    assert report.cache
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
    assert (report.attention, report.norms, report.rotary, report.cache) == ("", {}, (), False)


def step(rows=2, tokens=1, dtype=torch.float32, seed=0):
    """Keys and values of some tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, tokens, 8, generator=generator).to(dtype) for _ in "kv"]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def append_both(layers, *state):
    results = [layer.update(*state) for layer in layers]
    assert_same(*results)
    return results[0]


@pytest.fixture
def layers():
    """Two layers with the same prompt, the first with room."""
    pair = RoomyLayer(), DynamicLayer()
    append_both(pair, *step(tokens=5))
    return pair


def test_tokens_are_written_in_place_until_the_room_is_full(layers):
    places, held = set(), []
    for seed in range(150):
        held.append((append_both(layers, *step(seed=seed)), seed))
        places.add(layers[0].keys.data_ptr())
    assert len(places) == 3  # room for 64 tokens, twice, and once more
    keys, values = held[10][0]
    assert_same((keys[:, :, -1:], values[:, :, -1:]), step(seed=10))
    assert keys.shape[2] == 16


@pytest.mark.parametrize("change", [
    lambda layer: layer.crop(-2),
    lambda layer: layer.batch_repeat_interleave(2),
    lambda layer: layer.batch_select_indices(torch.tensor([1])),
    lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    lambda layer: layer.update(*step(rows=2, tokens=3, seed=7)),
    lambda layer: setattr(layer, "keys", layer.keys.clone()),
    lambda layer: layer.reset(),
])  # fmt: skip
def test_what_else_happens_to_a_cache(layers, change):
    append_both(layers, *step(seed=1))
    before = layers[0].keys
    kept = before.clone()
    for layer in layers:
        change(layer)
    rows = len(layers[1].keys) if layers[1].keys is not None else 2
    for seed in (2, 3):
        append_both(layers, *step(rows=rows, seed=seed))
    assert torch.equal(before, kept)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_copies_go_their_own_ways(layers, copied):
    append_both(layers, *step(seed=1))
    others = [copied(layer) for layer in layers]
    append_both(others, *step(seed=2))
    append_both(layers, *step(seed=3))
    assert_same((others[0].keys, others[0].values), (others[1].keys, others[1].values))


def test_gradients_other_dtypes_and_inference_mode(layers):
    keys, values = step(seed=1)
    with torch.inference_mode():
        append_both(layers, keys, values)
    append_both(layers, keys, values)
    append_both(layers, keys.requires_grad_(), values)
    layers[0].keys.sum().backward()
    assert keys.grad.eq(1).all()
    append_both(layers, *step(dtype=torch.float64, seed=2))


@torch.no_grad()
def test_a_long_generation_keeps_its_tokens(llama):
    prompt = tiny_models.tokens(2, 3)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "return_dict_in_generate": True}
    expected = (
        llama.generate(prompt, num_beams=2, **settings),
        llama.generate(prompt, do_sample=False, **settings),
    )
    assert make_room_(llama)
    actual = (
        llama.generate(prompt, num_beams=2, **settings),
        llama.generate(prompt, do_sample=False, **settings),
    )
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.sequences, other.sequences)
    cache = actual[1].past_key_values
    assert all(type(layer) is RoomyLayer for layer in cache.layers)
    assert cache.get_seq_length() == 42


@pytest.mark.parametrize(
    "prepare", [pysparse.prepare_decoding_, pysparse.sparsify_, fuse_, fuse_norms_, fuse_rotary_]
)
@pytest.mark.parametrize("other", [None, "a/path", 3])
def test_what_is_no_module_is_refused(prepare, other):
    with pytest.raises(TypeError, match=f"model is a {type(other).__name__}, not a torch.nn.Module"):
        prepare(other)
