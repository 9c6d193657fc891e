"""The same methods with the deviations of their released code, for parity with its figures."""

from __future__ import annotations

import dataclasses

from pysparse.methods.dlp import DLP
from pysparse.methods.erk import ErdosRenyi
from pysparse.methods.global_magnitude import GlobalMagnitude
from pysparse.methods.lamp import LAMP
from pysparse.pruning import Allocation, Correct, MaskStructure, Recipe, RowMass, Unstructured
from pysparse.pruning.released import ReleasedRowMass, ReleasedThreshold
from pysparse.pruning.stages import StagedRecipe
from pysparse.pruning.structural import StructuralMethod

_OF_PTSBENCH = (ErdosRenyi, GlobalMagnitude, LAMP)


def as_released(recipe: Recipe | StagedRecipe | StructuralMethod) -> Recipe:
    """Return ``recipe`` as its released code behaves, where that is not the published formula with exact counts.

    - over a matrix, or a block of it (magnitude, SparseGPT): one weight too many goes, and all that equal it;
      with SparseGPT so do all weights of inputs that are always zero;
    - PTSBench's allocations (ERK and ER, global magnitude and its norms, LAMP) and "pot": the count of a layer is
      rounded up, and all weights that equal the last one go;
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
        of_ptsbench = isinstance(allocation, _OF_PTSBENCH) or isinstance(recipe.reconstruction, Correct)
        structure = ReleasedThreshold(counting="up" if of_ptsbench else "past")
    elif type(structure) is RowMass:
        structure = ReleasedRowMass()
    if isinstance(allocation, DLP):
        allocation = dataclasses.replace(allocation, statistic="mean")
    return dataclasses.replace(recipe, structure=structure, allocation=allocation)
