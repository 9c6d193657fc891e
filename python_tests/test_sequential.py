"""Pruning within a block in order: layers see what became of those before them in the block."""

import pytest
import tiny_models
import torch

from pysparse.calib import load_calibration
from pysparse.measure import torch_threads
from pysparse.methods import METHODS
from pysparse.models.discover import discover
from pysparse.pruning import run


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def pruned(name="llama", propagate="sequential", method="wanda", **settings):
    model = tiny_models.tiny(name, **settings)
    data = load_calibration(tiny_models.tokens(), batch_size=3)
    report = run(discover(model), METHODS[method], 0.5, data, propagate=propagate)
    return model, report


def by_hand(model, groups):
    """Wanda on a model of one block, group after group; the whole model runs again for every group."""
    block = model.model.layers[0]
    for names in groups:
        norms, handles = {}, []
        for name in names:

            def note(module, args, name=name, norms=norms):
                norms[name] = norms.get(name, 0) + args[0].flatten(0, -2).double().square().sum(dim=0)

            handles.append(block.get_submodule(name).register_forward_pre_hook(note))
        with torch.no_grad():
            for rows in tiny_models.tokens().split(3):
                model(rows)
        for handle in handles:
            handle.remove()
        for name in names:
            weight = block.get_submodule(name).weight.data
            order = (weight.abs() * norms[name].sqrt().float()).argsort(dim=1, stable=True)
            weight.scatter_(1, order[:, : weight.shape[1] // 2], 0)


@torch.no_grad()
def test_a_block_is_pruned_group_after_group():
    model, report = pruned(num_hidden_layers=1)
    expected = tiny_models.tiny(num_hidden_layers=1)
    attention, mlp = (
        [f"self_attn.{one}_proj" for one in "qkvo"],
        [f"mlp.{one}_proj" for one in ("gate", "up", "down")],
    )
    by_hand(expected, [attention[:3], attention[3:], mlp[:2], mlp[2:]])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name
    assert [layer.path for layer in report.layers] == [layer.path for layer in discover(model).layers]
    assert report.propagate == "sequential"
    other, _ = pruned(propagate="pruned", num_hidden_layers=1)
    down = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(model.state_dict()[down], other.state_dict()[down])


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "bert", "phi3"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_every_layer_is_pruned_once_with_its_exact_count(name, method):
    model, report = pruned(name, method=method)
    _, plain = pruned(name, propagate="pruned", method=method)
    assert [(one.path, one.pruned) for one in report.layers] == [
        (one.path, one.pruned) for one in plain.layers
    ]
    assert all(one.zeros == one.pruned for one in report.layers)
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
