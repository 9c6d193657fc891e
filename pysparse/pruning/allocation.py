"""How the target sparsity is spread over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pysparse.pruning.recipe import Evidence, Recipe
from pysparse.pruning.target import check_sparsity

_TOLERANCE = 1e-6  # of the parameter-weighted mean


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every layer gets the target."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return ``target`` for each layer."""
        return [target] * len(layers)


def allocate(recipe: Recipe, layers: Sequence[Evidence], target: float) -> list[float]:
    """Return the sparsity of each layer under ``recipe``, checked.

    Raises ValueError when the allocation leaves [0, 1), misses the target's parameter-weighted mean by more
    than 1e-6, gives the wrong number, or moves a structure whose sparsity is fixed.
    """
    name = type(recipe.allocation).__name__
    sparsities = recipe.allocation(layers, target)
    if len(sparsities) != len(layers):
        raise ValueError(f"{name} gave {len(sparsities)} sparsities for {len(layers)} layers")
    for evidence, sparsity in zip(layers, sparsities, strict=True):
        try:
            check_sparsity(sparsity)
        except ValueError as error:
            raise ValueError(f"{name} on {evidence.layer.path}: {error}") from None
        fixed = recipe.structure.fixed_sparsity
        if fixed is not None and abs(sparsity - fixed) > _TOLERANCE:
            raise ValueError(
                f"{name} gives {evidence.layer.path} sparsity {sparsity:g}, but {recipe.structure} fixes it at "
                f"{fixed:g}: use the uniform allocation, or an unstructured pattern"
            )
    sizes = [evidence.layer.size for evidence in layers]
    mean = sum(n * s for n, s in zip(sizes, sparsities, strict=True)) / max(1, sum(sizes))
    if abs(mean - target) > _TOLERANCE:
        raise ValueError(f"{name} reaches a mean sparsity of {mean:.7g} instead of {target:g}")
    return sparsities
