"""Methods and allocations by the names that people type."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from pysparse.methods.atp import ATP
from pysparse.methods.custom import Custom
from pysparse.methods.dlp import DLP
from pysparse.methods.ebf import Columns, EbfUpdate, Emergent, Evidence
from pysparse.methods.erk import ErdosRenyi
from pysparse.methods.filters import FilterDistance, SquaredMagnitude
from pysparse.methods.global_magnitude import GlobalMagnitude
from pysparse.methods.lamp import LAMP
from pysparse.methods.magnitude import Magnitude
from pysparse.methods.owl import OWL
from pysparse.methods.profile import DLP_PROFILES, DLPProfile, as_profile, load_profile
from pysparse.methods.shapley import ShapleyValue
from pysparse.methods.sparsegpt import InverseHessian, ObsUpdate
from pysparse.methods.two_ssp import ShortGPT, TwoSSP
from pysparse.methods.wanda import Wanda
from pysparse.nn.packing import parse_pattern
from pysparse.pruning import (
    NM,
    Allocation,
    Correct,
    Filters,
    Keep,
    MaskStructure,
    MixedNM,
    Recipe,
    RowMass,
    Uniform,
    Unstructured,
)
from pysparse.pruning.structural import StructuralMethod

T = TypeVar("T")
AllocationLike = (
    Allocation | Callable[..., Sequence[float]] | Mapping[str, float] | Sequence[float] | str | Path
)

METHODS: dict[str, Recipe] = {
    "magnitude": Recipe(Magnitude(), Uniform(), Unstructured("matrix"), Keep()),
    "magnitude-row": Recipe(Magnitude(), Uniform(), Unstructured("row"), Keep()),
    "magnitude-global": Recipe(Magnitude(), GlobalMagnitude(), Unstructured("matrix"), Keep()),
    "wanda": Recipe(Wanda(), Uniform(), Unstructured("row"), Keep()),
    "wanda-variant": Recipe(Wanda(), Uniform(), RowMass(), Keep()),
    "shapley": Recipe(ShapleyValue(), Uniform(), Unstructured("row"), Keep()),
    "sparsegpt": Recipe(InverseHessian(), Uniform(), Unstructured("matrix"), ObsUpdate()),
    "ebf": Recipe(Evidence(), Uniform(), Unstructured("matrix"), EbfUpdate()),
    "ebf-auto": Recipe(Evidence(), Uniform(), Emergent(), EbfUpdate()),
    "ebf-oneshot": Recipe(Evidence(), Uniform(), Emergent(), Keep()),
    "ebf-columns": Recipe(Evidence(), Uniform(), Columns(), EbfUpdate()),
    "pot": Recipe(Magnitude(), GlobalMagnitude("l2"), Unstructured("matrix"), Correct()),
    "filter-l1": Recipe(Magnitude(), Uniform(), Filters(), Keep()),
    "filter-l2": Recipe(SquaredMagnitude(), Uniform(), Filters(), Keep()),
    "fpgm": Recipe(FilterDistance(), Uniform(), Filters(), Keep()),
}
STRUCTURAL: dict[str, StructuralMethod] = {  # these make a smaller dense model
    "2ssp": TwoSSP(),
    "2ssp-width": TwoSSP(n_attn=0),
    "2ssp-depth": TwoSSP(narrow=False),
    "shortgpt": ShortGPT(),
}
ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Uniform(),
    "owl": OWL(),
    "dlp": DLP(),
    "atp": ATP(),
    "global": GlobalMagnitude(),
    "l1norm": GlobalMagnitude("l1"),
    "l2norm": GlobalMagnitude("l2"),
    "l2norm-v2": GlobalMagnitude("l2", max_sparsity=0.95),
    "erk": ErdosRenyi(),
    "er": ErdosRenyi(kernel=False),
    "lamp": LAMP(),
    **{f"dlp-{model}": DLPProfile(model) for model in DLP_PROFILES},
}


def method_for(method: str) -> Recipe | StructuralMethod:
    """Return the recipe or structural method of that name, the latter perhaps with settings.

    "2ssp:multiple_of=64,n_attn=3" is 2SSP with other settings. Raises ValueError that lists the known names.
    """
    name, _, given = method.partition(":")
    if name in STRUCTURAL:
        known = STRUCTURAL[name]
        return configured("method", name, known, given) if given else known
    known_names: dict[str, Recipe | StructuralMethod] = {**METHODS, **STRUCTURAL}
    return lookup("method", method, known_names)


def recipe_for(method: str, pattern: str | None = None, allocation: AllocationLike | None = None) -> Recipe:
    """Return the recipe of ``method`` with another pattern or allocation.

    ``pattern`` is None or "unstructured" for the method's own, or "n:m", n KEPT of m. ``allocation`` is None for
    the method's own, or anything that :func:`allocation_for` takes; together with "n:m" the layers get an n of
    their own (:class:`pysparse.pruning.MixedNM`). Raises ValueError that lists the known names.
    """
    if method.partition(":")[0] in STRUCTURAL:
        raise ValueError(
            f"method '{method}' removes neurons and modules, it writes no zeros: pattern and allocation do not apply; "
            "a recipe with stages has both"
        )
    recipe = lookup("method", method, METHODS)
    if allocation is not None:
        recipe = dataclasses.replace(recipe, allocation=allocation_for(allocation))
    if pattern in (None, "unstructured"):
        return recipe
    n, m = parse_pattern(str(pattern))
    uniform = isinstance(recipe.allocation, Uniform)
    structure: MaskStructure = NM(n, m) if uniform else MixedNM(n, m)
    return dataclasses.replace(recipe, structure=structure)


def allocation_for(value: AllocationLike) -> Allocation:
    """Return the allocation that ``value`` means.

    A string is a name of ALLOCATIONS, perhaps with settings ("owl:m=7,lmbda=0.1"), or the path of a .json
    profile (:func:`load_profile`); a list holds a sparsity for each block, a mapping names layers; a function
    is called as ``function(layers, target)``; an allocation is taken as it is. Raises ValueError for an
    unknown name or setting, FileNotFoundError for a missing file.
    """
    if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".json")):
        return load_profile(value)
    if isinstance(value, str):
        name, _, given = value.partition(":")
        known = lookup("allocation", name, ALLOCATIONS)
        return configured("allocation", name, known, given) if given else known
    if isinstance(value, Mapping | Sequence):
        return as_profile(value)
    if callable(value):
        return cast(Allocation, value) if hasattr(value, "needs") else Custom(value)
    raise TypeError(
        f"allocation is a {type(value).__name__}, expected a name, a .json file, a list, a mapping, a function "
        "or an allocation"
    )


def configured(kind: str, name: str, known: T, text: str) -> T:
    """Return ``known``, a dataclass, with the settings of "key=value,key=value"."""
    fields = [field.name for field in dataclasses.fields(known)]  # type: ignore[arg-type]
    settings: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in fields:
            names = f"one of {', '.join(fields)}" if fields else "none"
            raise ValueError(f"{kind} '{name}' has no setting '{part}'; settings are key=value, {names}")
        settings[key] = value
    try:
        settings = {key: _setting(key, value, getattr(known, key)) for key, value in settings.items()}
        return dataclasses.replace(known, **settings)  # type: ignore[type-var]
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{kind} '{name}': {error}") from None


def _setting(name: str, text: str, known: Any) -> Any:
    """Return what ``text`` says in place of ``known``; ValueError when that is a number and ``text`` is none."""
    value = yaml.safe_load(text)
    if not isinstance(known, int | float) or isinstance(known, bool) or not isinstance(value, str):
        return value
    try:
        return float(value)  # "nan" and "1e-3" are text to YAML
    except ValueError:
        raise ValueError(f"{name} is a number, got {text!r}") from None


def lookup(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Return ``known[name]``; ValueError with the closest and all known names otherwise."""
    if name in known:
        return known[name]
    close = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    raise ValueError(f"unknown {kind} '{name}'{hint}; known: {', '.join(sorted(known))}")
