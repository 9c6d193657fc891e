"""Neurons, heads, weights and input features as players."""

import dataclasses

import numpy as np
import pytest
import torch

from pysparse import backend
from pysparse.methods import METHODS, ShapleyValue, parse_recipe, recipe_to_yaml
from pysparse.shapley import (
    Exact,
    FunctionGame,
    KernelSHAP,
    PartsGame,
    Permutation,
    ShapleyValueSampling,
    head_parts,
    neuron_game,
    reconstruction_values,
    weight_values,
)

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def exact(game):
    return Exact().estimate(game, 1 << game.n_players).mean


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_walking_is_evaluating(loss):
    targets = normal(3, 4, seed=2) if loss == "squared" else np.array([1, 3, 0])
    game = neuron_game(
        normal(3, 7), normal(4, 7, seed=1), normal(4, seed=3), targets, loss, absent=normal(7, seed=4)
    )
    plain = FunctionGame(game, 7)
    walked = Permutation().estimate(game, 300, seed=1)
    called = Permutation().estimate(plain, 300, seed=1)
    assert walked.mean == pytest.approx(called.mean, abs=1e-12)
    assert np.abs(walked.mean - exact(game)).max() < 5 * walked.stderr.max() + 1e-9


def test_the_neuron_game_is_the_network():
    hidden, weight, bias, targets = (
        normal(5, 6),
        normal(3, 6, seed=1),
        normal(3, seed=2),
        normal(5, 3, seed=3),
    )
    mean = hidden.mean(0)
    game = neuron_game(hidden, weight, bias, targets, absent=mean)
    keep = np.array([[True, False, True, True, False, False]])
    output = np.where(keep, hidden, mean) @ weight.T + bias
    assert game(keep)[0] == pytest.approx(-((output - targets) ** 2).sum(1).mean(), rel=1e-12)


def test_reconstruction_of_attention_heads_in_closed_form():
    heads, projection = torch.from_numpy(normal(9, 5, 3)), torch.from_numpy(normal(8, 15, seed=1))
    parts = head_parts(heads, projection)
    assert torch.allclose(parts.sum(1), heads.flatten(1) @ projection.T)
    phi = reconstruction_values(parts).numpy()
    total = parts.sum(1)
    game = PartsGame(parts.numpy(), np.zeros((9, 8)), total.numpy())
    assert phi / 9 == pytest.approx(exact(game), rel=1e-10)
    assert phi.sum() == pytest.approx(float((total**2).sum()), rel=1e-12)


def test_single_weights_in_closed_form():
    weight, gram = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[2.0, 1, 0], [1, 3, -1], [0, -1, 1]])
    phi = weight_values(weight, gram)
    assert phi.tolist() == [[0.0, 11.0, 1.25]]
    assert float(phi.sum()) == 12.25


def test_the_score_of_a_recipe():
    weight, x = torch.from_numpy(normal(4, 6)).float(), torch.from_numpy(normal(6, 50, seed=1)).float()
    stats = {"gram": x @ x.T}
    single = ShapleyValue()(weight, stats)
    assert torch.allclose(single, (weight * (weight @ stats["gram"])).abs())
    grouped = ShapleyValue(columns=2)(weight, stats)
    parts = torch.stack([weight[:, g : g + 2] @ x[g : g + 2] for g in (0, 2, 4)]).permute(2, 0, 1)
    phi = reconstruction_values(parts).abs().float()
    assert torch.allclose(grouped[0, ::2] * 8, phi, rtol=1e-4)
    assert torch.equal(grouped[:, ::2], grouped[:, 1::2])
    with pytest.raises(ValueError, match="6 input columns are no multiple of the 4"):
        ShapleyValue(columns=4)(weight, stats)
    with pytest.raises(ValueError, match="got -1"):
        ShapleyValue(columns=-1)


def test_the_recipe_is_saved_and_read():
    recipe = dataclasses.replace(METHODS["shapley"], importance=ShapleyValue(columns=16))
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe


def test_bad_parts_are_named():
    parts = normal(2, 3, 4)
    with pytest.raises(ValueError, match="the constant has shape"):
        PartsGame(parts, np.zeros((2, 5)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"classes are in \[0, 4\), got 0 to 4"):
        PartsGame(parts, np.zeros((2, 4)), np.array([0, 4]), "cross-entropy")
    with pytest.raises(ValueError, match="targets have shape"):
        PartsGame(parts, np.zeros((2, 4)), np.zeros(2))
    with pytest.raises(ValueError, match="a projection of 14 inputs for 5 heads of 3"):
        head_parts(torch.zeros(2, 5, 3), torch.zeros(8, 14))
    damaged = parts.copy()
    damaged[0, 1, 2] = np.nan
    with pytest.raises(ValueError, match="is nan"):
        Permutation().estimate(PartsGame(damaged, np.zeros((2, 4)), np.zeros((2, 4))), 100)


def model(x):
    return torch.stack([x[:, 0] * x[:, 1] + x[:, 2], (x[:, 2] - x[:, 3]).relu()], dim=1)


def test_attributions_add_up_and_are_those_of_enumeration():
    x = torch.from_numpy(normal(3, 4)).double()
    found = ShapleyValueSampling(model).attribute_with_error(
        x, baselines=0.5, target=1, n_samples=400, seed=3
    )
    for row in range(3):

        def value(keep, row=row):
            return model(torch.where(keep, x[row], 0.5))[:, 1]

        truth = exact(FunctionGame(value, 4, inputs="torch"))
        assert np.abs(found.values[row].numpy() - truth).max() < 5 * float(found.stderr[row].max()) + 1e-9
    gain = model(x)[:, 1] - model(torch.full_like(x, 0.5))[:, 1]
    assert torch.allclose(found.values.sum(1), gain)
    assert found.evaluations == 3 * (2 + 400 * 6)


def test_attributions_of_interactions_of_order_two_need_one_pair():
    x = torch.from_numpy(normal(2, 4))
    values = ShapleyValueSampling(model).attribute(x, target=0, n_samples=1)
    expected = torch.stack([x[:, 0] * x[:, 1] / 2, x[:, 0] * x[:, 1] / 2, x[:, 2], 0 * x[:, 3]], dim=1)
    assert torch.allclose(values, expected)


def test_attributions_depend_on_the_seed_alone():
    x = torch.from_numpy(normal(2, 2, 3))
    net = ShapleyValueSampling(lambda z: torch.tanh(z.flatten(1) * 3 + 1.0).prod(1), KernelSHAP())
    state = torch.random.get_rng_state()
    first = net.attribute(x, n_samples=9, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, net.attribute(x, n_samples=9, seed=1, perturbations_per_eval=2))
    assert not torch.equal(first, net.attribute(x, n_samples=9, seed=2))


def test_a_feature_mask_groups_entries():
    x = torch.from_numpy(normal(2, 4))
    mask = torch.tensor([[0, 0, 1, 1]])
    values = ShapleyValueSampling(model).attribute(
        x, target=torch.tensor([0, 0]), feature_mask=mask, n_samples=2
    )
    assert torch.allclose(values[:, 0], x[:, 0] * x[:, 1])
    assert torch.equal(values[:, 0], values[:, 1])
    assert torch.allclose(values[:, 2], x[:, 2])


def test_bad_attribution_input_is_named():
    net, x = ShapleyValueSampling(model), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="n_samples is at least 1, got 0"):
        net.attribute(x, n_samples=0)
    with pytest.raises(ValueError, match="without gaps"):
        net.attribute(x, feature_mask=torch.tensor([0, 0, 2, 3]))
    with pytest.raises(ValueError, match="1 targets for 2 inputs"):
        net.attribute(x, target=torch.tensor([1]))
    with pytest.raises(ValueError, match="inputs are floats"):
        net.attribute(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="is nan"):
        ShapleyValueSampling(lambda z: z.sum(1) / 0.0 * 0.0).attribute(x)
