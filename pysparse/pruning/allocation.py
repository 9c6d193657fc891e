"""How the target sparsity is spread over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pysparse.pruning.mixed import MixedNM
from pysparse.pruning.projection import weighted_mean
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


class WeightsUnknownError(ValueError):
    """An allocation looks at weights, and the model has none: it is a skeleton on the meta device."""


def require_weights(name: str, layers: Sequence[Evidence]) -> None:
    """Raise WeightsUnknownError when a layer of ``layers`` has no data, for the allocation ``name``."""
    for evidence in layers:
        if evidence.layer.weight.is_meta:
            raise WeightsUnknownError(f"{name} looks at the weights, and {evidence.layer.path} has none")


def allocate(recipe: Recipe, layers: Sequence[Evidence], target: float) -> list[float]:
    """Return the sparsity of each layer under ``recipe``, checked; for MixedNM rounded to its patterns.

    Raises ValueError when the allocation leaves [0, 1), misses the target's parameter-weighted mean by more
    than 1e-6, gives the wrong number, or moves a structure whose sparsity is fixed.
    """
    name, mixed = type(recipe.allocation).__name__, isinstance(recipe.structure, MixedNM)
    sparsities = recipe.allocation(layers, target)
    if len(sparsities) != len(layers):
        raise ValueError(f"{name} gave {len(sparsities)} sparsities for {len(layers)} layers")
    for evidence, sparsity in zip(layers, sparsities, strict=True):
        try:
            check_sparsity(sparsity)
        except ValueError as error:
            raise ValueError(f"{name} on {evidence.layer.path}: {error}") from None
        fixed = recipe.structure.fixed_sparsity
        if fixed is not None and not mixed and abs(sparsity - fixed) > _TOLERANCE:
            raise ValueError(
                f"{name} gives {evidence.layer.path} sparsity {sparsity:g}, but {recipe.structure} fixes it at "
                f"{fixed:g}: use the uniform allocation, an unstructured pattern, or MixedNM, whose layers have "
                "their own n of m"
            )
    mean = weighted_mean(sparsities, [evidence.layer.size for evidence in layers])
    if layers and abs(mean - target) > _TOLERANCE:
        raise ValueError(f"{name} reaches a mean sparsity of {mean:.7g} instead of {target:g}")
    if isinstance(recipe.structure, MixedNM):
        return recipe.structure.round([evidence.layer for evidence in layers], sparsities)
    return sparsities
