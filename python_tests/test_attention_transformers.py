"""The attention plug-in inside transformers' own models: the same answers as eager attention, whatever the batch."""

import copy
import logging

import forked
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import pysparse
from pysparse.attention.exact import one_row_attention
from pysparse.attention.log import TOTAL
from pysparse.huggingface.attention_mask import extent_mask, unpack_extent
from pysparse.methods import AnchorAttention, ProxyAttention

SIZE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZE),
    "qwen2": lambda: Qwen2Config(**SIZE),
    "mistral-window": lambda: MistralConfig(**SIZE, sliding_window=12),
    "gemma2-softcap": lambda: Gemma2Config(**SIZE, sliding_window=12, query_pre_attn_scalar=16),
    "gpt-oss-sinks": lambda: GptOssConfig(
        **SIZE, sliding_window=12, num_local_experts=2, num_experts_per_tok=1
    ),
}
PLANS = {
    "anchor": AnchorAttention(theta=-0.05, group_size=16, init=16, local=0, step=4),
    "proxy": ProxyAttention(gamma=0.5, block=16, minimum=16),
}


def tiny(name, attention="eager", dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().to(dtype)
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="module")
def pairs():
    return {name: (tiny(name), tiny(name, "pysparse_flash")) for name in CONFIGS}


def tokens(rows=2, length=45):
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def padded(side):
    mask = torch.ones(2, 45, dtype=torch.int64)
    mask[1, :9] = side != "left"
    mask[1, 36:] = side != "right"
    return mask


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_logits_are_eager_attention(pairs, name, side):
    eager, ours = pairs[name]
    mask = padded(side)
    expected = eager(tokens(), attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(
        ours(tokens(), attention_mask=mask).logits[mask.bool()], expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "how",
    [{}, {"prefill_chunk_size": 16}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["dynamic", "chunked", "static"],
)
@torch.no_grad()
def test_generate_is_eager_attention(pairs, name, how):
    eager, ours = pairs[name]
    call = dict(attention_mask=padded("left"), max_new_tokens=4, do_sample=False)
    assert torch.equal(ours.generate(tokens(), **call, **how), eager.generate(tokens(), **call))


@torch.no_grad()
def test_a_second_turn_continues_the_cache(pairs):
    eager, ours = pairs["llama"]
    first, second = tokens(), tokens(length=20)
    expected = eager(torch.cat([first, second], 1)).logits[:, 45:]
    start = ours(first)
    name = "cache" if "cache" in start else "past_key_values"  # releases differ
    got = ours(second, **{name: start[name]}).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_between_tokens_goes_to_torch_and_is_said(pairs):
    eager, ours = pairs["llama"]
    mask = torch.ones(2, 45, dtype=torch.int64)
    mask[1, 10:15] = 0
    with pysparse.attention_options() as log:
        got = ours(tokens(), attention_mask=mask).logits
    keep = mask.bool()
    torch.testing.assert_close(
        got[keep], eager(tokens(), attention_mask=mask).logits[keep], atol=1e-4, rtol=1e-4
    )
    assert log.fallbacks == {"mask is more than causal and padding": 2}


@torch.no_grad()
def test_packed_sequences_go_to_torch(pairs):
    eager, ours = pairs["llama"]
    positions = torch.cat([torch.arange(20), torch.arange(25)]).unsqueeze(0)
    call = dict(position_ids=positions, use_cache=False)
    got, expected = (model(tokens(1), **call).logits for model in (ours, eager))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_torch(pairs):
    eager, ours = pairs["llama"]
    grads = []
    for model in (eager, ours):
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_what_goes_to_torch_is_logged_once_and_counted(caplog):
    TOTAL.tallies.clear()
    model = tiny("gemma2-softcap", "pysparse_anchor")
    with caplog.at_level(logging.WARNING, logger="pysparse"), pysparse.attention_options(min_length=0) as log:
        model(tokens())
        model(tokens())
    assert caplog.text.count("soft-capped logits") == 1
    assert log.fallbacks == {"soft-capped logits": 4}
    with pysparse.attention_options(min_length=0) as log:
        tiny("llama", "pysparse_anchor", torch.float16)(tokens())
    assert log.fallbacks == {"dtype float16": 2}


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_a_planned_model_reports_density_and_recall(plan):
    model = tiny("llama", f"pysparse_{plan}")
    with pysparse.attention_options(
        PLANS[plan], min_length=0, max_density=1.0, sample_rows=8, profile=True
    ) as log:
        model(tokens(), attention_mask=padded("left"))
    total = log.total("sparse")
    assert total.calls == 2
    assert 0 < total.density < 1
    assert 0 < total.recall <= 1 + 1e-4
    assert total.rows == 2 * (45 + 36)
    assert {row["layer"] for row in log.rows()} == {0, 1}
    assert "sparse" in str(log)


@torch.no_grad()
def test_a_plan_that_keeps_everything_is_eager_attention(pairs):
    eager, _ = pairs["llama"]
    model = tiny("llama", "pysparse_anchor")
    widest = AnchorAttention(theta=float("inf"), group_size=16, init=16, local=0, step=4)
    for mask in (padded("left"), padded("right")):
        with pysparse.attention_options(widest, min_length=0, max_density=1.0) as log:
            got = model(tokens(), attention_mask=mask).logits
        expected = eager(tokens(), attention_mask=mask).logits
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
        assert log.total("sparse").density == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "shared", "keys"), [(4, 4, 1), (4, 2, 37), (6, 1, 300)])
def test_a_decoding_step_is_the_softmax_product(dtype, heads, shared, keys):
    query, key, value = (torch.randn(2, n, m, d).to(dtype) for n, m, d in
                         ((heads, 1, 16), (shared, keys, 16), (shared, keys, 8)))  # fmt: skip
    value = value.transpose(2, 3).contiguous().transpose(2, 3)  # as a cache may lie
    groups = heads // shared
    wide = [part.double().repeat_interleave(groups, dim=1) for part in (key, value)]
    weights = torch.softmax(query.double() @ wide[0].transpose(2, 3) * 0.3, dim=-1)
    expected = (weights @ wide[1]).transpose(1, 2)
    actual = one_row_attention(query, key, value, 0.3)
    assert actual.shape == (2, 1, heads, 8)
    # a few roundings of logits up to 16 in size, of weights, and of the result
    epsilon = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
    assert (actual.double() - expected).abs().max() <= 32 * epsilon * value.abs().max().item()


@torch.no_grad()
def test_short_prompts_and_chosen_layers_are_exact():
    model = tiny("llama", "pysparse_anchor")
    with pysparse.attention_options() as log:
        model.generate(tokens(), max_new_tokens=3, do_sample=False)
    assert log.fallbacks == {"fewer than 2304 keys": 2, "decoding step": 4}
    with pysparse.attention_options(PLANS["anchor"], min_length=0, max_density=1.0, dense_layers=(1,)) as log:
        model(tokens())
    assert log.fallbacks == {"layer in dense_layers": 1}
    assert log.total("sparse").calls == 1
    with pysparse.attention_options(PLANS["proxy"], min_length=0, max_density=0.1) as log:
        model(tokens())
    assert log.fallbacks == {"density above 0.10": 2}


@torch.no_grad()
def test_use_attention_sets_a_model_for_good():
    model = tiny("llama")
    pysparse.use_attention(model, PLANS["anchor"], min_length=0, max_density=1.0)
    with pysparse.attention_options(min_length=10**6) as log:
        model(tokens())
    assert log.fallbacks == {"fewer than 1000000 keys": 2}
    before = TOTAL.total("sparse").calls
    model(tokens())
    assert TOTAL.total("sparse").calls == before + 2
    with pytest.raises(ValueError, match="Linear has no attention layers"):
        pysparse.use_attention(torch.nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own use of it
@torch.no_grad()
def test_a_compiled_model_is_one_graph_and_counts():
    model = tiny("llama", "pysparse_anchor")
    compiled = torch.compile(model, fullgraph=True)
    mask = padded("left")
    with pysparse.attention_options(PLANS["anchor"], min_length=0, max_density=1.0) as log:
        got = compiled(tokens(), attention_mask=mask).logits
        expected = model(tokens(), attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    assert log.total("sparse").calls == 4
    mask[1, 20:25] = 0
    with pytest.raises(ValueError, match="padding between its tokens"):
        compiled(tokens(), attention_mask=mask)


def test_the_extent_of_a_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    extent = extent_mask(2, 6, 8, attention_mask=mask)
    assert extent.shape == (2, 1, 6, 4)
    for row in range(6):
        assert extent[:, 0, row].tolist() == [[2, 6, row, 0], [0, 4, row, 0]]
    assert unpack_extent(extent, 6)[1:] == (0, None)
    assert unpack_extent(extent[:, :, -2:], 2)[1:] == (4, None)  # a model that goes on with the last rows
    for wrong, rows in ((extent, 1), (extent[:, :, [0, 2]], 2), (extent[:, :, :3], 6)):
        with pytest.raises(ValueError, match="rows of a prompt must follow one another"):
            unpack_extent(wrong, rows)
    later = extent_mask(1, 3, 9, q_offset=torch.tensor(4))
    assert later[0, 0].tolist() == [[0, 9, row, 0] for row in (4, 5, 6)]
    assert extent_mask(1, 1, 9, q_offset=8) is None  # a decoding step sees every key
    other = extent_mask(1, 4, 4, mask_function=lambda b, h, q, k: k >= q, dtype=torch.bfloat16)
    assert other.dtype == torch.bfloat16
    assert torch.equal(other[0, 0] == 0, torch.ones(4, 4).triu().bool())


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_a_model_that_drops_rows_of_a_prompt_midway(side):
    """Gemma 4's last layers share keys and see only the rows whose logits are wanted: it slices the mask."""
    shape = {**SIZE, "num_hidden_layers": 4, "max_position_embeddings": 256}
    config = transformers.Gemma4TextConfig(
        **shape, num_kv_shared_layers=2, sliding_window=12, global_head_dim=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    eager = transformers.Gemma4ForCausalLM(config).eval()
    for parameter in eager.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation("pysparse_flash")
    given = dict(input_ids=tokens(), attention_mask=padded(side))
    for keep in (1, 3):
        torch.testing.assert_close(
            ours(**given, logits_to_keep=keep).logits,
            eager(**given, logits_to_keep=keep).logits,
            atol=1e-3,
            rtol=1e-3,
        )
    how = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(**given, **how), eager.generate(**given, **how))


def test_registration_waits_for_the_model_code():
    code = (
        "import sys, pysparse\n"
        "assert 'pysparse.huggingface.attention' not in sys.modules\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "for known in (AttentionInterface(), AttentionMaskInterface()):\n"
        "    assert {'pysparse_flash', 'pysparse_anchor', 'pysparse_proxy'} <= set(known)\n"
        "from transformers.utils.generic import is_flash_attention_requested as asks\n"
        "assert asks(requested_attention_implementation='flash_attention_2')\n"
        "assert not asks(requested_attention_implementation='pysparse_flash')\n"
    )
    result = forked.run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"planner": "ancor"}, "did you mean 'anchor'"),
        ({"min_length": -1}, "min_length=-1"),
        ({"max_density": 1.5}, "max_density=1.5"),
        ({"sample_rows": -2}, "sample_rows=-2"),
    ],
)
def test_wrong_options_name_the_value(options, match):
    with pytest.raises(ValueError, match=match), pysparse.attention_options(**options):
        pass
