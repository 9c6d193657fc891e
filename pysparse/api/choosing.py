"""What a caller of ``prune`` or ``plan_prune`` asked for, as a recipe and the layers it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pysparse import methods
from pysparse.methods import AllocationLike, ObsUpdate
from pysparse.models.discover import Filter, discover
from pysparse.pruning import (
    BlockLayout,
    Recipe,
    Stage,
    StagedRecipe,
    StructuralMethod,
    check_sparsity,
    resolve_sparsity,
)
from pysparse.pruning.report import structure_warning


def choose(
    recipe: Recipe | StagedRecipe | StructuralMethod | str | Path | None,
    method: str,
    pattern: str | None,
    allocation: AllocationLike | None,
    sparsity: float | None,
    compat: str | None,
) -> Recipe | StagedRecipe:
    """Return what is to be done, with its sparsity checked; a structural method is a recipe of one stage."""
    if compat not in (None, "paper"):
        raise ValueError(f"compat is None or 'paper', got {compat!r}")
    found = _recipe(recipe, method, pattern, allocation)
    if compat is not None:
        found = methods.as_released(found)
    if isinstance(found, StagedRecipe):
        if sparsity is not None:
            raise ValueError(
                f"sparsity={sparsity}: each stage of this recipe has a sparsity of its own; leave it out"
            )
        return found
    if isinstance(found, StructuralMethod):
        return StagedRecipe((Stage(found, None if sparsity is None else check_sparsity(sparsity)),))
    resolve_sparsity(found.structure, sparsity)
    return found


def _recipe(
    recipe: Recipe | StagedRecipe | StructuralMethod | str | Path | None,
    method: str,
    pattern: str | None,
    allocation: AllocationLike | None,
) -> Recipe | StagedRecipe | StructuralMethod:
    if recipe is None and pattern is None and allocation is None:
        return methods.method_for(method)
    if recipe is None:
        return methods.recipe_for(method, pattern, allocation)
    for name, value, default in (("method", method, "wanda"), ("pattern", pattern, None),
                                 ("allocation", allocation, None)):  # fmt: skip
        if value != default:
            raise ValueError(f"{name}={value!r} is part of the recipe that was given too: pass one of them")
    return methods.load_recipe(recipe) if isinstance(recipe, str | Path) else recipe


def quantized_jointly(
    recipe: Recipe | StagedRecipe, values: str | None, group_size: int | None
) -> Recipe | StagedRecipe:
    """Return ``recipe`` with SparseGPT's sweep rounding to the values that the result is saved in."""
    if values is None or not isinstance(recipe, Recipe) or not isinstance(recipe.reconstruction, ObsUpdate):
        return recipe
    own = recipe.reconstruction
    if own.values is not None and (own.values, own.group_size) != (values, group_size):
        raise ValueError(
            f"values={values!r}, group_size={group_size}, but the recipe rounds to {own.values!r}, "
            f"group_size={own.group_size}: pass the same"
        )
    return replace(recipe, reconstruction=replace(own, values=values, group_size=group_size))


def refuse_in_stages(**given: Any) -> None:
    """Raise ValueError for what a recipe of stages cannot take."""
    for name, value in given.items():
        if value not in (None, False):
            raise ValueError(f"{name} is not for recipes of stages, nor for structural methods: leave it out")


def find_layout(
    model: nn.Module, recipe: Recipe, targets: Sequence[str], ignore: Sequence[str], filter_fn: Filter | None,
    strict: bool, whole: bool = False,
) -> BlockLayout:  # fmt: skip
    """Return what is prunable; when ``strict`` raise what would be warned of."""
    layout = discover(model, targets, ignore, whole=whole, filter_fn=filter_fn)
    remarks = [*filter(None, (structure_warning(recipe.structure, layout.layers),)), *layout.warnings]
    if strict and remarks:
        raise ValueError(f"strict=True, and {'; '.join(remarks)}")
    return layout


def one_of(name: str, value: int | None, alias: str, other: int | None) -> int | None:
    """Return what was given under either name; ValueError when both were and they differ."""
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name}={value} and {alias}={other} are two names of one thing: pass one of them")
    return other if value is None else value
