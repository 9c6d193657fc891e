"""The one loop over blocks: what it does to a model, and what it leaves as it was."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
import tiny_models
import torch
from torch import nn
from wanda_oracle import differing, weights

from pysparse.calib import load_calibration
from pysparse.measure import torch_threads
from pysparse.methods import METHODS, Magnitude, Wanda, recipe_for
from pysparse.models.discover import discover
from pysparse.pruning import (
    NM,
    Keep,
    Pruned,
    Recipe,
    Uniform,
    Unstructured,
    plan,
    run,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny products on two threads mostly wait for each other, and for whoever else is on the cores."""
    with torch_threads(1):
        yield


STRUCTURES = [Unstructured("row"), Unstructured("matrix"), NM(1, 4), NM(2, 4), NM(4, 8), NM(2, 8)]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_every_structure_runs_in_the_loop(structure):
    model = tiny_models.tiny("llama", torch.bfloat16)
    recipe = dataclasses.replace(METHODS["wanda"], structure=structure)
    planned = plan(discover(model), recipe)
    report = run(discover(model), recipe, None, load_calibration(tiny_models.tokens()))
    for layer, expected in zip(report.layers, planned.layers, strict=True):
        assert (layer.path, layer.shape, layer.pruned) == (expected.path, expected.shape, expected.pruned)
        assert layer.requested == expected.sparsity == (structure.fixed_sparsity or 0.5)
        keep = weights(model)[layer.path] != 0
        assert int((~keep).sum()) == layer.zeros >= layer.pruned
        if isinstance(structure, NM):
            assert int(keep.unflatten(1, (-1, structure.m)).sum(dim=2).max()) <= structure.n
    assert report.sparsity == pytest.approx(structure.fixed_sparsity or 0.5)


def test_a_width_that_the_pattern_does_not_divide_is_said_once(caplog):
    model = tiny_models.tiny("llama", intermediate_size=46)
    report = run(discover(model), recipe_for("magnitude", "2:4"))
    down = [layer for layer in report.layers if layer.path.endswith("down_proj")]
    assert [(layer.shape, layer.pruned) for layer in down] == [((32, 46), 32 * 22)] * 3
    assert (weights(model)[down[0].path][:, 44:] != 0).all()
    text = (
        "3 layers have in_features that 2:4 does not divide, the last columns stay dense: "
        "model.layers.0.mlp.down_proj has 46, its last 2 are not pruned"
    )
    assert report.warnings == (text,)
    assert caplog.text.count("does not divide") == 1
    assert plan(discover(model), recipe_for("magnitude", "2:4")).warnings == (text,)


# --- what stays as it was -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_is_preserved(dtype):
    model = tiny_models.tiny("llama", dtype, tie_word_embeddings=True).train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in parameters.values()]
    assert model.config.use_cache
    report = run(discover(model), METHODS["wanda"], 0.5, load_calibration(tiny_models.tokens()))
    after = dict(model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in after.values()] == flags
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pruned = {f"{layer.path}.weight" for layer in report.layers}
    for name, parameter in after.items():
        assert parameter.dtype == dtype
        kept = parameter != 0 if name in pruned else slice(None)
        assert torch.equal(parameter[kept], before[name][kept])
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_state_is_preserved_after_an_error():
    model = tiny_models.tiny("llama").train()
    model.model.layers[1].mlp.up_proj.weight.data[0] = 3e38  # finite, but its outputs are not
    untouched = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"inputs of model.layers.1.mlp.down_proj hold NaN or infinity"
    ) as caught:
        run(discover(model), METHODS["wanda"], 0.5, load_calibration(tiny_models.tokens()))
    assert "1 of 3 blocks had been processed" in caught.value.__notes__[0]
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, untouched)
    assert model.training
    assert model.config.use_cache
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_magnitude_runs_no_forward_pass():
    model = tiny_models.tiny("llama")

    def refuse(*arguments):
        raise AssertionError("a module was called")

    for module in model.modules():
        module.register_forward_pre_hook(refuse)
    report = run(discover(model), METHODS["magnitude"], 0.5)
    assert report.calibration is None
    assert set(report.seconds) == {"prune", "total"}
    for layer in report.layers:
        assert layer.pruned == layer.shape[0] * layer.shape[1] // 2


def test_gpt2s_transposed_weights_are_scored_by_input():
    """Conv1D stores [in, out]: with one strong input channel, that channel's weights survive."""
    model = tiny_models.tiny("gpt2")
    layer = model.transformer.h[0].attn.c_attn
    model.transformer.h[0].ln_1.weight.data[5] = 1e4
    run(discover(model), METHODS["wanda"], 0.9, load_calibration(tiny_models.tokens()))
    assert (layer.weight[5] != 0).all()
    assert ((layer.weight != 0).sum(dim=0) == 32 - 28).all()  # floor(0.9 * 32) = 28 a column


# --- determinism --------------------------------------------------------------------------------------------


def pruned_llama(batch_size=4, dtype=torch.float32):
    model = tiny_models.tiny("llama", dtype)
    run(
        discover(model),
        METHODS["wanda"],
        0.6,
        load_calibration(tiny_models.tokens(8, 16), batch_size=batch_size),
    )
    return model


def test_the_same_call_gives_the_same_masks():
    first, second = pruned_llama(), pruned_llama()
    assert differing(first, second) == 0.0
    assert all(torch.equal(weights(first)[path], weight) for path, weight in weights(second).items())


def test_threads_and_batch_size_change_no_more_than_near_ties():
    one = pruned_llama()
    assert differing(one, pruned_llama(batch_size=1)) < 1e-3
    with torch_threads(2):
        assert differing(one, pruned_llama()) < 1e-3


def test_masks_of_given_scores_do_not_depend_on_threads():
    scores = torch.randint(0, 999, (700, 300)).float()
    for structure in STRUCTURES:
        sparsity = structure.fixed_sparsity or 0.45
        one = structure.keep(scores, sparsity)
        with torch_threads(2):
            assert torch.equal(structure.keep(scores, sparsity), one)


# --- room for other methods ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ByActivity:
    """An allocation that decides from dense statistics: a layer with stronger inputs gets more weights."""

    spread: float = 0.2
    needs = ("squared_norm",)

    def __call__(self, layers, target):
        activity = torch.tensor([float(one.stats["squared_norm"].mean()) for one in layers])
        sizes = torch.tensor([float(one.layer.size) for one in layers])
        raw = -activity.argsort().argsort().float() / len(layers) * self.spread
        return (target + raw - (raw * sizes).sum() / sizes.sum()).double().tolist()


def test_an_allocation_may_ask_for_statistics_of_the_dense_model():
    model, rows = tiny_models.tiny("llama"), tiny_models.tokens()
    recipe = dataclasses.replace(METHODS["magnitude"], allocation=ByActivity())
    assert recipe.needs_calibration
    assert recipe.needs == ()
    report = run(discover(model), recipe, 0.5, load_calibration(rows))
    asked = [layer.requested for layer in report.layers]
    assert max(asked) - min(asked) > 0.1
    for layer in report.layers:
        assert layer.pruned == int(layer.requested * layer.size + 1e-9)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert "ByActivity decides from activations" in plan(discover(model), recipe, 0.5).warnings[0]
    with pytest.raises(ValueError, match="needs statistics of activations .squared_norm.: pass calibration"):
        run(discover(model), recipe, 0.5)


@dataclass(frozen=True, slots=True)
class Given:
    """An allocation that says what it is told."""

    values: tuple
    needs = ()

    def __call__(self, layers, target):
        return list(self.values)


def test_allocations_are_checked():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 12))
    for values, structure, message in [
        ((0.5,), Unstructured(), "Given gave 1 sparsities for 2 layers"),
        ((0.5, 1.0), Unstructured(), "Given on 2: sparsity is a fraction"),
        ((0.25, 0.75), Unstructured(), "reaches a mean sparsity of 0.625 instead of 0.5"),
        ((0.6, 0.5), NM(2, 4), "gives 0 sparsity 0.6, but 2:4 fixes it at 0.5"),
    ]:
        recipe = Recipe(Magnitude(), Given(values), structure, Keep())
        with pytest.raises(ValueError, match=message):
            run(discover(model), recipe, 0.5)
    report = run(discover(model), Recipe(Magnitude(), Given((0.8, 0.4)), Unstructured("matrix"), Keep()), 0.5)
    assert [layer.pruned for layer in report.layers] == [12, 19]  # floor(.8 * 16), floor(.4 * 48)


@dataclass(frozen=True, slots=True)
class Doubling:
    """A reconstruction that changes the survivors and needs a statistic of its own."""

    needs = ("squared_norm",)

    def solve(self, weight, stats, importance, structure, sparsity):
        assert stats["squared_norm"].shape == weight.shape[1:]
        keep = structure.keep(importance(weight, stats), sparsity)
        return Pruned(2 * weight * keep, keep)


def test_a_reconstruction_may_change_the_survivors():
    model, dense = tiny_models.tiny("llama"), tiny_models.tiny("llama")
    recipe = Recipe(Magnitude(), Uniform(), Unstructured("row"), Doubling())
    assert recipe.needs == ("squared_norm",)
    run(discover(model), recipe, 0.5, load_calibration(tiny_models.tokens()))
    for path, weight in weights(model).items():
        kept = weight != 0
        assert torch.equal(weight[kept], 2 * weights(dense)[path][kept])


def test_a_reconstruction_of_the_wrong_shape_is_refused():
    class Wrong(Keep):
        def solve(self, weight, *rest):
            return Pruned(weight.t(), weight.t() != 0)

    model = nn.Sequential(nn.Linear(4, 8))
    with pytest.raises(
        ValueError, match=r"0: the reconstruction returned weight of shape \(4, 8\), not \(8, 4\)"
    ):
        run(discover(model), Recipe(Magnitude(), Uniform(), Unstructured(), Wrong()), 0.5)


# --- what is said about it -------------------------------------------------------------------------------


def test_events_and_report():
    model, events = tiny_models.tiny("llama"), []
    calibration = load_calibration(tiny_models.tokens())
    report = run(discover(model), METHODS["wanda"], 0.5, calibration, seed=7, callbacks=[events.append])
    assert [(event.index, event.total, event.path) for event in events] == [
        (index, 3, f"model.layers.{index}") for index in range(3)
    ]
    assert [layer for event in events for layer in event.layers] == list(report.layers)
    assert all(event.seconds > 0 for event in events)
    assert set(report.seconds) == {"capture", "statistics", "prune", "propagate", "total"}
    content = json.loads(report.to_json())
    assert content["sparsity"] == content["layers"][0]["sparsity"] == 0.5
    assert content["seed"] == 7
    assert content["calibration"]["sequences"] == 6
    assert content["recipe"]["importance"] == {"type": "Wanda"}
    assert content["recipe"]["structure"] == {"type": "Unstructured", "group": "row"}
    assert content["skipped"] == {
        "lm_head": "in ignore",
        "model.embed_tokens": "Embedding is no kind of layer that is pruned",
    }
    assert content["memory"]["resident_peak"] >= content["memory"]["resident_before"] > 1 << 20
    assert "resident at most" in report.table().caption
    total = sum(parameter.numel() for parameter in model.parameters())
    assert content["share_of_model"] == pytest.approx(report.weights / total)
    assert report.table().row_count == 22
    assert sum(1 for _ in report._groups()) == 21
    many = dataclasses.replace(report, layers=report.layers * 4)
    assert many.table().row_count == 4  # a line a block


def test_a_wanda_run_on_plain_modules():
    """Anything with linear layers can be pruned: a stack of its own kind, or the whole as one block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 8) * torch.tensor([10.0, *[0.1] * 7])
    report = run(discover(model), recipe_for("wanda"), 0.75, load_calibration([x]))
    assert [layer.path for layer in report.layers] == ["0", "2"]
    assert (model[0].weight[:, 0] != 0).all()
    stats = {"squared_norm": x.square().sum(dim=0) / 32}
    assert Wanda()(model[0].weight.detach(), stats).shape == (16, 8)
