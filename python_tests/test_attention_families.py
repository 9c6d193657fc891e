"""Families whose attention or masks are not like the others': eager attention's answers, or a clear refusal."""

import copy

import pytest
import torch
import transformers as hf

import pysparse
from pysparse.huggingface.attention import unknown_arguments, use_attention

IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **IDS
)
WIDE = dict(
    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, **IDS,
)  # fmt: skip
MODELS = {
    "splinter": lambda: hf.SplinterModel(
        hf.SplinterConfig(**SIZE)
    ),  # no mask without padding, and not causal
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**SIZE)),  # attention of its own, which adds its mask
    "xglm": lambda: hf.XGLMForCausalLM(
        hf.XGLMConfig(vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, **IDS)
    ),
    "bigbird-pegasus": lambda: hf.BigBirdPegasusForConditionalGeneration(hf.BigBirdPegasusConfig(**WIDE)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE)),
}


def loud(model):
    """Return ``model`` with weights that let nothing be overlooked."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def answers(model, ids, mask):
    given = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :5]
    out = model(**given)
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return out if model.config.is_encoder_decoder else out[mask.bool()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [3, 4, 15])
@pytest.mark.parametrize("holes", ["none", "left", "middle"])
@torch.no_grad()
def test_answers_are_those_of_eager_attention(name, length, holes, tmp_path):
    torch.manual_seed(1)
    eager = loud(MODELS[name]())
    eager.save_pretrained(tmp_path)
    loaded = type(eager).from_pretrained(tmp_path, attn_implementation="pysparse_flash").eval()
    eager.set_attn_implementation("eager")
    prepared = copy.deepcopy(eager)
    pysparse.prepare_decoding_(prepared)
    ids, mask = torch.randint(3, 64, (2, length)), torch.ones(2, length, dtype=torch.int64)
    if holes != "none":
        mask[1, : length // 3] = 0
    if holes == "middle":
        mask[1] = mask[1].roll(length // 3)
    expected = answers(eager, ids, mask)
    for model in (loaded, prepared):
        torch.testing.assert_close(answers(model, ids, mask), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(hf, "DeepseekV32ForCausalLM"), reason="this transformers has no DeepSeek 3.2")
def test_what_chooses_keys_itself_keeps_its_own_attention():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE))
    assert unknown_arguments(model) == []
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

    layer = DeepseekV32Attention.__new__(DeepseekV32Attention)
    torch.nn.Module.__init__(layer)
    layer.layer_idx, layer.is_causal = 0, True
    model.model.layers[0].extra = layer
    assert unknown_arguments(model) == ["indices"]
    with pytest.raises(ValueError, match="depends on indices, which pysparse's does not know"):
        use_attention(model)
    assert pysparse.prepare_decoding_(model).attention == ""
    assert model.config._attn_implementation != "pysparse_flash"


def test_linear_layers_of_another_kind_are_reported():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    report = pysparse.sparsify_(model, min_sparsity=0.0)
    assert (
        report.dense["transformer.h.0.attn.c_attn"] == "Conv1D is not torch.nn.Linear itself: left as it is"
    )
    model = hf.FalconForCausalLM(hf.FalconConfig(**SIZE))
    report = pysparse.sparsify_(model, min_sparsity=0.0)
    assert any(
        reason.startswith("FalconLinear is not torch.nn.Linear itself") for reason in report.dense.values()
    )
