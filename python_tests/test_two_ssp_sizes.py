"""2SSP's closed form: how the budget is split between neurons and attention modules."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from pysparse.measure import torch_threads
from pysparse.models.anatomy import anatomy_of
from pysparse.pruning.split import Sizes, balanced_widths, split


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


# d, k/v width, FFN neurons, blocks, biases of an attention -> (N_attn, K) at 25, 37.5 and 50 %
PUBLISHED = {
    "llama-2-7b": (LlamaConfig, (4096, 32, 32, 11008, 32), [(5, 7744), (9, 6368), (13, 4992)]),
    "mistral-7b": (MistralConfig, (4096, 32, 8, 14336, 32), [(1, 10005), (2, 7893), (5, 5994)]),
    "qwen2.5-7b": (Qwen2Config, (3584, 28, 4, 18944, 28), [(0, 13525), (0, 10816), (1, 8204)]),
    "phi-3-14b": (Phi3Config, (5120, 40, 10, 17920, 40), [(1, 12480), (3, 9920), (6, 7466)]),
}
MODELS = {LlamaConfig: "LlamaForCausalLM", MistralConfig: "MistralForCausalLM", Qwen2Config: "Qwen2ForCausalLM",
          Phi3Config: "Phi3ForCausalLM"}  # fmt: skip


def published(name):
    """The sizes of a published shape, counted on the modules of two of its blocks."""
    import transformers

    config_class, (hidden, heads, kv_heads, width, blocks), expected = PUBLISHED[name]
    config = config_class(
        vocab_size=64, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=width, num_hidden_layers=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        sizes = anatomy_of(getattr(transformers, MODELS[config_class])._from_config(config)).sizes
    return dataclasses.replace(sizes, blocks=blocks, main=sizes.main // 2 * blocks), expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_split_of_published_shapes(name):
    sizes, expected = published(name)
    found = [split(sizes, sparsity) for sparsity in (0.25, 0.375, 0.5)]
    assert [(one.n_attn, one.widths) for one in found] == [(n, (k,) * sizes.blocks) for n, k in expected]
    rounding = sizes.blocks * sizes.neuron / (2 * sizes.main) + sizes.blocks / sizes.main
    for sparsity, one in zip((0.25, 0.375, 0.5), found, strict=True):
        assert abs(one.achieved - sparsity) <= rounding < 1e-4


def test_llama_2_has_the_published_parameters_and_rates():
    sizes, _ = published("llama-2-7b")
    assert (sizes.attention, sizes.ffn) == (67_108_864, 135_266_304)
    assert round(sizes.ratio, 4) == 2.0156
    rates = [split(sizes, sparsity).achieved for sparsity in (0.25, 0.375, 0.5)]
    assert [round(rate, 5) for rate in rates] == [0.24999, 0.37498, 0.49998]


def test_widths_are_multiples_and_the_rate_is_met_in_all():
    sizes, _ = published("mistral-7b")
    for sparsity in (0.25, 0.375, 0.5):
        one = split(sizes, sparsity, multiple_of=128)
        assert {width % 128 for width in one.widths} == {0}
        assert max(one.widths) - min(one.widths) in (0, 128)
        assert abs(one.achieved - sparsity) <= 128 * sizes.neuron / (2 * sizes.main) + 3e-5
    assert balanced_widths(dataclasses.replace(sizes, blocks=4, width=40), 3, 16) == (16,) * 4  # never none


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_attn": 33}, "n_attn=33 is outside .0, 32."),
        (
            {"n_attn": 32, "sparsity": 0.1},
            "sparsity=0.1 cannot be met: 32 attention modules alone are 33.16%",
        ),
        ({"n_attn": 0, "sparsity": 0.9}, "sparsity=0.9 cannot be met: without 0 attention modules"),
        ({"widths": (1,)}, "widths has 1 entries, the model 32 blocks"),
        ({"widths": (11009,) * 32}, r"widths\[0\]=11009 is outside \[1, 11008\]"),
        ({"widths": (5,) * 32, "multiple_of": 2}, "no multiple of multiple_of=2"),
        ({"multiple_of": 0}, "multiple_of=0 is outside"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    sizes = Sizes(32, 32 * (67_108_864 + 135_266_304 + 8192), 67_108_864, 135_266_304, 11008, 3 * 4096)
    with pytest.raises(ValueError, match=message):
        split(sizes, settings.pop("sparsity", 0.25), **settings)
