"""Every technique of PTSBench in the vision grid, and what each does to a model."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from pysparse.suite.grid import load_grid
from pysparse.suite.pruning import prune_copy
from pysparse.suite.recipes import plan_for
from pysparse.suite.tasks import task_for
from pysparse.suite.vision import detectors
from pysparse.suite.vision.architectures import ARCHITECTURES
from pysparse.suite.vision.generator import GENERATORS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYSPARSE_CACHE_DIR", str(tmp_path / "cache"))


GRID = Path(__file__).parents[1] / "benchmarks" / "grids" / "vision.toml"
TECHNIQUES = {
    "allocation": {"er", "erk", "global", "l1norm", "l2norm", "lamp"},
    "reconstruction": {"op", "layer", "block", "correct"},
}


def test_the_grid_names_every_technique_of_ptsbench():
    plans = [plan_for(cell) for cell in load_grid(GRID).cells]
    assert {plan.allocation for plan in plans} >= TECHNIQUES["allocation"]
    assert {str(plan.reconstruction).partition(":")[0] for plan in plans} >= TECHNIQUES["reconstruction"]
    assert {plan.learned.loss for plan in plans if plan.learned} == {"kl", "mse"}
    assert {plan.matching.inputs for plan in plans if plan.matching} == {"dense", "sparse"}
    assert any(plan.spec.recalibrate for plan in plans)
    assert any(plan.spec.fold_batch_norm for plan in plans)
    assert {plan.spec.method for plan in plans} >= {"filter-l2", "fpgm", "pot"}


def shortened(cell):
    """The cell with one step of everything that takes many."""
    changes = {
        name: re.sub(r"(steps|epochs)=\d+", r"\1=2", value)
        for name in ("allocation", "reconstruction")
        if (value := getattr(cell.spec, name))
    }
    return dataclasses.replace(cell, spec=dataclasses.replace(cell.spec, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("classification", "resnet-basic"),
        ("classification", "vit"),
        ("detection", "swin"),
        ("generation", "flow-unet"),
        ("generation", "vae-decoder"),
    ],
)
def test_every_recipe_of_the_grid_runs_on_its_task(task, model, monkeypatch):
    for name, architecture in ARCHITECTURES.items():
        monkeypatch.setitem(ARCHITECTURES, name, dataclasses.replace(architecture, epochs=1))
    monkeypatch.setattr(detectors, "EPOCHS", 1)
    for name, generator in GENERATORS.items():
        monkeypatch.setitem(GENERATORS, name, dataclasses.replace(generator, epochs=1))
    chosen = task_for(task)
    dense = chosen.load(model, seed=0)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    cells = {one.recipe: one for one in load_grid(GRID).cells if (one.task, one.model) == (task, model)}
    assert len(cells) >= 10
    for cell in cells.values():
        short = shortened(cell)
        found = prune_copy(dense, chosen, short, plan_for(short))
        assert found.sparsity == pytest.approx(cell.sparsity, abs=0.03), cell.recipe
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
