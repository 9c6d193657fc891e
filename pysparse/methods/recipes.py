"""Recipes as YAML and back, from an allow-list of classes.

importance: {type: Wanda}
allocation: {type: Uniform}
structure: {type: NM, n: 2, m: 4}
reconstruction: {type: Keep}

or stages, each a recipe (written out, or by the name of a method) or one of STEPS, with a sparsity of its own:

stages:
- {type: TwoSSP, sparsity: 0.25, multiple_of: 16}
- {method: wanda, pattern: "2:4"}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pysparse.methods.adaptation import Adapt
from pysparse.methods.atp import ATP
from pysparse.methods.custom import Custom
from pysparse.methods.dlp import DLP
from pysparse.methods.ebf import Columns, EbfUpdate, Emergent, Evidence
from pysparse.methods.erk import ErdosRenyi
from pysparse.methods.filters import FilterDistance, NuclearImpact, SquaredMagnitude
from pysparse.methods.global_magnitude import GlobalMagnitude
from pysparse.methods.lamp import LAMP
from pysparse.methods.magnitude import Magnitude
from pysparse.methods.owl import OWL
from pysparse.methods.profile import DLPProfile, Profile
from pysparse.methods.shapley import ShapleyValue
from pysparse.methods.sparsegpt import InverseHessian, ObsUpdate
from pysparse.methods.two_ssp import ShortGPT, TwoSSP
from pysparse.methods.wanda import Wanda
from pysparse.pruning import NM, Correct, Filters, Keep, MixedNM, Recipe, RowMass, Uniform, Unstructured
from pysparse.pruning.released import ReleasedRowMass, ReleasedThreshold
from pysparse.pruning.report import describe_recipe
from pysparse.pruning.stages import Stage, StagedRecipe
from pysparse.pruning.structural import describe_method

COMPONENTS: dict[str, dict[str, type[Any]]] = {
    "importance": {
        "ShapleyValue": ShapleyValue,
        "InverseHessian": InverseHessian, "Magnitude": Magnitude, "Wanda": Wanda, "SquaredMagnitude": SquaredMagnitude,
        "FilterDistance": FilterDistance, "NuclearImpact": NuclearImpact, "Evidence": Evidence,
    },
    "allocation": {
        "Uniform": Uniform, "OWL": OWL, "DLP": DLP, "ATP": ATP, "GlobalMagnitude": GlobalMagnitude,
        "Profile": Profile, "DLPProfile": DLPProfile, "ErdosRenyi": ErdosRenyi, "LAMP": LAMP,
    },
    "structure": {
        "NM": NM, "MixedNM": MixedNM, "Unstructured": Unstructured, "RowMass": RowMass, "Filters": Filters,
        "Emergent": Emergent, "Columns": Columns,
        "ReleasedThreshold": ReleasedThreshold, "ReleasedRowMass": ReleasedRowMass,
    },
    "reconstruction": {"Keep": Keep, "ObsUpdate": ObsUpdate, "Correct": Correct, "EbfUpdate": EbfUpdate},
}  # fmt: skip
# Methods that are stages of their own, by class name: structural ones, and adaptations.
STEPS: dict[str, type[Any]] = {"TwoSSP": TwoSSP, "ShortGPT": ShortGPT, "Adapt": Adapt}
_LIMIT = 1 << 12  # bytes; a recipe has some ten lines, and the parser's time grows with the square


def recipe_to_yaml(recipe: Recipe | StagedRecipe) -> str:
    """Return ``recipe`` as YAML that :func:`parse_recipe` reads back to an equal one.

    Raises ValueError for a part that is not in COMPONENTS or STEPS: register your class there first.
    """
    if isinstance(recipe, StagedRecipe):
        content: dict[str, Any] = {"stages": [_stage_content(stage) for stage in recipe.stages]}
    else:
        content = _recipe_content(recipe)
    text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    if len(text) > _LIMIT:
        raise ValueError(
            f"the recipe takes {len(text)} characters, it may have {_LIMIT}: name layers of a profile by patterns"
        )
    return text


def _stage_content(stage: Stage) -> dict[str, Any]:
    sparsity = {} if stage.sparsity is None else {"sparsity": stage.sparsity}
    if isinstance(stage.method, Recipe):
        return {**sparsity, **_recipe_content(stage.method)}
    name = type(stage.method).__name__
    if STEPS.get(name) is not type(stage.method):
        raise ValueError(
            f"stage {name} cannot be saved: register it in pysparse.methods.STEPS (known: {_listed(STEPS)})"
        )
    return {"type": name, **sparsity, **describe_method(stage.method)}


def _recipe_content(recipe: Recipe) -> dict[str, Any]:
    content = describe_recipe(recipe)
    if isinstance(recipe.allocation, Custom):
        raise ValueError(
            "an allocation that is a function cannot be saved in recipe.yaml: pass the sparsities that it gives "
            "as a list (of blocks) or a mapping (of layers), or leave output_dir out and save the pruned model "
            "with pysparse.save_pretrained"
        )
    for part, known in COMPONENTS.items():
        value = getattr(recipe, part)
        if known.get(type(value).__name__) is not type(value):
            raise ValueError(
                f"{part} {type(value).__name__} cannot be saved: register it in "
                f"pysparse.methods.COMPONENTS['{part}'] (known: {', '.join(known)})"
            )
    return content


def load_recipe(path: str | Path) -> Recipe | StagedRecipe:
    """Read a recipe file; FileNotFoundError, or ValueError that names the file and what is wrong in it."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such recipe file: {path}")
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: a recipe has at most {_LIMIT}")
    try:
        return parse_recipe(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path}: {error}") from None


def parse_recipe(text: str) -> Recipe | StagedRecipe:
    """Build the recipe that YAML ``text`` describes.

    Only the classes of COMPONENTS are built, with plain values for their fields; YAML tags that name Python
    objects are refused. Raises ValueError for anything unknown, with the known names.
    """
    if len(text) > _LIMIT:
        raise ValueError(f"the recipe has {len(text)} characters, it may have {_LIMIT}")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError(
                "the recipe uses YAML aliases (*name), which can grow without bound: write it out"
            )
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"the recipe is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"a recipe maps {_listed(COMPONENTS)} to a type each, got {type(content).__name__}")
    if "stages" in content:
        return _staged(content)
    return _unstaged(content)


def _staged(content: dict[Any, Any]) -> StagedRecipe:
    _refuse_unknown("a recipe with stages", content, ["stages"])
    if not isinstance(content["stages"], list):
        raise ValueError(f"stages is a list, got {type(content['stages']).__name__}")
    return StagedRecipe(tuple(_stage(number, one) for number, one in enumerate(content["stages"], start=1)))


def _stage(number: int, content: Any) -> Stage:
    given = {"method": content} if isinstance(content, str) else content
    if not isinstance(given, dict):
        raise ValueError(f"stage {number} maps settings to values, got {type(content).__name__}")
    values: dict[Any, Any] = dict(given)
    sparsity = values.pop("sparsity", None)
    if sparsity is not None and type(sparsity) not in (int, float):
        raise ValueError(f"stage {number}: sparsity is a {type(sparsity).__name__}, expected a number")
    if "type" in values:
        return Stage(_build(f"stage {number}", values, STEPS), sparsity)
    if "method" in values:
        from pysparse.methods.registry import method_for, recipe_for  # which reads this module's classes

        _refuse_unknown(f"stage {number}", values, ("method", "pattern", "allocation"))
        if set(values) == {"method"}:
            return Stage(method_for(str(values["method"])), sparsity)
        return Stage(
            recipe_for(str(values["method"]), values.get("pattern"), values.get("allocation")), sparsity
        )
    return Stage(_unstaged(values), sparsity)


def _unstaged(content: dict[Any, Any]) -> Recipe:
    _refuse_unknown("the recipe", content, COMPONENTS)
    missing = [part for part in COMPONENTS if part not in content]
    if missing:
        raise ValueError(f"the recipe lacks {_listed(missing)}; it needs {_listed(COMPONENTS)}")
    return Recipe(**{part: _build(part, content[part], known) for part, known in COMPONENTS.items()})


def _build(part: str, content: Any, known: dict[str, type[Any]]) -> Any:
    values = {"type": content} if isinstance(content, str) else content  # a bare name stands for its defaults
    if not isinstance(values, dict) or "type" not in values:
        raise ValueError(f"{part} needs a type, one of {_listed(known)}")
    name = values["type"]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{part} has the unknown type {name!r}; known: {_listed(known)}")
    kind = known[name]
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind) if field.init}
    _refuse_unknown(f"{part} {name}", values, ["type", *fields])
    given = {}
    for key, value in values.items():
        takes_list = fields.get(str(key), "").startswith("tuple")
        if not (value is None or isinstance(value, str | int | float | bool)) and not (
            takes_list and isinstance(value, list)
        ):
            raise ValueError(f"{part} {name}: {key} is a {type(value).__name__}, expected a plain value")
        given[key] = _as_tuple(value)
    try:
        return kind(**{key: value for key, value in given.items() if key != "type"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{part} {name}: {error}") from None


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _refuse_unknown(where: str, content: dict[Any, Any], known: Iterable[str]) -> None:
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise ValueError(f"{where} has unknown keys {_listed(unknown)}; known: {_listed(known)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
