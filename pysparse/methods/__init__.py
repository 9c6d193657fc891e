"""Floor 7: the methods by name.

A method from existing parts is one line in METHODS. A new score, allocation, pattern or reconstruction is one
file with a frozen dataclass (see pysparse.pruning.recipe for what it must have), and a line in COMPONENTS, so
that recipes can be saved with it.
"""

from pysparse.methods.adaptation import Adapt
from pysparse.methods.anchor_attention import AnchorAttention
from pysparse.methods.atp import ATP, BetaSearch, beta_grid, search_beta
from pysparse.methods.custom import Custom
from pysparse.methods.dlp import DLP
from pysparse.methods.ebf import Columns, EbfUpdate, Emergent, Evidence
from pysparse.methods.erk import ErdosRenyi
from pysparse.methods.fcpts import FCPTS, learn_rates
from pysparse.methods.filters import FilterDistance, NuclearImpact, SquaredMagnitude
from pysparse.methods.flexprefill import FlexPrefill
from pysparse.methods.global_magnitude import GlobalMagnitude
from pysparse.methods.lamp import LAMP
from pysparse.methods.losa import LoSA
from pysparse.methods.magnitude import Magnitude
from pysparse.methods.minference import VerticalSlash
from pysparse.methods.owl import OWL
from pysparse.methods.planners import PLANNERS, planner_for
from pysparse.methods.profile import DLPProfile, Profile, as_profile, load_profile
from pysparse.methods.proxy_attention import ProxyAttention
from pysparse.methods.recipes import COMPONENTS, STEPS, load_recipe, parse_recipe, recipe_to_yaml
from pysparse.methods.registry import (
    ALLOCATIONS,
    METHODS,
    STRUCTURAL,
    AllocationLike,
    allocation_for,
    method_for,
    recipe_for,
)
from pysparse.methods.released import as_released
from pysparse.methods.shapley import ShapleyValue
from pysparse.methods.sparsegpt import InverseHessian, ObsUpdate
from pysparse.methods.streaming_attention import StreamingAttention
from pysparse.methods.two_ssp import ShortGPT, TwoSSP
from pysparse.methods.wanda import Wanda
from pysparse.methods.xattention import XAttention

__all__ = [
    "ALLOCATIONS",
    "ATP",
    "COMPONENTS",
    "DLP",
    "FCPTS",
    "LAMP",
    "METHODS",
    "OWL",
    "PLANNERS",
    "STEPS",
    "STRUCTURAL",
    "Adapt",
    "AllocationLike",
    "AnchorAttention",
    "BetaSearch",
    "Columns",
    "Custom",
    "DLPProfile",
    "EbfUpdate",
    "Emergent",
    "ErdosRenyi",
    "Evidence",
    "FilterDistance",
    "FlexPrefill",
    "GlobalMagnitude",
    "InverseHessian",
    "LoSA",
    "Magnitude",
    "NuclearImpact",
    "ObsUpdate",
    "Profile",
    "ProxyAttention",
    "ShapleyValue",
    "ShortGPT",
    "SquaredMagnitude",
    "StreamingAttention",
    "TwoSSP",
    "VerticalSlash",
    "Wanda",
    "XAttention",
    "allocation_for",
    "as_profile",
    "as_released",
    "beta_grid",
    "learn_rates",
    "load_profile",
    "load_recipe",
    "method_for",
    "parse_recipe",
    "planner_for",
    "recipe_for",
    "recipe_to_yaml",
    "search_beta",
]
