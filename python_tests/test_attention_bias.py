"""Models that add a bias of positions to their logits (T5 and its kin): never lost, by whichever way a call goes."""

import copy

import pytest
import torch
from transformers import (
    LongT5Config,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import pysparse
from pysparse.attention.exact import Shape, exact_attention
from pysparse.huggingface.attention import attention_forward

SIZE = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
    decoder_start_token_id=0,
)  # fmt: skip
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**SIZE)),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**SIZE)),
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(**SIZE)),
    "longt5": lambda: LongT5ForConditionalGeneration(LongT5Config(**SIZE, local_radius=7)),
    "switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            **SIZE, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
        )
    ),
}


def tiny(name):
    """Return a model whose biases decide, as trained ones do."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for path, parameter in model.named_parameters():
        if "relative_attention_bias" in path:
            parameter.data = torch.randn_like(parameter) * 3
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 21), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :11]}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "prepare", [lambda m: m.set_attn_implementation("pysparse_flash"), pysparse.prepare_decoding_]
)
@torch.no_grad()
def test_logits_are_those_of_eager_attention(name, prepare):
    model = tiny(name)
    ours = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    prepare(ours)
    without = copy.deepcopy(ours)
    for path, parameter in without.named_parameters():
        if "relative_attention_bias" in path:
            parameter.zero_()
    expected = model(**inputs()).logits
    torch.testing.assert_close(ours(**inputs()).logits, expected, atol=1e-4, rtol=1e-4)
    assert (without(**inputs()).logits - expected).abs().max() > 0.01  # the test would see a lost bias


@pytest.mark.parametrize("name", ["t5", "umt5"])
@torch.no_grad()
def test_each_generated_step_has_eager_attentions_logits(name):
    model = tiny(name)
    ours = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    pysparse.prepare_decoding_(ours)
    given = {k: v for k, v in inputs().items() if k != "decoder_input_ids"}
    how = dict(
        max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    expected, actual = model.generate(**given, **how), ours.generate(**given, **how)
    assert torch.equal(actual.sequences, expected.sequences)
    for one, other in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_bias():
    model = tiny("t5")
    ours = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    ours.set_attn_implementation("pysparse_flash")
    grads = []
    for one in (model, ours):
        one(**inputs(), labels=None).logits.square().mean().backward()
        grads.append(one.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-3)
    assert grads[0].abs().max() > 1e-6


@torch.no_grad()
def test_a_compiled_model_keeps_the_bias():
    model = tiny("t5")
    model.set_attn_implementation("pysparse_flash")
    expected = model(**inputs()).logits
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(**inputs()).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bias_with_softcap_window_and_sinks_is_the_formula():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 700, 8, generator=generator) for _ in range(3))
    bias, sinks = torch.randn(1, 2, 700, 700, generator=generator), torch.randn(2, generator=generator)
    row, column = torch.arange(700)[:, None], torch.arange(700)
    seen = (column <= row) & (column > row - 90)
    logits = 5.0 * torch.tanh(q @ k.mT * 0.3 / 5.0) + bias
    logits = torch.cat(
        [logits.masked_fill(~seen, -torch.inf), sinks.view(1, 2, 1, 1).expand(1, 2, 700, 1)], dim=-1
    )
    expected = logits.softmax(-1)[..., :-1] @ v
    actual = exact_attention(q, k, v, Shape(0.3, window=90, softcap=5.0, sinks=sinks, bias=bias))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_arguments_that_choose_keys_are_not_ignored(name):
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=f"depends on {name}, which pysparse's does not know"):
        attention_forward(torch.nn.Module(), x, x, x, None, **{name: torch.zeros(1)})
