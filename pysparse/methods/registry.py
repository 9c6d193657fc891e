"""Methods and allocations by the names that people type."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TypeVar

from pysparse.methods.magnitude import Magnitude
from pysparse.methods.sparsegpt import InverseHessian, ObsUpdate
from pysparse.methods.wanda import Wanda
from pysparse.nn.linear import parse_pattern
from pysparse.pruning import NM, Allocation, Keep, Recipe, Uniform, Unstructured

T = TypeVar("T")

METHODS: dict[str, Recipe] = {
    "magnitude": Recipe(Magnitude(), Uniform(), Unstructured("matrix"), Keep()),
    "wanda": Recipe(Wanda(), Uniform(), Unstructured("row"), Keep()),
    "sparsegpt": Recipe(InverseHessian(), Uniform(), Unstructured("matrix"), ObsUpdate()),
}
ALLOCATIONS: dict[str, Allocation] = {"uniform": Uniform()}


def recipe_for(method: str, pattern: str | None = None, allocation: str = "uniform") -> Recipe:
    """Return the recipe of ``method`` with another pattern or allocation.

    ``pattern`` is None or "unstructured" for the method's own, or "n:m", n KEPT of m. Raises ValueError that
    lists the known names.
    """
    recipe = lookup("method", method, METHODS)
    if allocation != "uniform":
        recipe = dataclasses.replace(recipe, allocation=lookup("allocation", allocation, ALLOCATIONS))
    if pattern in (None, "unstructured"):
        return recipe
    return dataclasses.replace(recipe, structure=NM(*parse_pattern(str(pattern))))


def lookup(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Return ``known[name]``; ValueError with the closest and all known names otherwise."""
    if name in known:
        return known[name]
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    raise ValueError(f"unknown {kind} '{name}'{hint}; known: {', '.join(sorted(known))}")
