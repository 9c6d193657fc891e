"""Floor 6: recipes of four exchangeable parts, and the one loop that runs them over a model's blocks."""

from pysparse.pruning.allocation import Uniform, WeightsUnknownError, allocate
from pysparse.pruning.batchnorm import fold_batch_norm_, recalibrate_
from pysparse.pruning.correction import Correct
from pysparse.pruning.counts import exact_sparsities
from pysparse.pruning.filters import Filters
from pysparse.pruning.layout import BlockLayout, PrunableLayer
from pysparse.pruning.mixed import MixedNM
from pysparse.pruning.plan import PrunePlan, plan
from pysparse.pruning.projection import project
from pysparse.pruning.recipe import (
    Allocation,
    ColumnScaled,
    Evidence,
    Importance,
    MaskStructure,
    Pruned,
    Recipe,
    Reconstruction,
    Selecting,
    Stats,
    Sweeping,
    column_scale,
)
from pysparse.pruning.reconstruction import Keep
from pysparse.pruning.report import PrunedLayer, PruneReport
from pysparse.pruning.row_mass import RowMass
from pysparse.pruning.run import BlockEvent, Execution, gather_evidence, run
from pysparse.pruning.stages import Stage, StagedRecipe, StagedReport
from pysparse.pruning.structural import Cut, StructuralMethod, prune_structure
from pysparse.pruning.structural_plan import StagedPlan, StructuralPlan, plan_structure
from pysparse.pruning.structural_report import StructuralReport
from pysparse.pruning.structure import NM, Unstructured
from pysparse.pruning.target import check_sparsity, resolve_sparsity
from pysparse.pruning.tuning import OutputMatching, TunedUnit, match_outputs_

__all__ = [
    "NM",
    "Allocation",
    "BlockEvent",
    "BlockLayout",
    "ColumnScaled",
    "Correct",
    "Cut",
    "Evidence",
    "Execution",
    "Filters",
    "Importance",
    "Keep",
    "MaskStructure",
    "MixedNM",
    "OutputMatching",
    "PrunableLayer",
    "PrunePlan",
    "PruneReport",
    "Pruned",
    "PrunedLayer",
    "Recipe",
    "Reconstruction",
    "RowMass",
    "Selecting",
    "Stage",
    "StagedPlan",
    "StagedRecipe",
    "StagedReport",
    "Stats",
    "StructuralMethod",
    "StructuralPlan",
    "StructuralReport",
    "Sweeping",
    "TunedUnit",
    "Uniform",
    "Unstructured",
    "WeightsUnknownError",
    "allocate",
    "check_sparsity",
    "column_scale",
    "exact_sparsities",
    "fold_batch_norm_",
    "gather_evidence",
    "match_outputs_",
    "plan",
    "plan_structure",
    "project",
    "prune_structure",
    "recalibrate_",
    "resolve_sparsity",
    "run",
]
