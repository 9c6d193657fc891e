"""Magnitude and Wanda against their vectors, the registry, and recipes as YAML."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse.methods import (
    ALLOCATIONS,
    COMPONENTS,
    METHODS,
    InverseHessian,
    Magnitude,
    ObsUpdate,
    Wanda,
    load_recipe,
    parse_recipe,
    recipe_for,
    recipe_to_yaml,
)
from pysparse.pruning import NM, Keep, Recipe, RowMass, Uniform, Unstructured

WEIGHT = torch.tensor([[1.0, -2, 3, -4], [4, 3, -2, 1]])
NORMS = torch.tensor([4.0, 1, 1, 0.5])


def wanda(weight, norms, structure, sparsity):
    return Keep().solve(weight, {"squared_norm": norms.square()}, Wanda(), structure, sparsity)


# --- scores ----------------------------------------------------------------------------------------------


def test_vector_of_the_scores():
    scores = Wanda()(WEIGHT, {"squared_norm": NORMS.square()})
    assert scores.tolist() == [[4, 2, 3, 2], [16, 3, 2, 0.5]]
    assert Magnitude()(WEIGHT, {}).tolist() == WEIGHT.abs().tolist()
    assert Magnitude()(WEIGHT.bfloat16(), {}).dtype == torch.float32


@pytest.mark.parametrize("structure", [Unstructured("row"), NM(2, 4)], ids=str)
def test_vector_of_the_masks(structure):
    assert wanda(WEIGHT, NORMS, structure, 0.5).weight.tolist() == [[1, 0, 3, 0], [4, 3, 0, 0]]


@pytest.mark.parametrize("structure", [Unstructured("row"), NM(2, 4), NM(1, 4)], ids=str)
def test_equal_norms_give_the_mask_of_magnitude(structure):
    weight = torch.randn(20, 32)
    sparsity = structure.fixed_sparsity or 0.6
    expected = Keep().solve(weight, {}, Magnitude(), structure, sparsity)
    assert torch.equal(wanda(weight, torch.full((32,), 3.0), structure, sparsity).keep, expected.keep)


@settings(max_examples=40, deadline=None)
@given(channel=st.integers(0, 15), exponent=st.integers(-6, 6))
def test_what_is_moved_from_the_weight_to_the_input_changes_nothing(channel, exponent):
    generator = torch.Generator().manual_seed(channel)
    weight, norms = torch.randn(9, 16, generator=generator), torch.rand(16, generator=generator) + 0.1
    moved_weight, moved_norms = weight.clone(), norms.clone()
    moved_weight[:, channel] /= 2.0**exponent  # powers of two: exact
    moved_norms[channel] *= 2.0**exponent
    expected = wanda(weight, norms, Unstructured("row"), 0.5).keep
    assert torch.equal(wanda(moved_weight, moved_norms, Unstructured("row"), 0.5).keep, expected)


def test_inputs_that_are_always_zero_go_first():
    norms = torch.ones(16)
    norms[[3, 7]] = 0
    keep = wanda(torch.randn(50, 16), norms, Unstructured("row"), 2 / 16).keep
    assert not keep[:, [3, 7]].any()
    assert int(keep.sum()) == 50 * 14


# --- Wanda's variant -------------------------------------------------------------------------------------


def bisected(scores, sparsity):
    """The released code's way: one share alpha of each row's total, by bisection, here to the last bit."""
    ordered, order = scores.double().sort(dim=1, stable=True)
    mass = ordered.cumsum(dim=1)
    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        gone = mass <= alpha * mass[:, -1:]
        low, high = (alpha, high) if gone.double().mean() <= sparsity else (low, alpha)
    gone = mass <= low * mass[:, -1:]
    return torch.ones(scores.shape, dtype=torch.bool).scatter_(1, order, ~gone)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), sparsity=st.floats(0.05, 0.9))
def test_the_variant_prunes_one_share_of_every_rows_score(seed, sparsity):
    scores = torch.rand(7, 24, generator=torch.Generator().manual_seed(seed)) ** 3 + 1e-3
    keep, reference = RowMass().keep(scores, sparsity), bisected(scores, sparsity)
    assert int((~keep).sum()) == int(sparsity * scores.numel() + 1e-9) == int((~reference).sum())
    assert torch.equal(keep, reference)
    assert torch.equal(RowMass().keep(scores * torch.logspace(-2, 2, 7)[:, None], sparsity), keep)
    assert not (~RowMass().keep(scores, sparsity / 2) & keep).any()  # nested
    counts = (~RowMass().keep(scores * (1 + 9 * torch.rand(7, 24)), 0.5)).sum(dim=1)
    assert int(counts.sum()) == 84


def test_the_variant_gives_rows_their_own_counts():
    scores = torch.tensor([[1.0, 1, 1, 1], [0.1, 0.1, 0.1, 9]])
    assert RowMass().keep(scores, 0.5).tolist() == [[False, True, True, True], [False, False, False, True]]
    assert RowMass().keep(scores, 0.0).all()  # no share, nothing pruned
    assert RowMass().keep(torch.zeros(2, 4), 0.25).tolist() == [[False, False, True, True], [True] * 4]
    with pytest.raises(ValueError, match="1 of 8 scores are NaN or negative"):
        RowMass().keep(torch.tensor([[1.0, 1, 1, 1], [1, 1, float("nan"), 1]]), 0.5)
    with pytest.raises(ValueError, match="known for whole rows alone"):
        RowMass().step(128)


# --- the registry ----------------------------------------------------------------------------------------


def test_methods_by_name():
    assert METHODS["magnitude"] == Recipe(Magnitude(), Uniform(), Unstructured("matrix"), Keep())
    assert recipe_for("wanda", "unstructured") is METHODS["wanda"] is recipe_for("wanda")
    assert recipe_for("wanda", "4:8").structure == NM(4, 8)
    assert not METHODS["magnitude"].needs_calibration
    assert METHODS["wanda"].needs == ("squared_norm",)
    assert {"uniform", "owl", "dlp", "atp", "global"} <= set(ALLOCATIONS)
    assert set(METHODS) >= {"magnitude", "magnitude-row", "magnitude-global", "wanda"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wonda",), r"unknown method 'wonda' \(did you mean 'wanda'\?\); known: .*magnitude, .*wanda"),
        (("obs",), "unknown method 'obs'; known: .*magnitude, .*wanda"),
        (("wanda", None, "uniforme"), "unknown allocation 'uniforme' .did you mean 'uniform'"),
        (("wanda", "2-4"), '"n:m" with n kept of m, got "2-4"'),
        (("wanda", "4:2"), '"n:m" with n kept of m, got "4:2"'),
        (("wanda", "²:4"), '"n:m" with n kept of m'),
        (("wanda", "2:128"), "keeps 0 < n < m <= 64 weights, got 2:128"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        recipe_for(*arguments)


# --- YAML ------------------------------------------------------------------------------------------------

RECIPES = [
    Recipe(importance, Uniform(), structure, reconstruction)
    for importance in (Magnitude(), Wanda(), InverseHessian(damping=0.1))
    for reconstruction in (Keep(), ObsUpdate(damping=0.02, block_size=64))
    for structure in (Unstructured("row"), Unstructured("matrix"), NM(2, 4), NM(1, 16), RowMass())
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipes_survive_yaml(recipe, tmp_path):
    text = recipe_to_yaml(recipe)
    assert parse_recipe(text) == recipe
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_short_form():
    text = "importance: Wanda\nallocation: Uniform\nstructure: {type: NM, n: 2, m: 4}\nreconstruction: Keep\n"
    assert parse_recipe(text) == recipe_for("wanda", "2:4")


GOOD = "importance: Wanda\nallocation: Uniform\nstructure: Unstructured\nreconstruction: Keep\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe maps importance, allocation, structure, reconstruction to a type each, got NoneType"),
        ("- a", "got list"),
        (GOOD.replace("allocation: Uniform\n", ""), "the recipe lacks allocation"),
        (GOOD + "sparsty: 0.5\n", "unknown keys sparsty; known: importance, allocation"),
        (
            GOOD.replace("Wanda", "Wonda"),
            "importance has the unknown type 'Wonda'; known: .*Magnitude, .*Wanda",
        ),
        (GOOD.replace("Wanda", "Keep"), "importance has the unknown type 'Keep'"),
        (
            GOOD.replace("Wanda", "{type: Wanda, alpha: 1}"),
            "importance Wanda has unknown keys alpha; known: type",
        ),
        (
            GOOD.replace("Unstructured", "{type: Unstructured, group: tile}"),
            "group is 'row' or 'matrix', got 'tile'",
        ),
        (GOOD.replace("Unstructured", "{type: NM, n: 2}"), "structure NM: .*missing.*'m'"),
        (GOOD.replace("Unstructured", "{type: NM, n: 4, m: 4}"), "keeps 0 < n < m <= 64"),
        (GOOD.replace("Unstructured", "{type: NM, n: '2', m: 4}"), "whole number, got '2'"),
        (GOOD.replace("Unstructured", "{type: NM, n: [2], m: 4}"), "n is a list, expected a plain value"),
        (GOOD.replace("Unstructured", "{n: 2, m: 4}"), "structure needs a type, one of NM, .*Unstructured"),
        (GOOD.replace("Wanda", "{type: [Wanda]}"), "importance has the unknown type"),
        (GOOD.replace("Wanda", "7"), "importance needs a type"),
        ("a: [", "not plain YAML"),
    ],
)
def test_recipes_with_mistakes(text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize(
    "attack",
    [
        "!!python/object/apply:os.system ['touch HERE']",
        "!!python/object/new:os.system ['touch HERE']",
        "!!python/name:os.system",
        "!!python/module:os",
        "{type: !!python/name:os.system }",
        "{type: __class__}",
        "{type: os.system}",
        "{type: Wanda, __class__: x}",
        "{type: Wanda, __init__: x}",
    ],
)
def test_hostile_recipes_are_refused(attack, tmp_path):
    victim = tmp_path / "touched"
    with pytest.raises(ValueError, match=r"not plain YAML|unknown type|unknown keys"):
        parse_recipe(GOOD.replace("Wanda", attack.replace("HERE", str(victim))))
    assert not victim.exists()


def test_recipes_that_would_grow_without_bound_are_refused(tmp_path):
    bomb = "a: &a {x: 1}\n" + "".join(
        f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(ValueError, match="aliases"):
        parse_recipe(bomb)
    with pytest.raises(ValueError, match="not plain YAML"):
        parse_recipe("[" * 1_000)
    with pytest.raises(ValueError, match="may have 4096"):
        parse_recipe("#" * 5_000)
    (tmp_path / "big.yaml").write_text("#" * 5_000)
    with pytest.raises(ValueError, match="big.yaml has 5000 bytes"):
        load_recipe(tmp_path / "big.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="latin.yaml: 'utf-8' codec"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(FileNotFoundError, match="no such recipe file"):
        load_recipe(tmp_path / "missing.yaml")


def test_a_class_of_ones_own_can_be_registered(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Squared:
        """|w|^power."""

        power: float = 2.0
        needs = ()

        def __call__(self, weight, stats):
            return weight.float().abs() ** self.power

    recipe = dataclasses.replace(METHODS["magnitude"], importance=Squared(3.0))
    with pytest.raises(ValueError, match=r"importance Squared cannot be saved: register it in .*COMPONENTS"):
        recipe_to_yaml(recipe)
    monkeypatch.setitem(COMPONENTS["importance"], "Squared", Squared)
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe
