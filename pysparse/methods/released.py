"""The same methods with the deviations of their released code, for parity with its figures."""

from __future__ import annotations

import dataclasses

from pysparse.methods.dlp import DLP
from pysparse.pruning import Allocation, MaskStructure, Recipe, RowMass, Unstructured
from pysparse.pruning.released import ReleasedRowMass, ReleasedThreshold
from pysparse.pruning.stages import StagedRecipe
from pysparse.pruning.structural import StructuralMethod


def as_released(recipe: Recipe | StagedRecipe | StructuralMethod) -> Recipe:
    """Return ``recipe`` as its released code behaves, where that is not the published formula with exact counts.

    - over a matrix, or a block of it (magnitude, SparseGPT): one weight too many goes, and all that equal it;
      with SparseGPT so do all weights of inputs that are always zero;
    - Wanda's variant: alpha to a tolerance of 0.001, and no more than 0.8;
    - DLP: the mean score of a block, where the paper takes the median.

    Wanda by row and every n:m count exactly in released code too; OWL's and ATP's formulas are the published
    ones (but for a rate below 0, which OWL's code sets to 0.01 and is projected here). Raises ValueError for
    recipes of stages and structural methods.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"compat='paper' is for methods that are one Recipe, got a {type(recipe).__name__}")
    structure: MaskStructure = recipe.structure
    allocation: Allocation = recipe.allocation
    if type(structure) is Unstructured and structure.group == "matrix":
        structure = ReleasedThreshold()
    elif type(structure) is RowMass:
        structure = ReleasedRowMass()
    if isinstance(allocation, DLP):
        allocation = dataclasses.replace(allocation, statistic="mean")
    return dataclasses.replace(recipe, structure=structure, allocation=allocation)
