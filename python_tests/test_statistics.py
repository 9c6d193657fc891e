"""Streaming statistics of inputs, and the collector that shares them."""

import pytest
import torch
from torch import nn

from pysparse.calib import (
    Collector,
    Gram,
    SquaredNorm,
    Watched,
)
from pysparse.measure import torch_threads


def norms(batches, sequences, channels):
    """The statistic of ``batches`` of hidden states [B, T, C]."""
    statistic = SquaredNorm(channels, torch.device("cpu"))
    for batch in batches:
        rows = batch.reshape(-1, channels)
        statistic.add(statistic.measure(rows), len(rows))
    return statistic.value(sequences)


def test_squared_norm_is_the_mean_over_sequences_not_tokens():
    hidden = torch.randn(5, 7, 3)
    expected = hidden.double().square().sum(dim=(0, 1)) / 5
    q = norms([hidden], 5, 3)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.double(), expected, rtol=1e-6, atol=0)


def test_squared_norm_does_not_see_batches_nor_order():
    hidden = torch.randn(128, 9, 16) * torch.logspace(-3, 3, 16)
    whole = norms([hidden], 128, 16)
    for split in (1, 2, 17):
        torch.testing.assert_close(norms(hidden.split(split), 128, 16), whole, rtol=1e-6, atol=0)
    shuffled = hidden.reshape(-1, 16)[torch.randperm(128 * 9)]
    torch.testing.assert_close(norms([shuffled], 128, 16), whole, rtol=1e-6, atol=0)


def test_squared_norm_of_half_precision_is_summed_wide():
    hidden = torch.full((1, 5000, 2), 300.0, dtype=torch.float16)  # one square overflows float16
    torch.testing.assert_close(norms([hidden], 1, 2), torch.full((2,), 5000 * 9e4), rtol=1e-6, atol=0)


def test_squared_norm_is_the_same_on_one_thread_and_two():
    rows = torch.randn(3000, 257)
    statistic = SquaredNorm(257, torch.device("cpu"))
    with torch_threads(1):
        one = statistic.measure(rows)
    with torch_threads(2):
        assert torch.equal(statistic.measure(rows), one)


def test_a_layer_without_tokens_treats_its_inputs_alike():
    assert torch.equal(SquaredNorm(4, torch.device("cpu")).value(3), torch.ones(4))


class Attention(nn.Module):
    """Three projections of one tensor, and one of another, called by keyword."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x):
        return self.o(input=self.q(x) + self.k(x) + self.v(x))


def collector_of(module):
    watched = {path: Watched(layer, 4, torch.device("cpu")) for path, layer in module.named_children()}
    return Collector(watched, ("squared_norm",))


def test_collector_measures_every_layer_and_leaves_no_hook():
    module, x = Attention(), torch.randn(2, 3, 4)
    collector = collector_of(module)
    with torch.no_grad(), collector.watching():
        module(x)
        module(2 * x)
    module(100 * x)  # after the watch
    q = {path: collector.values(path, 4)[0]["squared_norm"] for path in ("q", "k", "v", "o")}
    expected = 5 * x.square().sum(dim=(0, 1)) / 4
    for path in ("q", "k", "v"):
        torch.testing.assert_close(q[path], expected)
    inner = module.q(x) + module.k(x) + module.v(x)
    torch.testing.assert_close(q["o"], 5 * inner.square().sum(dim=(0, 1)).detach() / 4)
    assert collector.tokens("o") == 12
    assert not any(layer._forward_pre_hooks for layer in module.children())


def test_collector_notices_an_input_that_was_changed_in_place():
    class InPlace(Attention):
        def forward(self, x):
            self.q(x)
            x *= 3
            return self.k(x)

    module, x = InPlace(), torch.randn(1, 2, 4)
    before = x.clone()
    collector = collector_of(module)
    with torch.no_grad(), collector.watching():
        module(x)
    q, k = (collector.values(path, 1)[0]["squared_norm"] for path in ("q", "k"))
    torch.testing.assert_close(q, before.square().sum(dim=(0, 1)))
    torch.testing.assert_close(k, 9 * q)


def gram(batches, channels):
    statistic = Gram(channels, torch.device("cpu"))
    for batch in batches:
        rows = batch.reshape(-1, channels)
        statistic.add(statistic.measure(rows), len(rows))
    return statistic.value(1)


def test_gram_is_the_sum_over_tokens_and_does_not_see_batches():
    hidden = torch.randn(64, 9, 16) * torch.logspace(-2, 2, 16)
    rows = hidden.reshape(-1, 16).double()
    size = rows.abs().T @ rows.abs()
    for split in (1, 17, 64):
        value = gram(hidden.split(split), 16)
        assert value.dtype == torch.float32
        assert (((value - rows.T @ rows).abs() / size) < len(rows) * 2.0**-24).all()
    assert torch.equal(gram([], 4), torch.eye(4))  # no token: no channel is coupled with another


def test_layers_with_the_same_inputs_share_one_gram_until_one_sees_another():
    module, x = Attention(), torch.randn(2, 3, 4)
    watched = {path: Watched(layer, 4, torch.device("cpu")) for path, layer in module.named_children()}
    collector = Collector(watched, ("gram", "squared_norm"))
    with torch.no_grad(), collector.watching():
        module(x)
        module(2 * x)
    values = {path: collector.values(path, 4)[0] for path in ("q", "k", "v", "o")}
    assert values["q"]["gram"] is values["k"]["gram"] is values["v"]["gram"]
    assert values["o"]["gram"] is not values["q"]["gram"]
    rows = x.reshape(-1, 4)
    torch.testing.assert_close(values["q"]["gram"], 5 * rows.T @ rows)
    torch.testing.assert_close(values["q"]["squared_norm"], values["q"]["gram"].diagonal() / 4)
    collector = Collector(watched, ("gram",))
    with torch.no_grad(), collector.watching():
        module(x)
        module.q(3 * x)  # as an expert that alone is chosen
        module(x)
    torch.testing.assert_close(collector.values("q", 1)[0]["gram"], 11 * rows.T @ rows)
    torch.testing.assert_close(collector.values("k", 1)[0]["gram"], 2 * rows.T @ rows)
    assert collector.values("k", 1)[0]["gram"] is collector.values("v", 1)[0]["gram"]
    assert (collector.tokens("q"), collector.tokens("k")) == (18, 12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_module(value):
    module, x = Attention(), torch.zeros(1, 2, 4)
    x[0, 1, 2] = value
    collector = collector_of(module)
    with torch.no_grad(), collector.watching():
        module(x)
    with pytest.raises(
        ValueError, match="inputs of q hold NaN or infinity .squared_norm at channel 2, 1 in all"
    ):
        collector.values("q", 1)
