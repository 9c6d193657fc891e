"""Mixed n:m: layers with an n of their own and the zeros of the plain pattern in all."""

import dataclasses
import itertools

import pytest
import tiny_models
import torch
from allocation_cases import block
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse.calib import load_calibration
from pysparse.measure import torch_threads
from pysparse.methods import (
    ATP,
    recipe_for,
)
from pysparse.models.discover import discover
from pysparse.pruning import (
    NM,
    MixedNM,
    Unstructured,
    plan,
    project,
    run,
)
from pysparse.pruning.mixed import pattern_of


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 12), pattern=st.sampled_from([(4, 8), (2, 4), (1, 4), (3, 5), (2, 8)]),
    spread=st.floats(0, 0.3), seed=st.integers(0, 99), unequal=st.booleans(),
)  # fmt: skip
def test_mixed_patterns_have_exactly_the_zeros_of_the_plain_one(count, pattern, spread, seed, unequal):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(1, 4, (count,), generator=generator).tolist() if unequal else [2] * count
    layers = [block(torch.ones(6, width * m + (1 if unequal else 0)), index=i).layers[0]
              for i, width in enumerate(widths)]  # fmt: skip
    wishes = project(
        [1 - n / m + spread * float(torch.randn(1, generator=generator)) for _ in range(count)],
        [evidence.layer.size for evidence in layers], 1 - n / m, 0.0, 1 - 1 / m,
    )  # fmt: skip
    structure = MixedNM(n, m)
    try:
        found = structure.round([evidence.layer for evidence in layers], wishes)
    except ValueError as error:
        assert unequal
        assert "sizes have too little in common" in str(error)  # noqa: PT017
        return
    pruned = sum(
        structure.pruned_count(*evidence.layer.shape, s) for evidence, s in zip(layers, found, strict=True)
    )
    assert pruned == sum(NM(n, m).pruned_count(*evidence.layer.shape, 1 - n / m) for evidence in layers)
    if not unequal:  # at most a whole step away, and never in the wrong order
        assert all(abs(s - wish) * m < 1 + 1e-9 for s, wish in zip(found, wishes, strict=True))
        order = sorted(range(count), key=lambda i: wishes[i])
        assert all(found[a] <= found[b] for a, b in itertools.pairwise(order))


def test_the_rounding_is_the_nearest():
    layers = [block(torch.ones(4, 8), index=i).layers[0].layer for i in range(4)]
    assert MixedNM(4, 8).round(layers, [0.30, 0.45, 0.58, 0.67]) == [0.25, 0.5, 0.625, 0.625]
    assert MixedNM(2, 4).round(layers, [0.45, 0.48, 0.52, 0.55]) == [0.5] * 4
    big = [block(torch.ones(8, 8), index=0).layers[0].layer, *layers]  # twice the others' weights
    found = MixedNM(4, 8).round(big, [0.55, 0.45, 0.45, 0.45, 0.55])
    assert 2 * found[0] + sum(found[1:]) == 6 * 0.5


def test_layers_of_a_block_share_an_answer_where_that_is_exact():
    pairs = [block(torch.ones(4, 8), torch.ones(8, 8), index=i).layers for i in range(3)]
    layers = [evidence.layer for pair in pairs for evidence in pair]
    found = MixedNM(4, 8).round(layers, [0.38] * 2 + [0.5] * 2 + [0.62] * 2)
    assert found == [0.375] * 2 + [0.5] * 2 + [0.625] * 2


def test_a_layers_pattern():
    structure = MixedNM(4, 8)
    assert pattern_of(structure, 0.375) == NM(5, 8)
    assert pattern_of(structure, 0.0) == Unstructured()
    assert pattern_of(NM(2, 4), 0.5) == NM(2, 4)
    scores = torch.rand(3, 16)
    assert structure.keep(scores, 0.625).sum() == 3 * 2 * 3
    assert torch.equal(structure.keep_columns(scores[:, 8:], 0.625, 8), structure.keep(scores, 0.625)[:, 8:])
    assert structure.step(20) == NM(4, 8).step(20)
    for sparsity in (0.4, 1.0):
        with pytest.raises(ValueError, match=rf"sparsity={sparsity:g} is not one of 0/8 .. 7/8"):
            structure.of(sparsity)
    with pytest.raises(ValueError, match="keeps 0 < n < m <= 64 weights, got 4:4"):
        MixedNM(4, 4)


def test_mixed_patterns_in_the_loop_and_in_the_plan(caplog):
    model, calibration = tiny_models.tiny("llama"), load_calibration(tiny_models.tokens())
    recipe = recipe_for("wanda", "4:8", ATP(0.2))
    planned = plan(discover(model), recipe)
    report = run(discover(model), recipe, None, calibration)
    assert [layer.structure for layer in report.layers] == ["6:8"] * 7 + ["4:8"] * 7 + ["2:8"] * 7
    assert [(layer.pruned, layer.structure) for layer in planned.layers] == [
        (layer.pruned, layer.structure) for layer in report.layers
    ]
    assert report.sparsity == 0.5
    assert "7 layers 2:8, 7 layers 4:8, 7 layers 6:8" in report.warnings[0]
    assert "n:m differs by layer" in caplog.text
    for layer in discover(model).layers:
        kept = (layer.weight != 0).unflatten(1, (-1, 8)).sum(dim=2)
        assert int(kept.max()) == (6, 4, 2)[layer.block]
    narrow = plan(discover(model), recipe_for("wanda", "2:4", ATP(0.01)))
    assert "differs too little between layers to move any from 2:4" in narrow.warnings[0]


def test_a_fixed_pattern_refuses_an_allocation():
    recipe = dataclasses.replace(recipe_for("magnitude", "2:4"), allocation=ATP(0.1))
    with pytest.raises(ValueError, match=r"fixes it at 0.5: use the uniform allocation, .* or MixedNM"):
        run(discover(tiny_models.tiny("llama")), recipe)
