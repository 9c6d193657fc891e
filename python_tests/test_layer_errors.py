"""On the bundled model's own weights: no layer's output error grows by what comes after the choice of its mask."""

import copy
import dataclasses
from dataclasses import dataclass, field

import pytest
import torch

from pysparse import data, huggingface
from pysparse.calib import load_calibration
from pysparse.measure import torch_threads
from pysparse.methods import recipe_for
from pysparse.models.discover import discover
from pysparse.models.sources import load_tokenizer
from pysparse.pruning import OutputMatching, Reconstruction, match_outputs_, run

LAYERS = 42  # seven matrices in each of six blocks


@dataclass(frozen=True)
class Compared:
    """Notes each layer's output error, and that of its mask on the weights as they were."""

    inner: Reconstruction
    errors: list = field(default_factory=list)

    @property
    def needs(self):
        return tuple(dict.fromkeys(("gram", *self.inner.needs)))

    def solve(self, weight, stats, importance, structure, sparsity):
        pruned = self.inner.solve(weight, stats, importance, structure, sparsity)
        gram = stats["gram"].double()
        lost = [weight.double() - one.double() for one in (pruned.weight, weight * pruned.keep)]
        self.errors.append([float(((one @ gram) * one).sum()) for one in lost])
        return pruned


@pytest.fixture(scope="module")
def bundled():
    model = huggingface.from_pretrained(data.demo_model_path(), format="dense", dtype=torch.float32)
    tokenizer = load_tokenizer(data.demo_model_path())
    return model, load_calibration(data.calibration_texts(), tokenizer, num_samples=8, max_length=256)


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("sparsegpt", None), ("sparsegpt", "2:4"), pytest.param("ebf", None, marks=pytest.mark.slow)],
)
def test_an_update_never_costs_a_layer_of_the_bundled_model(bundled, method, pattern):
    model, calibration = copy.deepcopy(bundled[0]), bundled[1]
    recipe = recipe_for(method, pattern)
    compared = Compared(recipe.reconstruction)
    with torch_threads(1):
        run(discover(model), dataclasses.replace(recipe, reconstruction=compared), 0.5, calibration)
    assert len(compared.errors) == LAYERS
    assert all(updated <= mask_only for updated, mask_only in compared.errors)
    assert sum(updated for updated, _ in compared.errors) < 0.7 * sum(alone for _, alone in compared.errors)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["op", "block"])
def test_tuning_never_costs_a_unit_of_the_bundled_model(bundled, granularity):
    dense, calibration = bundled
    model = copy.deepcopy(dense)
    batches = [{**batch.kwargs, "use_cache": False} for batch in calibration.batches]
    with torch_threads(1):
        run(discover(model), recipe_for("magnitude"), 0.6)
        settings = OutputMatching(granularity, steps=10, weight_lr=1e-4)
        units = match_outputs_(discover(model), dense, batches, settings)
    assert len(units) == (LAYERS if granularity == "op" else 6)
    assert all(unit.after <= unit.before for unit in units)
    assert sum(unit.after < unit.before for unit in units) > len(units) / 2
