"""Post-training-sparsity techniques: allocations, filters, corrections, reconstruction, batch normalisation."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PvtV2Config,
    PvtV2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from pysparse.calib.batches import own_batches
from pysparse.measure import torch_threads
from pysparse.methods import METHODS, Magnitude, recipe_for
from pysparse.methods.erk import ErdosRenyi
from pysparse.methods.fcpts import FCPTS, density_at, learn_rates, weight_histogram
from pysparse.methods.filters import FilterDistance, NuclearImpact, SquaredMagnitude
from pysparse.methods.lamp import LAMP, lamp_scores
from pysparse.models.discover import discover
from pysparse.pruning import Evidence, Filters, Keep, Recipe, Uniform, Unstructured, run
from pysparse.pruning.batchnorm import batch_norms, fold_batch_norm_, recalibrate_
from pysparse.pruning.correction import Correct, corrected_weight
from pysparse.pruning.layout import PrunableLayer
from pysparse.pruning.projection import weighted_mean
from pysparse.pruning.tuning import OutputMatching, match_outputs_


@pytest.fixture(autouse=True)
def one_thread():
    """Layers of some thousand weights: a second thread would cost more than it computes."""
    with torch_threads(1):
        yield


def evidences(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, shape in enumerate(shapes):
        module = (
            nn.Conv2d(shape[1], shape[0], shape[2:]) if len(shape) == 4 else nn.Linear(shape[1], shape[0])
        )
        module.weight.data = torch.randn(shape, generator=generator) * (1 + index)
        layers.append(Evidence(PrunableLayer(f"l{index}", module, 0), {}))
    return layers


def sizes_of(layers):
    return [evidence.layer.size for evidence in layers]


class ConvNet(nn.Module):
    """Two residual blocks of convolution, batch normalisation and ReLU, and a classifier."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.norm1 = nn.BatchNorm2d(width)
            self.act = nn.ReLU()
            self.conv2 = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x):
            return x + self.conv2(self.act(self.norm1(self.conv1(x))))

    def __init__(self, width=8, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([self.Block(width), self.Block(width)])
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


def conv_net(seed=0):
    torch.manual_seed(seed)
    model = ConvNet().eval()
    for norm in batch_norms(model).values():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return model


def images(count=3, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 8, 8, generator=generator) for _ in range(count)]


# Allocations


def test_erk_gives_the_published_numbers():
    layers = evidences((64, 64), (256, 64), (10, 256))
    assert ErdosRenyi(power=1.0)(layers, 0.5) == pytest.approx([0.375, 0.609375, 0.0], abs=1e-9)
    assert ErdosRenyi(power=0.5)(layers, 0.5) == pytest.approx([0.46953, 0.58063, 0.03272], abs=1e-5)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 0.95])
def test_erk_meets_the_budget(kernel, target):
    layers = evidences((16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 1, 1), (10, 64))
    found = ErdosRenyi(kernel)(layers, target)
    assert weighted_mean(found, sizes_of(layers)) == pytest.approx(target, abs=1e-9)
    assert all(0.0 <= s < 1.0 for s in found)


def test_erk_counts_the_kernel_where_er_does_not():
    layers = evidences((64, 64, 3, 3), (64, 64, 1, 1))
    with_kernel, without = (ErdosRenyi(kernel)(layers, 0.7) for kernel in (True, False))
    assert with_kernel[0] > with_kernel[1]
    assert without == pytest.approx([0.7, 0.7])


def test_lamp_scores_are_the_definition():
    weight = torch.tensor([[3.0, -1.0], [1.0, 2.0]])  # squares 1 1 4 9: equal weights count the whole tie
    expected = torch.tensor([1 / 15, 1 / 15, 4 / 13, 1.0], dtype=torch.float64)
    assert torch.allclose(lamp_scores(weight), expected)


def test_lamp_counts_exactly_what_one_threshold_prunes():
    layers = evidences((8, 9), (12, 8), (5, 12))
    found = LAMP()(layers, 0.6)
    every = torch.cat([lamp_scores(one.layer.weight) for one in layers])
    threshold = every.sort().values[int(0.6 * len(every) + 1e-9) - 1]
    for one, sparsity in zip(layers, found, strict=True):
        keep = Unstructured("matrix").keep(one.layer.weight.abs(), sparsity)
        assert int((~keep).sum()) == int((lamp_scores(one.layer.weight) <= threshold).sum())
    assert weighted_mean(found, sizes_of(layers)) == pytest.approx(0.6, abs=1e-6)


def test_lamp_does_not_see_the_scale_of_a_layer():
    layers = evidences((8, 9), (12, 8))
    before = LAMP()(layers, 0.5)
    layers[0].layer.module.weight.data *= 1000
    assert LAMP()(layers, 0.5) == pytest.approx(before, abs=1e-9)


# Filters


def test_filters_go_whole_and_by_their_norm():
    weight = torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 1.5], [2.0, -2.0, 0.0], [0.1, 0.2, 0.3]])
    l1 = Filters().keep(Magnitude()(weight, {}), 0.5)
    l2 = Filters().keep(SquaredMagnitude()(weight, {}), 0.5)
    assert l1[:, 0].tolist() == [False, True, True, False]
    assert l2[:, 0].tolist() == [True, False, True, False]
    assert bool((l1.all(dim=1) | ~l1.any(dim=1)).all())
    assert int((~l1).sum()) == Filters().pruned_count(4, 3, 0.5)


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine"])
def test_filter_distance_is_the_mean_distance_to_the_others(distance):
    weight = torch.randn(300, 7, generator=torch.Generator().manual_seed(4))
    found = FilterDistance(distance)(weight, {}).sum(dim=1)
    for row in (0, 255, 256, 299):
        others = torch.cat([weight[:row], weight[row + 1 :]])
        each = {
            "l1": (others - weight[row]).abs().sum(dim=1),
            "l2": (others - weight[row]).norm(dim=1),
            "cosine": 1 - torch.nn.functional.cosine_similarity(others, weight[row][None]),
        }[distance]
        assert float(found[row]) == pytest.approx(float(each.mean()), rel=1e-4)


def test_fpgm_drops_the_filter_that_others_can_replace():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-5.0, 0.0], [0.0, 9.0]])
    assert Filters().keep(FilterDistance()(weight, {}), 0.25)[:, 0].tolist().index(False) in (0, 1)


def test_nuclear_impact_of_a_duplicate_is_less_than_of_a_direction_of_its_own():
    weight = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    impact = NuclearImpact()(weight, {}).sum(dim=1)
    assert float(impact[2]) == pytest.approx(1.0, abs=1e-5)
    assert float(impact[0]) == pytest.approx(2**0.5 - 1.0, abs=1e-5)


def test_filters_refuse_reconstruction_by_column_blocks():
    with pytest.raises(ValueError, match="whole rows"):
        Filters().step(128)


# Corrections


def test_weight_correction_gives_the_published_numbers():
    dense = torch.tensor([[4.0, -3.0, 1.0, -0.5]])
    keep = torch.tensor([[True, True, False, False]])
    found = corrected_weight(dense, dense * keep, keep)
    assert found.tolist()[0] == pytest.approx([4.19536, -2.93598, 0.0, 0.0], abs=1e-5)


def test_weight_correction_leaves_empty_rows_empty():
    dense = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(2, 8, dtype=torch.bool)
    assert not corrected_weight(dense, dense * keep, keep).any()


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_bias_correction_restores_the_mean_output(kind):
    torch.manual_seed(0)
    layer = {
        "linear": nn.Linear(12, 7),
        "conv": nn.Conv2d(3, 8, 3, stride=2, padding=1),
        "grouped": nn.Conv2d(6, 8, 3, padding=1, groups=2),
    }[kind]
    shape = {"linear": (9, 12), "conv": (6, 3, 8, 8), "grouped": (6, 6, 8, 8)}[kind]
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) + 1.0 for i in range(3)]

    def mean_output():
        with torch.no_grad():
            stacked = torch.cat([layer(batch) for batch in batches])
        return stacked.mean(dim=(0, 2, 3)) if stacked.dim() == 4 else stacked.mean(dim=0)

    before = mean_output()
    recipe = Recipe(Magnitude(), Uniform(), Unstructured("matrix"), Correct())
    plain = Recipe(Magnitude(), Uniform(), Unstructured("matrix"), Correct(bias=False))
    kept = copy.deepcopy(layer.state_dict())
    prune_vision(nn.Sequential(layer), plain, 0.5, batches)
    assert not torch.allclose(mean_output(), before, atol=1e-2), "the weights' means were nothing to correct"
    layer.load_state_dict(kept)
    prune_vision(nn.Sequential(layer), recipe, 0.5, batches)
    assert torch.allclose(mean_output(), before, atol=1e-5)


def prune_vision(model, recipe, sparsity, batches, **options):
    layout = discover(model, targets=("Linear", "Conv2d"), whole=True)
    return layout, run(layout, recipe, sparsity, own_batches(batches, None, None), **options)


# Batch normalisation


def test_folding_keeps_the_function_and_gives_a_bias():
    model, (batch, *_) = conv_net(), images()
    before = model(batch)
    pairs = fold_batch_norm_(model, batch)
    assert pairs == [(f"blocks.{i}.conv1", f"blocks.{i}.norm1") for i in range(2)]
    assert not batch_norms(model)
    assert model.blocks[0].conv1.bias is not None
    assert torch.allclose(model(batch), before, atol=1e-5)


def test_folding_is_undone_where_it_would_change_the_function():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y  # the sum reads the convolution's output too

    torch.manual_seed(0)
    model = Leaky().eval()
    model.norm.running_var.fill_(9.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nothing was changed"):
        fold_batch_norm_(model, images()[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_folding_asks_for_eval_mode():
    with pytest.raises(ValueError, match=r"model\.eval"):
        fold_batch_norm_(conv_net().train(), images()[0])


def test_recalibration_measures_the_batches():
    model = conv_net()
    inputs = images(count=3)
    weights = copy.deepcopy([parameter.detach() for parameter in model.parameters()])
    assert recalibrate_(model, inputs) == 2
    with torch.no_grad():
        first = torch.stack(
            [model.blocks[0].conv1(model.stem(batch)).mean(dim=(0, 2, 3)) for batch in inputs]
        )
    assert torch.allclose(model.blocks[0].norm1.running_mean, first.mean(dim=0), atol=1e-5)
    assert not any(module.training for module in model.modules())
    assert model.blocks[0].norm1.momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_recalibration_without_a_batch_changes_nothing():
    model = conv_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no calibration batch"):
        recalibrate_(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Reconstruction by gradients

QUICK = OutputMatching(steps=20, weight_lr=5e-3, bias_lr=5e-3)


def pruned_pair(sparsity=0.6):
    dense = conv_net()
    model = copy.deepcopy(dense)
    layout = discover(model, targets=("Linear", "Conv2d"))
    run(layout, Recipe(Magnitude(), Uniform(), Unstructured("matrix"), Keep()), sparsity)
    return dense, model, discover(model, targets=("Linear", "Conv2d"))


def output_error(model, dense, batches):
    with torch.no_grad():
        return float(torch.stack([(model(b) - dense(b)).square().mean() for b in batches]).mean())


@pytest.mark.parametrize("granularity", ["op", "layer", "block"])
@pytest.mark.parametrize("inputs", ["sparse", "dense"])
def test_tuning_lowers_every_loss_and_keeps_zeros(granularity, inputs):
    dense, model, layout = pruned_pair()
    batches, zeros = images(), {one.path: one.weight == 0 for one in layout.layers}
    before = output_error(model, dense, batches)
    settings = dataclasses.replace(QUICK, granularity=granularity, inputs=inputs)
    units = match_outputs_(layout, dense, batches, settings)
    assert all(unit.after <= unit.before for unit in units)
    assert output_error(model, dense, batches) < before
    assert all(torch.equal(one.weight == 0, zeros[one.path]) for one in layout.layers)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_whole_model_prunes_its_stem_and_its_classifier_too():
    model = conv_net()
    blocks, whole = (discover(model, ("Linear", "Conv2d"), whole=flag) for flag in (False, True))
    assert {one.path for one in whole.layers} - {one.path for one in blocks.layers} == {"stem", "head"}


def test_layer_units_end_before_the_next_weight():
    _, model, layout = pruned_pair()
    from pysparse.pruning.units import units_of

    units = units_of(layout, lambda: model(images()[0]), "layer")
    assert [unit.paths for unit in units if "blocks.0" in unit.path] == [
        ("blocks.0.conv1", "blocks.0.norm1", "blocks.0.act"),
        ("blocks.0.conv2",),
    ]


def pool_former():
    config = PoolFormerConfig(
        hidden_sizes=[8, 12], depths=[2, 2], num_encoder_blocks=2, patch_sizes=[3, 3], strides=[2, 2], padding=[1, 1],
        num_labels=3,
    )  # fmt: skip
    return PoolFormerForImageClassification(config)  # its blocks are lists in a list


def pyramid_vision():
    config = PvtV2Config(
        hidden_sizes=[8, 12], depths=[2, 2], num_encoder_blocks=2, patch_sizes=[3, 3], strides=[2, 2],
        mlp_ratios=[2, 2], num_attention_heads=[1, 2], sr_ratios=[2, 1], num_labels=3,
    )  # fmt: skip
    return PvtV2ForImageClassification(config)  # a stage returns a tuple in a tuple


def swin():
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4, num_labels=3
    )
    return SwinForImageClassification(config)


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("make", [pool_former, pyramid_vision, swin])
def test_models_of_stages_are_tuned(make, granularity):
    torch.manual_seed(0)
    dense = make().eval()
    model = copy.deepcopy(dense)
    batches = [{"pixel_values": torch.rand(2, 3, 32, 32)}]
    targets = ("Linear", "Conv2d")
    run(discover(model, targets, (), whole=True), recipe_for("magnitude"), 0.6)
    layout = discover(model, targets, (), whole=granularity == "layer")
    settings = OutputMatching(granularity, steps=3, weight_lr=1e-3, bias_lr=1e-3)
    units = match_outputs_(layout, dense, batches, settings)
    tuned = {path for unit in units for path in unit.layers}
    assert tuned == {layer.path for layer in layout.layers}
    assert all(unit.after <= unit.before for unit in units)
    assert any(unit.steps for unit in units)


def test_tuning_a_dense_copy_changes_nothing():
    dense = conv_net()
    model = copy.deepcopy(dense)
    units = match_outputs_(discover(model, targets=("Linear", "Conv2d")), dense, images(), QUICK)
    assert all(unit.before == 0 == unit.after == unit.steps for unit in units)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_dynamic_mask_moves_zeros_but_not_their_number():
    dense, _, layout = pruned_pair()
    zeros = {one.path: (one.weight == 0).clone() for one in layout.layers}
    settings = dataclasses.replace(QUICK, granularity="op", dynamic_mask=True, weight_lr=3e-2)
    with pytest.raises(ValueError, match="structure"):
        match_outputs_(layout, dense, images(), settings)
    match_outputs_(layout, dense, images(), settings, Unstructured("matrix"))
    counts = [(int((one.weight == 0).sum()), int(zeros[one.path].sum())) for one in layout.layers]
    assert all(now == then for now, then in counts)


def test_tuning_refuses_what_it_cannot_do():
    dense, _, layout = pruned_pair()
    with pytest.raises(ValueError, match="no calibration batch"):
        match_outputs_(layout, dense, [], QUICK)
    with pytest.raises(ValueError, match="granularity"):
        OutputMatching(granularity="model")


# FCPTS


def test_the_gradient_of_the_sparsity_is_the_density_of_the_weights():
    scaled = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs()
    scaled /= scaled.max()
    histogram = weight_histogram(scaled)
    for threshold in (0.105, 0.255, 0.455):
        low, high = (float((scaled < threshold + d).float().mean()) for d in (-0.005, 0.005))
        assert float(density_at(histogram, torch.tensor(threshold))) == pytest.approx(
            (high - low) / 0.01, rel=0.02
        )


def test_learned_rates_meet_the_budget_and_spare_what_matters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 6)).eval()
    model[2].weight.data *= 0.01  # hardly moves the output: its weights can go
    before = copy.deepcopy(model.state_dict())
    layout = discover(model)
    batches = [torch.randn(64, 20, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    rates = learn_rates(layout, batches, 0.6, FCPTS(epochs=10, learning_rate=0.16))
    sizes = [one.size for one in layout.layers]
    assert weighted_mean(list(rates.values()), sizes) == pytest.approx(0.6, abs=1e-6)
    assert rates["2"] == max(rates.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_fcpts_refuses_to_learn_from_nothing():
    layout = discover(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="0 batches"):
        learn_rates(layout, [], 0.5)
    with pytest.raises(ValueError, match="epochs=0"):
        FCPTS(epochs=0)


def test_presets_are_in_the_registry():
    assert METHODS["pot"].reconstruction == Correct(weight=True, bias=True)
    assert recipe_for("magnitude", allocation="erk").allocation == ErdosRenyi()
