"""Planners' settings: windows wider than any prompt, and values that are refused by name."""

import pytest
import torch
from tiny_models import tiny

from pysparse.attention import AttentionInput, AttentionOptions
from pysparse.huggingface.attention import attention_options, use_attention
from pysparse.methods import (
    AnchorAttention,
    FlexPrefill,
    ProxyAttention,
    StreamingAttention,
    VerticalSlash,
    XAttention,
    planner_for,
)


def call(rows=40, keys=100):
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, size, 64, generator=make) for size in (rows, keys, keys))
    return AttentionInput.of(query, key, value)


@pytest.mark.parametrize("window", [100, 10**9, 10**30])
def test_a_window_beyond_the_prompt_computes_it_all(window):
    plan = StreamingAttention(sink=0, window=window, block=32).plan(call())
    assert plan.density(call()) == 1.0


@pytest.mark.parametrize(("window", "blocks"), [(0, 1), (1, 2), (32, 2), (33, 3)])
def test_a_window_reaches_back_in_whole_blocks(window, blocks):
    kept = StreamingAttention(sink=0, window=window, block=32).plan(call(128, 128)).blocks.to_mask()
    assert kept[0, 0].sum(1).tolist() == [min(blocks, row + 1) for row in range(4)]


@pytest.mark.parametrize("kind", [StreamingAttention, VerticalSlash, FlexPrefill, ProxyAttention, XAttention])
@pytest.mark.parametrize("block", [0, -1, 24.0, 17])
def test_a_block_that_lists_cannot_have_is_refused(kind, block):
    with pytest.raises(ValueError, match=f"block={block}"):
        kind(block=block)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (StreamingAttention, {"sink": 10.5}), (StreamingAttention, {"window": -1}), (VerticalSlash, {"slash": 0.5}),
        (VerticalSlash, {"probe": 0}), (FlexPrefill, {"minimum": -1}), (FlexPrefill, {"tau": float("nan")}),
        (ProxyAttention, {"proxies": 1.5}), (ProxyAttention, {"stride": 0}), (XAttention, {"stride": 2.0}),
        (AnchorAttention, {"init": 16.0}), (AttentionOptions, {"sample_rows": 1.5}),
        (AttentionOptions, {"min_length": 0.5}),
    ],
)  # fmt: skip
def test_settings_are_refused_by_name(kind, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        kind(**settings)


@pytest.mark.parametrize("layer", [-1, 0.5])
def test_dense_layers_are_whole_numbers(layer):
    with pytest.raises(ValueError, match=f"dense_layers={layer}"):
        AttentionOptions(dense_layers=(layer,))


@pytest.mark.parametrize("value", [object(), 3, StreamingAttention])
def test_what_is_no_planner_is_refused_at_once(value):
    model = tiny()
    before = model.config._attn_implementation
    for refuse in (planner_for, AttentionOptions, lambda planner: use_attention(model, planner)):
        with pytest.raises(ValueError, match="is no planner"):
            refuse(value)
    with pytest.raises(ValueError, match="is no planner"), attention_options(value):
        pass
    assert model.config._attn_implementation == before


def test_dense_layers_are_layers_of_the_model():
    model = tiny()
    last = model.config.num_hidden_layers - 1
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=rf"dense_layers=\[99\]: attention layers are 0 to {last}"):
        use_attention(model, "streaming", dense_layers=(0, 99))
    assert model.config._attn_implementation == before
    use_attention(model, "streaming", dense_layers=(0, last))


def test_a_prompt_of_two_tokens_says_that_it_is_short():
    model = tiny()
    use_attention(model, "streaming", min_length=0)
    with torch.no_grad(), attention_options("streaming", min_length=0) as log:
        model(torch.tensor([[1, 2]]), use_cache=False)
    assert "fewer than 4 keys" in str(log)
    assert "more than causal" not in str(log)
