"""What a caller may say about a pruning: filters, strictness, parity with released code, the predicted time."""

import dataclasses

import pytest
import tiny_models
import torch

from pysparse import api
from pysparse.calib import load_calibration
from pysparse.methods import DLP, METHODS, as_released, parse_recipe, recipe_for, recipe_to_yaml
from pysparse.models.discover import discover
from pysparse.pruning import MixedNM, RowMass, Unstructured, forecast, plan, released, run
from pysparse.pruning.released import ReleasedRowMass, ReleasedThreshold


def test_a_filter_is_asked_last():
    asked = []

    def only_attention(module, path):
        asked.append(path)
        return isinstance(module, torch.nn.Linear) and "self_attn" in path

    model = tiny_models.tiny()
    report = api.prune(
        model, 0.5, "magnitude", ignore=("lm_head", "q_proj"), filter_fn=only_attention, progress=False
    ).report
    assert {layer.path.rpartition(".")[2] for layer in report.layers} == {"k_proj", "v_proj", "o_proj"}
    assert report.skipped["model.layers.0.mlp.up_proj"] == "filter_fn said no"
    assert not any(path.endswith("q_proj") or path == "lm_head" for path in asked)
    with pytest.raises(ValueError, match="no layer to prune.*filter_fn said no"):
        api.plan_prune(model, filter_fn=lambda module, path: False)
    with pytest.raises(TypeError, match="filter_fn is called with a module and its path, got 'mlp'"):
        api.plan_prune(model, filter_fn="mlp")


def test_strict_refuses_what_is_otherwise_warned_of():
    model = tiny_models.tiny(intermediate_size=46)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    arguments = {"pattern": "2:4", "method": "magnitude", "progress": False}
    with pytest.raises(
        ValueError, match="strict=True, and 3 layers have in_features that 2:4 does not divide"
    ):
        api.prune(model, strict=True, **arguments)
    with pytest.raises(ValueError, match="strict=True, and ignore=.'nothing'. names no module"):
        api.plan_prune(model, method="magnitude", ignore=("nothing",), strict=True)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    report = api.prune(model, **arguments).report
    assert any("does not divide" in text for text in report.warnings)
    assert api.prune(tiny_models.tiny(), 0.5, strict=True, **{**arguments, "pattern": None}).report.layers


# --- parity with released code ---------------------------------------------------------------------------


def test_released_thresholds_take_one_weight_too_many_and_all_ties():
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
    keep = ReleasedThreshold().keep(scores, 0.5)  # the value at place 4 is 4.0, and it goes too
    assert keep.tolist() == [[False] * 4, [False, True, True, True]]
    tied = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    assert ReleasedThreshold().keep(tied, 0.25).tolist() == [[False, False, False, True]]
    assert Unstructured("matrix").keep(tied, 0.25).tolist() == [[False, True, True, True]]
    assert ReleasedThreshold().keep(scores, 0.0).all()
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        ReleasedThreshold().keep(torch.tensor([[1.0, float("nan")]]), 0.5)


def test_released_masks_of_ptsbench_round_up_and_take_all_ties():
    """n - int((1 - S) n) = 4 of 10 at S = 0.31, where floor gives 3; weights that equal the last one go too."""
    scores = torch.arange(10.0).view(2, 5)
    assert int((~ReleasedThreshold(counting="up").keep(scores, 0.31)).sum()) == 4
    assert int((~Unstructured("matrix").keep(scores, 0.31)).sum()) == 3
    tied = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    assert ReleasedThreshold(counting="up").keep(tied, 0.25).tolist() == [[False, False, False, True]]
    for name in ("erk", "er", "global", "l1norm", "l2norm-v2", "lamp"):
        recipe = as_released(recipe_for("magnitude", None, name))
        assert recipe.structure == ReleasedThreshold(counting="up")
        assert parse_recipe(recipe_to_yaml(recipe)) == recipe
    assert as_released(METHODS["pot"]).structure == ReleasedThreshold(counting="up")
    assert as_released(METHODS["magnitude"]).structure == ReleasedThreshold(counting="past")
    with pytest.raises(ValueError, match="counting is 'past' or 'up', got 'down'"):
        ReleasedThreshold(counting="down")


def test_released_sparsegpt_prunes_both_of_two_weights():
    """The hand example of one weight of two: the exact form prunes one and updates the other, the code both."""
    weight, gram = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    exact = dataclasses.replace(METHODS["sparsegpt"])
    results = []
    for recipe in (exact, as_released(exact)):
        update = dataclasses.replace(recipe.reconstruction, damping=0.0)
        results.append(update.solve(weight, {"gram": gram}, recipe.importance, recipe.structure, 0.5).weight)
    torch.testing.assert_close(results[0], torch.tensor([[0.0, 1.5]]))
    assert torch.equal(results[1], torch.zeros(1, 2))


def test_released_row_mass_bisects_alpha():
    scores = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) ** 2
    keep = ReleasedRowMass().keep(scores, 0.5)
    assert abs(1 - keep.float().mean() - 0.5) <= 2e-3
    assert (keep != RowMass().keep(scores, 0.5)).float().mean() < 0.01
    uneven = torch.tensor([[10.0, 1.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]])  # the second row: all ties, or none
    assert set(ReleasedRowMass().keep(uneven, 0.5)[1].tolist()) in ({True}, {False})
    reached = 1 - ReleasedRowMass().keep(scores, 0.99).float().mean()
    assert 0.8 < reached < 0.97  # alpha ends at 0.8
    ordered = scores.sort(dim=1).values
    sparsities = [
        released._sparsity(released._kept(scores, ordered, ordered.cumsum(1), a / 10)) for a in range(9)
    ]
    assert sparsities[0] == 0.0
    assert sparsities == sorted(sparsities)


def test_compat_is_part_of_the_recipe(tmp_path):
    model, rows = tiny_models.tiny(), tiny_models.tokens()
    exact = api.prune(tiny_models.tiny(), 0.5, "magnitude", progress=False).report
    result = api.prune(model, 0.5, "magnitude", compat="paper", output_dir=tmp_path / "out", progress=False)
    assert [one.pruned for one in result.report.layers] == [one.pruned + 1 for one in exact.layers]
    recipe = as_released(recipe_for("wanda-variant", None, "dlp"))
    assert recipe.allocation == DLP(statistic="mean")
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe
    assert parse_recipe((tmp_path / "out" / "recipe.yaml").read_text()).structure == ReleasedThreshold()
    report = api.prune(
        tiny_models.tiny(), 0.5, "sparsegpt", compat="paper", calibration=rows, progress=False
    ).report
    assert all(one.pruned > one.size // 2 for one in report.layers)
    with pytest.raises(ValueError, match="compat is None or 'paper', got 'released'"):
        api.plan_prune(model, compat="released")


# --- the predicted time ----------------------------------------------------------------------------------


def test_the_time_is_predicted(tmp_path):
    tiny_models.tiny().save_pretrained(tmp_path / "dense")
    planned = api.plan_prune(tmp_path / "dense", 0.5, "sparsegpt", num_samples=4, max_length=32)
    assert planned.forecast.tokens == 128
    assert planned.forecast.pruning > 0 < planned.forecast.calibration
    assert "predicted time: about" in planned.table().caption
    assert planned.to_dict()["predicted_seconds"] == planned.forecast.total
    free = api.plan_prune(tmp_path / "dense", 0.5, "magnitude").forecast
    assert (free.calibration, free.tokens) == (0.0, 0)
    assert plan(discover(tiny_models.tiny("vit")), METHODS["magnitude"]).forecast is None


def test_a_forecast_grows_with_the_work():
    layout = discover(tiny_models.tiny(hidden_size=256, intermediate_size=512, num_hidden_layers=2))
    few, many = (
        forecast.forecast(layout, METHODS["wanda"], 0.5, tokens).calibration for tokens in (100, 1000)
    )
    assert many == pytest.approx(10 * few)
    owl = recipe_for("wanda", None, "owl")
    assert forecast.forecast(layout, owl, 0.5, 100).calibration == pytest.approx(1.5 * few)
    gpt = forecast.forecast(layout, METHODS["sparsegpt"], 0.5, 100)
    assert gpt.calibration > few


# --- mixed n:m by compiled kernels -----------------------------------------------------------------------


def test_mixed_patterns_are_swept_and_selected_by_compiled_kernels():
    mixed = MixedNM(4, 8)
    assert mixed.sweep_pattern((4, 64), 0.25, 128) == mixed.of(0.25).sweep_pattern((4, 64), 0.25, 128)
    weight, scale = torch.randn(4, 64), torch.rand(64)
    keep, pruned = mixed.select(weight, scale, 0.75)
    assert torch.equal(keep, mixed.keep(weight.abs() * scale, 0.75))
    assert torch.equal(pruned, weight * keep)
    gram = torch.eye(64)
    recipe = METHODS["sparsegpt"]
    for sparsity in (0.25, 0.0):
        solved = [
            recipe.reconstruction.solve(weight, {"gram": gram}, recipe.importance, one, sparsity)
            for one in (mixed, mixed.of(sparsity))
        ]
        assert torch.equal(solved[0].weight, solved[1].weight)
    model = tiny_models.tiny()
    report = run(discover(model), recipe_for("sparsegpt", "4:8", [0.375, 0.5, 0.625]), None,
                 load_calibration(tiny_models.tokens()))  # fmt: skip
    assert {one.structure for one in report.layers} == {"5:8", "4:8", "3:8"}
