"""Damaged weights, odd inputs, and the edges of what can be asked for."""

import copy

import pytest
import tiny_models
import torch
from torch import nn

from pysparse.calib import load_calibration
from pysparse.measure import torch_threads
from pysparse.methods import METHODS, Magnitude
from pysparse.models.discover import discover
from pysparse.pruning import (
    Execution,
    Keep,
    Unstructured,
    plan,
    run,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny products on two threads mostly wait for each other, and for whoever else is on the cores."""
    with torch_threads(1):
        yield


class Experts(nn.Module):
    """A block whose second expert is never chosen."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        return x + self.experts[0](x.flatten(0, 1)).view(x.shape)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_said(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Experts())
    dense = copy.deepcopy(model)
    layout = discover(model)
    assert [path for path, _ in layout.blocks] == ["0", "1"]
    report = run(layout, METHODS["wanda"], 0.5, load_calibration([torch.randn(2, 3, 8)]))
    expected = Keep().solve(dense[0].experts[1].weight.detach(), {}, Magnitude(), Unstructured("row"), 0.5)
    assert torch.equal(model[0].experts[1].weight, expected.weight)
    assert "2 layers saw no calibration token, 0.experts.1 first" in report.warnings[0]
    assert "saw no calibration token" in caplog.text
    assert [bool(layer.warnings) for layer in report.layers] == [False, True, False, True]


def test_zeros_that_were_there_are_counted_apart():
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight.data[:, :6] = 0
    layer = run(discover(model), METHODS["wanda"], 0.5, load_calibration([torch.randn(5, 8)])).layers[0]
    assert (layer.pruned, layer.zeros) == (16, 24)
    assert layer.sparsity == 0.5


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def untouched(model, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weights_are_refused_before_anything_is_touched(method, value):
    model = tiny_models.tiny("llama", torch.bfloat16)
    model.model.layers[2].mlp.down_proj.weight.data[3, 5:7] = value
    clean = [p for n, p in model.named_parameters() if n != "model.layers.2.mlp.down_proj.weight"]
    before = [one.detach().clone() for one in clean]
    text = "model.layers.2.mlp.down_proj: 2 of 1536 weights are NaN or infinite: the checkpoint is damaged"
    with pytest.raises(ValueError, match=text):
        run(discover(model), METHODS[method], 0.5, load_calibration(tiny_models.tokens()))
    assert all(torch.equal(one, old) for one, old in zip(clean, before, strict=True))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "ebf"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(value, method):
    model = tiny_models.tiny("llama")
    model.model.embed_tokens.weight.data[7, 3] = value
    rows = tiny_models.tokens()
    rows[2, 4] = 7
    before = copies(model)
    with pytest.raises(ValueError, match="inputs of model.layers.0.self_attn.q_proj hold NaN or infinity"):
        run(discover(model), METHODS[method], 0.5, load_calibration(rows))
    assert all(
        torch.equal(parameter.nan_to_num(), before[name].nan_to_num())
        for name, parameter in model.named_parameters()
    )


def test_dead_columns_go_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    model[0].weight.data[:, [1, 4, 6]] = 100.0  # large weights of inputs that are never there
    x = torch.randn(20, 8)
    x[:, [1, 4, 6]] = 0
    run(discover(model), METHODS["wanda"], 0.5, load_calibration([x]))
    assert (model[0].weight[:, [1, 4, 6]] == 0).all()
    assert ((model[0].weight == 0).sum(dim=1) == 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_changes_nothing_bit_for_bit(method, dtype):
    model = tiny_models.tiny("llama", dtype)
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[0], weight[1, ::2] = -0.0, torch.finfo(dtype).tiny
    before = copies(model)
    report = run(discover(model), METHODS[method], 0.0, load_calibration(tiny_models.tokens()))
    assert report.sparsity == 0.0
    assert sum(layer.zeros for layer in report.layers) == weight.shape[1]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert all(torch.equal(p.view(bits), before[name].view(bits)) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("sparsity", "hint"), [(1, "got 1"), (1.0, "got 1.0"), (50, "did you mean 0.5"), (-0.1, "got -0.1")]
)
def test_sparsities_out_of_range_touch_nothing(sparsity, hint):
    model = tiny_models.tiny("llama")
    before = copies(model)
    with pytest.raises(ValueError, match=f"sparsity is a fraction.*{hint}"):
        run(discover(model), METHODS["magnitude"], sparsity)
    assert untouched(model, before)


def test_missing_weights_and_unknown_settings_are_refused():
    with torch.device("meta"):
        skeleton = tiny_models.tiny("llama")
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj has no data .device meta."):
        run(discover(skeleton), METHODS["magnitude"], 0.5)
    assert plan(discover(skeleton), METHODS["magnitude"], 0.5).pruned > 0
    model = tiny_models.tiny("llama")
    before = copies(model)
    for arguments, message in [
        ({"propagate": "both"}, "propagate is one of pruned, dense, sequential, got 'both'"),
        ({"execution": Execution(device="nowhere")}, "device=nowhere cannot be used here"),
        ({"execution": Execution(device="meta")}, "device=meta computes nothing"),
        ({"execution": Execution(activations="tape")}, "'memory' or on 'disk', got 'tape'"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(discover(model), METHODS["magnitude"], 0.5, **arguments)
    with pytest.raises(ValueError, match="needs statistics of activations .squared_norm.: pass calibration"):
        run(discover(model), METHODS["wanda"], 0.5)
    assert untouched(model, before)
