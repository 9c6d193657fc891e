"""Floor 7: the methods by name.

A method from existing parts is one line in METHODS. A new score, allocation, pattern or reconstruction is one
file with a frozen dataclass (see pysparse.pruning.recipe for what it must have), and a line in COMPONENTS, so
that recipes can be saved with it.
"""

from pysparse.methods.magnitude import Magnitude
from pysparse.methods.recipes import COMPONENTS, load_recipe, parse_recipe, recipe_to_yaml
from pysparse.methods.registry import ALLOCATIONS, METHODS, recipe_for
from pysparse.methods.sparsegpt import InverseHessian, ObsUpdate
from pysparse.methods.wanda import Wanda

__all__ = [
    "ALLOCATIONS",
    "COMPONENTS",
    "METHODS",
    "InverseHessian",
    "Magnitude",
    "ObsUpdate",
    "Wanda",
    "load_recipe",
    "parse_recipe",
    "recipe_for",
    "recipe_to_yaml",
]
