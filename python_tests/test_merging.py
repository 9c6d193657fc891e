"""merge_and_sparsify of adapters beyond the plain ones: what is merged whole, and what is refused before a change."""

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import pysparse
from pysparse.methods import recipe_for
from pysparse.models.discover import discover
from pysparse.pruning import run

# peft asks transformers for what the newest calls by another name
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed but the targeted layer"),
]
LAYERS = ["q_proj", "down_proj"]
TOKENS = torch.arange(16)[None]


def wrapped(dtype=torch.float32, fill=None, tied=False, **config):
    sizes = {"vocab_size": 64, "max_position_embeddings": 32, "tie_word_embeddings": tied}
    model = tiny_models.tiny("llama", **sizes).to(dtype)
    run(discover(model), recipe_for("magnitude"), 0.5)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **config}
    adapted = get_peft_model(model, LoraConfig(**settings)).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
            nn.init.normal_(parameter, std=0.3) if fill is None else nn.init.constant_(parameter, fill)
    return adapted


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def refused(model, mode, message):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        pysparse.merge_and_sparsify(model, mode)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("mode", ["mask", "reprune"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "q_proj: adapter 'default' is DoraLinear, which is more than W"),
        ({"lora_bias": True}, "q_proj: adapter 'default' is LoRA with lora_bias=True"),
        ({"target_modules": [*LAYERS, "embed_tokens"]}, "embed_tokens: adapter 'default' is LoRA of an embedding"),
    ],
    ids=["dora", "bias", "embedding"],
)  # fmt: skip
def test_what_no_sum_of_weights_holds_is_refused_before_a_change(mode, config, message):
    refused(wrapped(**config), mode, message)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"lora_bias": True}, {"target_modules": [*LAYERS, "embed_tokens"]}],
    ids=["dora", "bias", "embedding"],
)  # fmt: skip
def test_keep_needs_no_merge_and_takes_them_all(config):
    model = wrapped(**config)
    with torch.no_grad():
        expected = model(TOKENS).logits
        kept = pysparse.merge_and_sparsify(model, "keep")
        torch.testing.assert_close(kept(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["mask", "reprune"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_of_a_tied_head_is_refused(mode):
    model = wrapped(tied=True, target_modules=[*LAYERS, "lm_head"])
    refused(model, mode, "lm_head: its weight is that of model.embed_tokens and lm_head")


def test_what_keep_returns_comes_back_from_its_base_and_its_adapter(tmp_path):
    model = tiny_models.tiny("llama", vocab_size=64, max_position_embeddings=32)
    run(discover(model), recipe_for("magnitude"), 0.5)
    pysparse.save_pretrained(model, tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    base = pysparse.from_pretrained(tmp_path / "base", format="dense")
    loaded = pysparse.merge_and_sparsify(PeftModel.from_pretrained(base, tmp_path / "adapter"), "keep")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, adapted(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["mask", "reprune"])
def test_a_sum_that_its_dtype_cannot_hold_is_refused(mode):
    refused(
        wrapped(torch.float16, fill=300.0),
        mode,
        "q_proj: weight plus adapter is not finite in float16, .*65504",
    )


@pytest.mark.parametrize("mode", ["mask", "reprune"])
@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 5]}], ids=["whole", "tokens"]
)
def test_what_was_trained_whole_stays_and_the_result_saves(mode, config, tmp_path):
    model = wrapped(**config)
    expected = {
        name: next(one.detach().clone() for name_, one in model.named_parameters() if name in name_)
        for name in ("modules_to_save", "trainable_tokens_delta")
        if any(name in name_ for name_, _ in model.named_parameters())
    }
    merged = pysparse.merge_and_sparsify(model, mode)
    assert not any("peft" in type(module).__module__ for module in merged.modules())
    if "modules_to_save" in expected:
        assert torch.equal(merged.lm_head.weight, expected["modules_to_save"])
    else:
        rows = merged.get_input_embeddings().weight[[1, 5]]
        torch.testing.assert_close(rows, expected["trainable_tokens_delta"], rtol=0, atol=0)
    pysparse.save_pretrained(merged, tmp_path / "merged")
    loaded = pysparse.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, merged(TOKENS).logits)


def test_trained_tokens_that_are_not_finite_are_refused():
    model = wrapped(trainable_token_indices=[1, 5])
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            nn.init.constant_(parameter, float("inf"))
    refused(model, "mask", "trained token embeddings of adapter 'default' are not finite")


def test_reprune_merges_a_dense_head_whole_and_refuses_one_with_zeros():
    model = wrapped(target_modules=[*LAYERS, "lm_head"])
    head = model.get_base_model().lm_head
    whole = (head.get_base_layer().weight + head.get_delta_weight("default")).detach()
    merged = pysparse.merge_and_sparsify(model, "reprune", sparsify=False)
    torch.testing.assert_close(merged.lm_head.weight, whole)
    assert int((merged.model.layers[0].self_attn.q_proj.weight == 0).sum()) == 32 * 32 // 2
    model = wrapped(target_modules=[*LAYERS, "lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.get_base_layer().weight[:16] = 0
    refused(model, "reprune", "prunes layers of blocks, and lm_head, 25.0% zeros, is none: use mode=")
