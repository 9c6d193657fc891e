"""Where the pruned model is saved, checked before the work starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pysparse import huggingface, methods
from pysparse.huggingface.folder import check_replaceable
from pysparse.huggingface.saving import FORMATS
from pysparse.nn import Packing
from pysparse.pruning import NM, PruneReport, Recipe, StagedRecipe


@dataclass(frozen=True, slots=True)
class Saving:
    """Where the result goes and how; nowhere when ``folder`` is None."""

    folder: str | Path | None
    format: str
    packing: Packing

    @classmethod
    def checked(
        cls, folder: str | Path | None, format: str, packing: Packing, recipe: Recipe | StagedRecipe
    ) -> Saving:
        """Raise now what would keep the result from being saved after the work is done."""
        if folder is not None:
            check_output(folder, format, recipe)
        return cls(folder, format, packing)

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError for a model that cannot be saved, if it is to be."""
        if self.folder is not None and not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"output_dir needs a transformers model, got {type(model).__name__}: leave it out"
            )

    def save(self, model: nn.Module, tokenizer: Any, recipe: Recipe, report: PruneReport) -> None:
        """Write the model with its tokenizer, ``recipe.yaml`` and ``prune_report.json``, if that is wanted."""
        if self.folder is None:
            return
        files = {
            "recipe.yaml": methods.recipe_to_yaml(recipe),
            "prune_report.json": report.to_json() + "\n",
        }
        huggingface.save_pretrained(
            model,
            self.folder,
            format=self.format,
            tokenizer=tokenizer,
            extra_files=files,
            packing=self.packing,
        )


def packing_for(
    values: str | None, group_size: int | None, recipe: Recipe | StagedRecipe, save_format: str
) -> Packing:
    """Return how the result is to be packed; an error now rather than after the work."""
    parts = [one.method for one in recipe.stages] if isinstance(recipe, StagedRecipe) else [recipe]
    patterns = [
        str(one.structure) for one in parts if isinstance(one, Recipe) and isinstance(one.structure, NM)
    ]
    pattern = patterns[-1] if values is not None and patterns else None
    packing = Packing(values, pattern, group_size)
    if not packing.is_plain and save_format != "pysparse":
        raise ValueError(f'values="{values}" can be saved in format "pysparse" only, got "{save_format}"')
    return packing


def check_output(output_dir: str | Path, save_format: str, recipe: Recipe | StagedRecipe) -> None:
    """Raise now what would keep the result from being saved after the work is done."""
    if save_format not in FORMATS:
        raise ValueError(f"save_format is one of {', '.join(FORMATS)}, got '{save_format}'")
    check_replaceable(output_dir)
    methods.recipe_to_yaml(recipe)
