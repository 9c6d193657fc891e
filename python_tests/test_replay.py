"""The replay of blocks, one at a time, on recorded calls."""

import pytest
import tiny_models
import torch
from torch import nn

from pysparse.calib import (
    Batch,
    Replay,
    record_calls,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, *, scale=1.0):
        return (x + self.linear(x) * scale, "aux")


class Stack(nn.Module):
    """Blocks that return tuples, and a head; ``between`` may interfere."""

    def __init__(self, between=lambda self, index, x: x):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.between = between

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(self.between(self, index, x), scale=1.0 + index)[0]
        return self.head(x)

    def blocks(self):
        return [(f"layers.{index}", layer) for index, layer in enumerate(self.layers)]


@torch.no_grad()
def test_replay_gives_what_the_model_computes():
    model, x = Stack(), torch.randn(5, 3, 4)
    seen = []
    handles = [layer.register_forward_hook(lambda m, a, out: seen.append(out[0])) for layer in model.layers]
    model(x)
    for handle in handles:
        handle.remove()
    replay = Replay(model, model.blocks(), [Batch((part,), {}) for part in x.split(2)])
    for index in range(3):
        replay.forward(index, advance=False)  # looks, and moves nothing
        replay.forward(index, advance=True)
        torch.testing.assert_close(torch.cat([replay._hidden[number] for number in range(3)]), seen[index])
    assert all("forward" not in layer.__dict__ for layer in model.layers)


@torch.no_grad()
def test_replay_keeps_equal_arguments_once():
    model = tiny_models.tiny("llama", attn_implementation="eager")
    blocks = [(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)]
    rows = tiny_models.tokens(6, 8)
    replay = Replay(model, blocks, [Batch((), {"input_ids": part}) for part in rows.split(2)])
    masks = {id(call.kwargs["attention_mask"]) for calls in replay._calls for call in calls}
    rotations = {
        id(t) for calls in replay._calls for call in calls for t in call.kwargs["position_embeddings"]
    }
    assert replay._calls[0][0].kwargs["attention_mask"] is not None
    assert len(masks) == 1
    assert len(rotations) == 2


@torch.no_grad()
def test_each_blocks_own_arguments_are_recorded():
    model = tiny_models.tiny("gemma3", attn_implementation="eager")
    blocks = [(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)]
    calls = record_calls(model, blocks, Batch((), {"input_ids": tiny_models.tokens(1, 12)})).calls
    local, whole, again = (call.kwargs["attention_mask"] for call in calls)
    assert not torch.equal(local, whole)
    assert torch.equal(local, again)


def test_errors_of_the_model_pass_through():
    class Broken(Stack):
        def forward(self, x):
            self.layers[0](x)
            raise KeyError("the model's own")

    model = Broken()
    with pytest.raises(KeyError, match="the model's own"):
        record_calls(model, model.blocks(), Batch((torch.randn(1, 4),), {}))
    plain = Stack()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        record_calls(plain, plain.blocks(), Batch((torch.randn(1, 5),), {}))
    for one in (model, plain):
        assert all("forward" not in layer.__dict__ for layer in one.layers)


def test_models_that_cannot_be_replayed_are_refused():
    def skipping(self, x):
        return self.layers[0](x)

    def looping(self, x):
        return self.layers[0](self.layers[0](x)[0])

    x = torch.randn(2, 4)
    for forward, message in [
        (skipping, "ran without its block layers.1"),
        (looping, "calls its block layers.0 twice"),
    ]:
        model = type("Odd", (Stack,), {"forward": forward})()
        with pytest.raises(ValueError, match=message):
            record_calls(model, model.blocks(), Batch((x,), {}))
    model = Stack(between=lambda self, index, x: x * 2 if index == 2 else x)
    with pytest.raises(ValueError, match="changes the hidden states in front of layers.2"):
        record_calls(model, model.blocks(), Batch((x,), {}))


def test_a_previous_patch_of_forward_is_put_back():
    model = Stack()
    own = model.layers[1].forward
    model.layers[1].forward = own
    record_calls(model, model.blocks(), Batch((torch.randn(1, 4),), {}))
    assert model.layers[1].__dict__["forward"] is own
