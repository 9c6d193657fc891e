"""Planners' settings: windows wider than any prompt, and values that are refused by name."""

import pytest
import torch

from pysparse.attention import AttentionInput
from pysparse.methods import StreamingAttention


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
