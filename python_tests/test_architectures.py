"""The engine on tiny models of many architectures, against full forward passes of the whole model."""

import pytest
import tiny_models
import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM
from wanda_oracle import differing, slow_wanda, weights

from pysparse.calib import Collector, Watched, load_calibration
from pysparse.calib.inputs import input_rows
from pysparse.measure import torch_threads
from pysparse.methods import METHODS
from pysparse.models.discover import discover
from pysparse.pruning import plan, run


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny products on two threads mostly wait for each other, and for whoever else is on the cores."""
    with torch_threads(1):
        yield


BOTH = ("Linear", "Conv2d")
CALIBRATED = [name for name in ("wanda", "sparsegpt") if name in METHODS]


def sequences(rows):
    """Arguments of a forward pass for each sequence."""
    return [{"input_ids": row[None]} for row in rows]


def check_counts(model, layout, report, structure):
    """Every matrix of the layout is in the report with the exact number of zeros, all others are named."""
    assert [layer.path for layer in report.layers] == [layer.path for layer in layout.layers]
    for layer, one in zip(layout.layers, report.layers, strict=True):
        groups = layer.groups
        expected = groups * structure.pruned_count(layer.shape[0] // groups, layer.shape[1], 0.5)
        assert one.pruned == one.zeros == expected == layer.size - int(layer.weight.count_nonzero())
    pruned = {id(layer.module) for layer in layout.layers}
    for path, module in model.named_modules():
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            assert (id(module) in pruned) != (path in report.skipped), path


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_language_models_lose_exactly_half(name, method):
    model, rows = tiny_models.tiny(name), tiny_models.tokens(6, 12)
    layout = discover(model)
    assert [len(layout.layers_of(index)) for index in range(3)] == [tiny_models.ARCHITECTURES[name][3]] * 3
    report = run(layout, METHODS[method], 0.5, load_calibration(rows, batch_size=4))
    check_counts(model, layout, report, METHODS[method].structure)
    assert report.sparsity == 0.5


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("name", tiny_models.VISION)
def test_vision_models_lose_exactly_half(name, method):
    model = tiny_models.tiny(name)
    layout = discover(model, BOTH)
    counts = tiny_models.VISION[name][3]
    assert [len(layout.layers_of(index)) for index in range(len(counts))] == counts
    data = load_calibration([{"pixel_values": part} for part in tiny_models.images().split(4)])
    report = run(layout, METHODS[method], 0.5, data)
    check_counts(model, layout, report, METHODS[method].structure)
    assert [one.pruned for one in plan(discover(tiny_models.tiny(name), BOTH), METHODS[method]).layers] == [
        one.pruned for one in report.layers
    ]


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_wanda_agrees_with_full_forward_passes(name):
    """The statistics of a block see the pruned blocks before it, with masks, rotations, routers and all."""
    rows = tiny_models.tokens(6, 12)
    model = tiny_models.tiny(name)
    run(discover(model), METHODS["wanda"], 0.5, load_calibration(rows, batch_size=4))
    # Scores that are equal but for the last bits may swap; everything else must agree ...
    assert differing(model, slow_wanda(tiny_models.tiny(name), sequences(rows), 0.5)) < 1e-3
    # ... and this comparison can tell which blocks the statistics saw.
    assert (
        differing(model, slow_wanda(tiny_models.tiny(name), sequences(rows), 0.5, sees_pruned=False)) > 5e-3
    )


@pytest.mark.parametrize("name", tiny_models.VISION)
def test_wanda_agrees_with_full_forward_passes_on_images(name):
    images, model = tiny_models.images(), tiny_models.tiny(name)
    data = load_calibration([{"pixel_values": part} for part in images.split(4)])
    run(discover(model, BOTH), METHODS["wanda"], 0.5, data)
    batches = [{"pixel_values": image[None]} for image in images]
    assert differing(model, slow_wanda(tiny_models.tiny(name), batches, 0.5)) < 1e-3
    assert differing(model, slow_wanda(tiny_models.tiny(name), batches, 0.5, sees_pruned=False)) > 5e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_dense_propagation_agrees_with_the_dense_model(name):
    rows = tiny_models.tokens(6, 12)
    model = tiny_models.tiny(name)
    report = run(
        discover(model), METHODS["wanda"], 0.5, load_calibration(rows, batch_size=4), propagate="dense"
    )
    assert report.propagate == "dense"
    assert "propagate" not in report.seconds
    assert (
        differing(model, slow_wanda(tiny_models.tiny(name), sequences(rows), 0.5, sees_pruned=False)) < 1e-3
    )


@pytest.mark.parametrize("name", ["llama", "bert", "qwen2_moe"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    rows = tiny_models.tokens(4, 10)
    lengths = [10, 7, 7, 4]
    padded, mask = torch.zeros(4, 10, dtype=torch.long), torch.zeros(4, 10, dtype=torch.long)
    for index, length in enumerate(lengths):
        place = slice(10 - length, None) if side == "left" else slice(length)
        padded[index, place], mask[index, place] = rows[index, :length], 1
    model, expected = tiny_models.tiny(name), tiny_models.tiny(name)
    data = load_calibration([{"input_ids": padded, "attention_mask": mask}])
    run(discover(model), METHODS["wanda"], 0.5, data)
    alone = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    run(discover(expected), METHODS["wanda"], 0.5, load_calibration(alone))
    assert differing(model, expected) < 1e-3
    unmasked = tiny_models.tiny(name)
    run(discover(unmasked), METHODS["wanda"], 0.5, load_calibration([padded]))
    assert differing(unmasked, expected) > 5e-3  # padding that is not cut off shows


# --- experts ---------------------------------------------------------------------------------------------


def test_an_expert_that_no_token_chose_is_pruned_by_magnitude_and_said():
    model = tiny_models.tiny("mixtral")
    block = model.model.layers[1]
    block.post_attention_layernorm.register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor(0), 5.0)
    )
    block.mlp.gate.weight.data = (
        torch.tensor([3.0, 2.0, 1.0, 0.0])[:, None] * torch.eye(32)[0]
    )  # always 0 and 1
    report = run(discover(model), METHODS["wanda"], 0.5, load_calibration(tiny_models.tokens()))
    unseen = [layer.path for layer in report.layers if layer.warnings]
    assert unseen == [
        f"model.layers.1.mlp.experts.{name}[{expert}]"
        for name in ("gate_up_proj", "down_proj")
        for expert in (2, 3)
    ]
    assert any(
        "4 layers saw no calibration token, model.layers.1.mlp.experts" in one for one in report.warnings
    )
    dense = tiny_models.tiny("mixtral").model.layers[1].mlp.experts.down_proj[2]
    order = dense.abs().argsort(dim=1, stable=True)[:, : dense.shape[1] // 2]
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj[2], dense.scatter(1, order, 0.0))


def test_an_experts_strength_does_not_depend_on_how_often_it_is_chosen():
    """Allocations compare scores across the matrices of a block: a mean over an expert's own tokens is fair."""
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    rows = torch.randn(400, 8)
    watched = {
        f"experts.{i}": Watched(one, 8, torch.device("cpu"), routed=True) for i, one in enumerate(experts)
    }
    collector = Collector(
        {**watched, "all": Watched(nn.Linear(8, 8), 8, torch.device("cpu"))}, ("squared_norm",)
    )
    everything = collector._layers["all"].module
    with torch.no_grad(), collector.watching():
        everything(rows)
        experts[0](rows[:380])
        experts[1](rows[380:])
    often, seldom, whole = (
        collector.values(path, 4)[0]["squared_norm"] for path in ("experts.0", "experts.1", "all")
    )
    torch.testing.assert_close(often, rows[:380].square().sum(0) / 380 * 100)
    torch.testing.assert_close(seldom, rows[380:].square().sum(0) / 20 * 100)
    torch.testing.assert_close(whole, rows.square().sum(0) / 4)


def test_experts_stored_the_other_way_round_are_read_so():
    """gpt-oss keeps [E, in, out], interleaves gate and up, and adds biases."""
    torch.manual_seed(1)
    settings = {**tiny_models._GQA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**settings)).eval()
    layout = discover(model)
    shapes = {layer.path.rpartition(".")[2]: layer.shape for layer in layout.layers_of(0) if layer.routed}
    assert shapes["gate_up_proj[0]"] == (96, 32)
    assert shapes["down_proj[3]"] == (32, 48)
    experts = model.model.layers[0].mlp.experts
    run(layout, METHODS["wanda"], 0.5, load_calibration(tiny_models.tokens()))
    assert ((experts.gate_up_proj != 0).sum(dim=1) == 16).all()  # of 32 inputs, for every output
    assert ((experts.down_proj != 0).sum(dim=1) == 24).all()


def test_fused_weights_without_the_interface_are_said():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.bank = nn.Module()
            self.bank.weight = nn.Parameter(torch.randn(3, 4, 4))

    layout = discover(nn.Sequential(Fused(), Fused()))
    assert layout.skipped == {f"{i}.bank": "Module is no kind of layer that is pruned" for i in range(2)}
    assert layout.warnings == (
        "2 fused weights (0.bank.weight, ...) hold 71% of the model's parameters and are not pruned: their module "
        "has not the interface of transformers' experts",
    )


# --- convolutions ----------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 8, "padding": 1},
    "same": {"kernel_size": (5, 3), "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "pointwise": {"kernel_size": 1},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_the_product_with_its_patches(kind):
    """Weight times the rows that the statistics see gives the convolution's own outputs."""
    conv = nn.Conv2d(8, 16, **CONVOLUTIONS[kind], bias=False).double()
    x = torch.randn(3, 8, 9, 10, dtype=torch.double)
    (layer,) = discover(nn.ModuleDict({"c": conv}), BOTH).layers
    parts = layer.weight.chunk(layer.groups)
    inputs = list(input_rows(conv, (x,), {}))
    assert [one.slot for one in inputs] == list(layer.slots)
    out = torch.cat([one.rows @ part.t() for one, part in zip(inputs, parts, strict=True)], dim=1)
    expected = conv(x).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("layout_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_of_all_kinds_are_pruned(kind, layout_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, **CONVOLUTIONS[kind])).to(memory_format=layout_format)
    conv, dense = model[0], model[0].weight.detach().clone()
    x = torch.randn(4, 8, 9, 10) * torch.logspace(-1, 1, 8)[:, None, None]
    report = run(discover(model, BOTH), METHODS["wanda"], 0.5, load_calibration([x]))
    kept = conv.weight != 0
    assert torch.equal(conv.weight[kept], dense[kept])
    cols = conv.weight[0].numel()
    assert ((~kept).flatten(1).sum(dim=1) == cols // 2).all()
    assert report.layers[0].pruned == 16 * (cols // 2)


def test_stages_that_are_siblings_are_one_stack():
    """As in torchvision's ResNet: lists of blocks side by side, and shapes that change on the way."""

    class Block(nn.Module):
        def __init__(self, channels, out, stride):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out)

        def forward(self, x):
            return self.norm(self.conv(x)).relu()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.layer1 = nn.Sequential(Block(4, 4, 1), Block(4, 4, 1))
            self.layer2 = nn.Sequential(Block(4, 8, 2), Block(8, 8, 1))
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.layer2(self.layer1(self.stem(x))).mean(dim=(2, 3)))

    torch.manual_seed(0)
    model = Net()
    layout = discover(model, BOTH)
    assert [path for path, _ in layout.blocks] == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    assert layout.skipped == {"stem": "outside of the blocks", "fc": "outside of the blocks"}
    running = model.layer1[0].norm.running_mean.clone()
    report = run(layout, METHODS["wanda"], 0.5, load_calibration([tiny_models.images(4, 12)]))
    assert [layer.pruned for layer in report.layers] == [4 * 18, 4 * 18, 8 * 18, 8 * 36]
    assert torch.equal(model.layer1[0].norm.running_mean, running)
    assert set(weights(model)) == {layer.path for layer in report.layers}
