"""The k-th smallest of several tensors, and one threshold for all layers."""

import math

import pytest
import torch
from allocation_cases import layout_of, stack
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse.measure import torch_threads
from pysparse.methods import (
    METHODS,
    GlobalMagnitude,
)
from pysparse.pruning import order_statistics as order_module
from pysparse.pruning import (
    run,
)
from pysparse.pruning.order_statistics import kth_smallest


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


# --- the k-th smallest -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 999), levels=st.sampled_from([3, 1000, None]), chunk=st.sampled_from([7, 1 << 22]))
def test_kth_smallest_of_several_tensors(seed, levels, chunk):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(int(n), generator=generator) for n in torch.randint(1, 60, (3,), generator=generator)]
    if levels is not None:
        parts = [(part * levels).floor() for part in parts]  # ties
    everything = torch.cat(parts).sort().values
    count = int(torch.randint(1, len(everything) + 1, (1,), generator=generator))
    before = order_module._CHUNK
    try:
        order_module._CHUNK = chunk
        assert kth_smallest(lambda: parts, count) == float(everything[count - 1])
    finally:
        order_module._CHUNK = before


def test_kth_smallest_refuses_what_is_not_ordered_by_its_bits():
    for bad in (torch.tensor([1.0, math.nan]), torch.tensor([-1.0, 2.0])):
        with pytest.raises(ValueError, match="NaN or negative"):
            kth_smallest(lambda bad=bad: [bad], 1)
    with pytest.raises(ValueError, match="count=3 is not between 1 and the 2 scores"):
        kth_smallest(lambda: [torch.ones(2)], 3)
    with pytest.raises(TypeError, match="scores are float32"):
        kth_smallest(lambda: [torch.ones(2).double()], 1)
    assert kth_smallest(lambda: [torch.tensor([math.inf, 1.0])], 2) == math.inf


# --- one threshold for all -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(sparsity=st.floats(0, 0.9), seed=st.integers(0, 99), coarse=st.booleans())
def test_global_magnitude_prunes_exactly_the_smallest_of_all(sparsity, seed, coarse):
    layers = stack([8, 12, 5], seed)
    if coarse:
        for evidence in layers:
            evidence.layer.module.weight.data = (evidence.layer.weight * 2).round() / 2  # ties
    everything = torch.cat([evidence.layer.weight.abs().flatten() for evidence in layers])
    count = int(sparsity * len(everything) + 1e-9)
    gone = torch.zeros(len(everything), dtype=torch.bool)
    gone[everything.argsort(stable=True)[:count]] = True
    expected = gone.split([evidence.layer.size for evidence in layers])
    if any(bool(part.all()) for part in expected):
        return
    report = run(layout_of(layers), METHODS["magnitude-global"], sparsity)
    assert [layer.pruned for layer in report.layers] == [int(part.sum()) for part in expected]
    for evidence, part in zip(layers, expected, strict=True):
        assert (evidence.layer.weight.flatten()[part] == 0).all()


def test_norms_make_the_global_threshold_blind_to_the_scale_of_a_layer():
    def rates(norm, scale):
        layers = stack([8, 8])
        layers[0].layer.module.weight.data *= scale
        return GlobalMagnitude(norm)(layers, 0.5)

    assert rates("none", 4.0)[0] < rates("none", 1.0)[0]
    for norm in ("l1", "l2"):
        assert rates(norm, 4.0) == rates(norm, 1.0)
    with pytest.raises(ValueError, match="norm is one of none, l1, l2, got 'l3'"):
        GlobalMagnitude("l3")


def test_a_layer_that_would_vanish_is_named():
    layers = stack([8, 8])
    layers[1].layer.module.weight.data *= 1e-3
    with pytest.raises(ValueError, match=r"would prune 1.0 entirely"):
        GlobalMagnitude()(layers, 0.6)
    layers[1].layer.module.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^1.0: the weights hold NaN"):
        GlobalMagnitude()(layers, 0.3)


def test_magnitude_by_row():
    report = run(layout_of(stack([8, 8])), METHODS["magnitude-row"], 0.5)
    assert {layer.structure for layer in report.layers} == {"unstructured, by row"}
    assert [layer.pruned for layer in report.layers] == [32, 32]
