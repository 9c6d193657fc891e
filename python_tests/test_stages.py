"""Recipes with stages: structure, then zeros; as YAML, planned, resumed or refused."""

import json

import pytest
import tiny_models
import torch
from test_structure_files import files, logits
from test_two_ssp import BLOCKS, contents, deep, same

import pysparse
from pysparse.measure import torch_threads
from pysparse.methods import METHODS, TwoSSP, load_recipe, parse_recipe, recipe_to_yaml
from pysparse.pruning import NM, Stage, StagedRecipe

ROWS = tiny_models.tokens(4, 12)
STAGES = """
stages:
- {type: TwoSSP, sparsity: 0.35, n_attn: 1, multiple_of: 4}
- {method: wanda, pattern: "2:4"}
"""


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def test_both_stages_run_and_the_recipe_is_saved(tmp_path):
    (tmp_path / "r.yaml").write_text(STAGES)
    model = deep("llama")
    result = pysparse.prune(
        model, recipe=tmp_path / "r.yaml", calibration=ROWS, output_dir=tmp_path / "out", progress=False
    )
    structure, zeros = result.report.stages
    assert len(structure.steps) == 1
    assert {one.width % 4 for one in structure.blocks} == {0}
    assert zeros.sparsity == 0.5
    assert len(zeros.layers) == 7 * BLOCKS - 4
    saved = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert saved.stages[0] == Stage(TwoSSP(n_attn=1, multiple_of=4), 0.35)
    assert saved.stages[1].method.structure == NM(2, 4)
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert len(report["stages"]) == 2
    torch.testing.assert_close(
        logits(pysparse.from_pretrained(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4
    )


def test_statistics_are_those_of_the_smaller_model():
    """The same bits as two calls, of which the second sees a model that has been cut."""
    recipe = StagedRecipe((Stage(TwoSSP(n_attn=1), 0.35), Stage(METHODS["wanda"], 0.5)))
    model, twice = deep("qwen2"), deep("qwen2")
    pysparse.prune(model, recipe=recipe, calibration=ROWS, progress=False)
    pysparse.prune(twice, 0.35, "2ssp:n_attn=1", calibration=ROWS, progress=False)
    pysparse.prune(twice, 0.5, "wanda", calibration=ROWS, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twice.parameters(), strict=True))


def test_yaml_and_back():
    recipe = StagedRecipe((
        Stage(TwoSSP(widths=(1, 2), n_attn=0)), Stage(METHODS["sparsegpt"], 0.5), Stage(METHODS["wanda"], 0.7),
    ))  # fmt: skip
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe
    assert parse_recipe("stages: [2ssp, wanda]").stages == (Stage(TwoSSP()), Stage(METHODS["wanda"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: []", "needs at least one"),
        ("stages: 2ssp", "stages is a list, got str"),
        ("stages: [wanda, 2ssp]", "go from structure .once. to zeros to adaptation, got Recipe, TwoSSP"),
        ("stages: [2ssp, 2ssp]", "go from structure .once."),
        ("stages: [3]", "stage 1 maps settings to values, got int"),
        ("stages: [{type: Nothing}]", "stage 1 has the unknown type 'Nothing'; known: .*TwoSSP"),
        ("stages: [{type: TwoSSP, beta: 1}]", "stage 1 TwoSSP has unknown keys beta"),
        ("stages: [{method: wanda, sparsity: half}]", "stage 1: sparsity is a str"),
        ("stages: [{method: 2ssp, pattern: '2:4'}]", "pattern and allocation do not apply"),
        ("{stages: [2ssp], seed: 1}", "a recipe with stages has unknown keys seed"),
    ],
)
def test_wrong_stages_are_said(text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("stages", "settings", "message"),
    [
        ((Stage(TwoSSP(), 0.3), Stage(METHODS["wanda"], 1.5)), {}, "sparsity is a fraction"),
        ((Stage(TwoSSP(n_attn=0), 0.95), Stage(METHODS["wanda"])), {}, "sparsity=0.95 cannot be met"),
        ((Stage(TwoSSP(), 0.3), Stage(METHODS["wanda"])), {"sparsity": 0.5}, "each stage of this recipe has"),
        ((Stage(TwoSSP(), 0.3), Stage(METHODS["wanda"])), {"resume": True}, "a recipe with several stages starts over"),
    ],
)  # fmt: skip
def test_what_cannot_be_leaves_the_model_alone(stages, settings, message, tmp_path):
    model = deep("llama")
    before = contents(model)
    with pytest.raises(ValueError, match=message):
        pysparse.prune(model, recipe=StagedRecipe(stages), calibration=ROWS, output_dir=tmp_path / "x",
                       progress=False, **settings)  # fmt: skip
    assert same(contents(model), before)
    assert not (tmp_path / "x").exists()


def test_an_unknown_stage_is_refused():
    with pytest.raises(TypeError, match="str is no method that a stage can run"):
        pysparse.prune(
            deep("llama"), recipe=StagedRecipe((Stage("wanda"),)), calibration=ROWS, progress=False
        )


@pytest.mark.parametrize("method", ["2ssp:n_attn=2", "shortgpt"])
def test_an_interrupted_run_goes_on_to_the_same_bits(method, tmp_path, monkeypatch):
    def run(output, **settings):
        return pysparse.prune(
            tmp_path / "dense", 0.4, method, calibration=ROWS, output_dir=output, progress=False, **settings
        )

    deep("llama").save_pretrained(tmp_path / "dense")
    run(tmp_path / "whole")
    from pysparse.api import stages

    with monkeypatch.context() as patch:
        patch.setattr(stages, "state_in_config", lambda *args: 1 / 0)  # a crash when all has been found
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "again")
    with pytest.raises(FileExistsError, match="an interrupted run left its progress"):
        run(tmp_path / "again")
    with pytest.raises(ValueError, match="calibration was"):
        pysparse.prune(tmp_path / "dense", 0.4, method, calibration=ROWS[:2], output_dir=tmp_path / "again",
                       progress=False, resume=True)  # fmt: skip
    with monkeypatch.context() as patch:  # nothing is searched or scored anew
        patch.setattr("pysparse.pruning.depth.AttentionSearch.step", None)
        patch.setattr("pysparse.pruning.structural.block_influences", None)
        patch.setattr("pysparse.pruning.structural.neuron_scores", None)
        run(tmp_path / "again", resume=True)
    whole, again = files(tmp_path / "whole"), files(tmp_path / "again")
    assert whole["model.safetensors"] == again["model.safetensors"]
    assert whole["config.json"] == again["config.json"]
    assert not (tmp_path / "again.pruning-progress").exists()


# --- plans and the command line --------------------------------------------------------------------------


def test_a_plan_says_what_the_run_then_does(tmp_path):
    model = deep("llama")
    model.save_pretrained(tmp_path)
    before = contents(model)
    plans = [pysparse.plan_prune(source, 0.4, "2ssp:n_attn=2") for source in (model, tmp_path)]
    assert plans[0] == plans[1]
    assert same(contents(model), before)
    report = pysparse.prune(model, 0.4, "2ssp:n_attn=2", calibration=ROWS, progress=False).report
    assert plans[0].attentions == len(report.steps) == 2
    assert plans[0].widths == tuple(one.width for one in report.blocks)
    norms = 2 * 32  # of the removed attentions, which the closed form does not count
    assert plans[0].removed == sum(one.parameters_before - one.parameters for one in report.blocks) - norms
    assert pysparse.plan_prune(deep("gpt2"), 0.4, "shortgpt").blocks == 2
    with pytest.raises(ValueError, match="cannot be met"):
        pysparse.plan_prune(tmp_path, 0.95, "2ssp:n_attn=0")


def test_later_stages_are_planned_on_what_earlier_ones_leave():
    model = deep("llama")
    before = contents(model)
    plan = pysparse.plan_prune(model, recipe=parse_recipe(STAGES))
    assert same(contents(model), before)
    structure, zeros = plan.stages
    assert len(zeros.layers) == 7 * BLOCKS - 4
    up = next(layer for layer in zeros.layers if layer.path == "model.layers.0.mlp.up_proj")
    assert up.shape == (structure.widths[0], 32)
    assert "later stages are planned without the first ones" in plan.notes[0]
    assert json.dumps(plan.to_dict())


def test_the_command_line(tmp_path, capsys):
    from typer.testing import CliRunner

    from pysparse.cli.main import app

    deep("llama").save_pretrained(tmp_path / "dense")
    command = ["prune", str(tmp_path / "dense"), "--method", "2ssp:n_attn=1", "--sparsity", "0.3"]
    plan = CliRunner().invoke(app, [*command, "--dry-run", "--json", "-"])
    assert plan.exit_code == 0, plan.output
    assert json.loads(plan.stdout)["attentions"] == 1
    refused = CliRunner().invoke(app, [*command[:-1], "0.99", "--dry-run"])
    assert refused.exit_code == 2
    assert "cannot be met" in refused.output
