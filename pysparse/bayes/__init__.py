"""Floor 6: sparsity by hyperpriors in the empirical Bayes framework, for linear inverse problems and for weights.

``solve`` works on matrices in memory, ``solve_operator`` on operators of image size, ``solve_rows`` on all rows of
a weight at once. What needs scipy, scikit-learn, scikit-image or PyWavelets says so: ``pysparse[bayes]``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pysparse.bayes.hyperpriors import (
    Flat,
    Gamma,
    GeneralizedGamma,
    HalfGeneralizedGaussian,
    HalfLaplace,
    Hyperprior,
    Jeffreys,
)
from pysparse.bayes.matrix_free import OperatorSettings, OperatorSolution, solve_operator
from pysparse.bayes.problem import DenseProblem, HessianProblem, Problem
from pysparse.bayes.rows import RowEvidence, RowHyperprior, polish_rows, refit_rows, solve_columns, solve_rows
from pysparse.bayes.solver import Settings, Solution, gradient, largest_weight, objective, path, solve

if TYPE_CHECKING:
    from pysparse.bayes.regressor import EBFRegressor

__all__ = [
    "DenseProblem",
    "EBFRegressor",
    "Flat",
    "Gamma",
    "GeneralizedGamma",
    "HalfGeneralizedGaussian",
    "HalfLaplace",
    "HessianProblem",
    "Hyperprior",
    "Jeffreys",
    "OperatorSettings",
    "OperatorSolution",
    "Problem",
    "RowEvidence",
    "RowHyperprior",
    "Settings",
    "Solution",
    "gradient",
    "largest_weight",
    "objective",
    "path",
    "polish_rows",
    "refit_rows",
    "solve",
    "solve_columns",
    "solve_operator",
    "solve_rows",
]

_LATE = {"EBFRegressor": "pysparse.bayes.regressor"}  # inherit from scikit-learn's classes


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_LATE[name]), name)
