"""A recipe of a grid, checked and turned into what pysparse runs."""

from __future__ import annotations

from dataclasses import dataclass

from pysparse.methods import ALLOCATIONS, FCPTS, as_released, method_for, recipe_for
from pysparse.methods.registry import allocation_for, configured, lookup
from pysparse.nn.packing import parse_pattern
from pysparse.pruning import (
    Allocation,
    OutputMatching,
    Recipe,
    StructuralMethod,
    check_sparsity,
    resolve_sparsity,
)
from pysparse.suite.cells import UNSTRUCTURED, Cell, RecipeSpec

LEARNED = "fcpts"  # the allocation whose rates are learned from the model and its data before pruning
GRANULARITIES = ("op", "layer", "block")
_OWN = {"ObsUpdate": "obs", "Correct": "correct", "EbfUpdate": "ebf"}  # reconstruction inside of a method


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to a model, in order."""

    spec: RecipeSpec
    method: Recipe | StructuralMethod
    learned: FCPTS | None  # rates are learned by it first
    matching: OutputMatching | None  # survivors are tuned by it last

    @property
    def allocation(self) -> str:
        """How sparsity is spread: as the grid says, or the name of what the method does itself."""
        if self.spec.allocation is not None:
            return self.spec.allocation
        if isinstance(self.method, StructuralMethod):
            return "own"
        return _name_of(self.method.allocation)

    @property
    def reconstruction(self) -> str | None:
        """How survivors are changed: as the grid says, or what the method does; None where they stay."""
        if self.spec.reconstruction is not None:
            return self.spec.reconstruction
        return None if isinstance(self.method, StructuralMethod) else own_reconstruction(self.method)


def own_reconstruction(recipe: Recipe) -> str | None:
    """Return the name of what a method does to the survivors itself; None where they stay."""
    return _OWN.get(type(recipe.reconstruction).__name__)


def plan_for(cell: Cell) -> Plan:
    """Return what ``cell`` does to its model.

    Raises ValueError, with the closest known name, for an unknown method, allocation or reconstruction, for
    settings that they refuse, and for parts that do not go together.
    """
    return plan_of(cell.spec, cell.pattern, cell.sparsity)


def plan_of(spec: RecipeSpec, pattern: str, sparsity: float) -> Plan:
    """Return what a recipe means with that pattern and sparsity; see :func:`plan_for`."""
    learned = _learned(spec.allocation)
    method = _method(spec, pattern, None if learned else spec.allocation)
    if spec.compat not in (None, "paper"):
        raise ValueError(f"compat is 'paper' or left out, got {spec.compat!r}")
    if spec.propagate not in ("pruned", "dense", "sequential"):
        raise ValueError(f"propagate is 'pruned', 'dense' or 'sequential', got {spec.propagate!r}")
    if spec.compat is not None:
        method = as_released(method)
    if isinstance(method, StructuralMethod):
        check_sparsity(sparsity)
        if learned or spec.reconstruction is not None:
            raise ValueError(
                f"method '{spec.method}' makes a smaller model: it has no zeros to place or tune around"
            )
    else:
        resolve_sparsity(method.structure, sparsity)
    return Plan(spec, method, learned, _matching(spec.reconstruction))


def _method(spec: RecipeSpec, pattern: str, allocation: str | None) -> Recipe | StructuralMethod:
    if pattern == UNSTRUCTURED and allocation is None:
        return method_for(spec.method)
    return recipe_for(spec.method, pattern, allocation)


def _learned(allocation: str | None) -> FCPTS | None:
    name, _, settings = (allocation or "").partition(":")
    if name != LEARNED:
        if allocation is not None:
            lookup("allocation", name, {**ALLOCATIONS, LEARNED: None})
            allocation_for(allocation)
        return None
    return configured("allocation", LEARNED, FCPTS(), settings) if settings else FCPTS()


def _matching(reconstruction: str | None) -> OutputMatching | None:
    if reconstruction is None:
        return None
    name, _, settings = reconstruction.partition(":")
    known = {unit: OutputMatching(unit) for unit in GRANULARITIES}  # type: ignore[arg-type]
    found = lookup("reconstruction", name, known)
    return configured("reconstruction", name, found, settings) if settings else found


def _name_of(allocation: Allocation) -> str:
    return next(
        (name for name, known in ALLOCATIONS.items() if known == allocation), type(allocation).__name__
    )


def implied_sparsity(pattern: str) -> float | None:
    """Return what "n:m" fixes, 1 - n/m; None for "unstructured". ValueError for anything else."""
    if pattern == UNSTRUCTURED:
        return None
    n, m = parse_pattern(pattern)
    return 1.0 - n / m
