"""Heads, neurons and blocks of a transformers model as players of its forward pass, beside surgery on the weights."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import tiny, tokens
from torch import nn

from pysparse import backend
from pysparse.models.players import players_of
from pysparse.shapley import Exact, ForwardGame, Part, Permutation, input_means, input_parts, next_token_loss

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=6)  # 6 blocks, 24 heads, 36 groups of 8 neurons


@pytest.fixture(scope="module")
def ids():
    return tokens(3, 16)


def loss_of(model, ids):
    with torch.no_grad():
        return float(next_token_loss(model(ids), ids).double().mean())


def one_absent(game, player):
    coalition = np.ones((1, game.n_players), bool)
    coalition[0, player] = False
    return game(coalition)[0]


def test_blocks_are_those_of_a_shorter_model(model, ids):
    names, parts = zip(*players_of(model, "blocks"), strict=True)
    game = ForwardGame(model, ids, parts)
    assert len(names) == model.config.num_hidden_layers
    assert game(np.ones((1, len(parts)), bool))[0] == pytest.approx(-loss_of(model, ids), abs=1e-5)
    shorter = copy.deepcopy(model)
    del shorter.model.layers[2]
    assert one_absent(game, 2) == pytest.approx(-loss_of(shorter, ids), abs=1e-5)


@pytest.mark.parametrize(("kind", "group"), [("heads", 1), ("neurons", 8)])
def test_inputs_are_columns_of_the_weight(model, ids, kind, group):
    players = players_of(model, kind, group)
    path, part = players[len(players) // 2][0].partition("[")[0], players[len(players) // 2][1]
    changed = copy.deepcopy(model)
    changed.get_submodule(path).weight.data[:, part.begin : part.end] = 0
    game = ForwardGame(model, ids, [part for _, part in players])
    value = one_absent(game, len(players) // 2)
    assert value == pytest.approx(-loss_of(changed, ids), abs=1e-5)
    assert abs(value + loss_of(model, ids)) > 1e-4  # the part does something


def test_estimates_of_blocks_are_near_the_exact_values(model, ids):
    game = ForwardGame(model, ids[:1], [part for _, part in players_of(model, "blocks")], rows=32)
    exact = Exact().estimate(game, 64)
    ends = game(np.array([[False] * 6, [True] * 6]))
    assert exact.mean.sum() == pytest.approx(ends[1] - ends[0], abs=1e-6)
    found = Permutation().estimate(game, budget=2 + 10 * Permutation().cost(6), seed=1)
    assert (np.abs(found.mean - exact.mean) <= 5 * found.stderr + 1e-6).all()
    assert exact.mean.argmax() == found.mean.argmax()


def test_values_do_not_depend_on_how_many_go_at_once(model, ids):
    parts = [part for _, part in players_of(model, "heads")]
    coalitions = np.random.default_rng(0).random((5, len(parts))) < 0.7
    values = [ForwardGame(model, ids, parts, rows=rows)(coalitions) for rows in (1, 4, 64)]
    np.testing.assert_allclose(values[1:], [values[0]] * 2, rtol=0, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_absent_inputs_may_have_their_means(model, ids):
    parts = [part for _, part in players_of(model, "neurons", group=8)][:3]
    means = input_means(model, ids, parts)
    seen = []
    handle = parts[0].module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loss_of(model, ids)
    handle.remove()
    torch.testing.assert_close(means[1], seen[0].flatten(0, 1)[:, 8:16].mean(0), atol=1e-6, rtol=1e-5)
    with_means = one_absent(ForwardGame(model, ids, parts, means=means), 1)
    assert with_means != one_absent(ForwardGame(model, ids, parts), 1)


def test_bad_input(model, ids):
    (_, block), *_ = players_of(model, "blocks")
    with pytest.raises(ValueError, match="1 to"):
        ForwardGame(model, ids, [])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        ForwardGame(model, ids[:, :1], [block])
    with pytest.raises(ValueError, match="means are one tensor"):
        ForwardGame(model, ids, [block], means=[torch.zeros(1)])
    with pytest.raises(ValueError, match="as a whole has one part"):
        ForwardGame(model, ids, [block, Part(block.module, 0, 2)])
    with pytest.raises(ValueError, match="groups of 3 do not divide 16"):
        input_parts(nn.Linear(16, 4), 3)
    with pytest.raises(ValueError, match="'blocks', 'heads' or 'neurons', got 'layers'"):
        players_of(model, "layers")
    whole = ForwardGame(model, ids, [Part(block.module)], loss=lambda output, ids: output.logits.mean())
    with pytest.raises(ValueError, match="one for each of"):
        whole(np.ones((1, 1), bool))
