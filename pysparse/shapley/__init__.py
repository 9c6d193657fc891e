"""Floor 6: Shapley values of any cooperative game, with a budget, standard errors and a seed.

An estimator is a value with ``estimate(game, budget, seed, options)``; a game is anything with ``n_players`` that
turns coalitions, bool [B, n_players], into B numbers. A new estimator is one frozen dataclass.
"""

from pysparse.shapley.adaptive import TopK, TopPlayers, Truncated
from pysparse.shapley.attribute import Attributions, FeatureGame, ShapleyValueSampling
from pysparse.shapley.control import Control, Quadratic, fit_quadratic
from pysparse.shapley.entries import (
    DeepModel,
    EntryRun,
    EntryShapley,
    FactorisationMachine,
    Walker,
    entry_shapley,
    plan_entries,
    score_shard,
)
from pysparse.shapley.estimators import Banzhaf, KernelSHAP, Owen, Permutation, PositionStratified
from pysparse.shapley.exact import Exact
from pysparse.shapley.forward import ForwardGame, Part, input_means, input_parts, next_token_loss
from pysparse.shapley.game import FunctionGame, Game, WalkingGame
from pysparse.shapley.sampling import Options, UnitEstimator
from pysparse.shapley.sharded import Shards, entry_shapley_on_ray
from pysparse.shapley.state import read_state, write_state
from pysparse.shapley.structured import (
    PartsGame,
    head_parts,
    neuron_game,
    reconstruction_values,
    weight_values,
)
from pysparse.shapley.values import ShapleyValues

__all__ = [
    "Attributions",
    "Banzhaf",
    "Control",
    "DeepModel",
    "EntryRun",
    "EntryShapley",
    "Exact",
    "FactorisationMachine",
    "FeatureGame",
    "ForwardGame",
    "FunctionGame",
    "Game",
    "KernelSHAP",
    "Options",
    "Owen",
    "Part",
    "PartsGame",
    "Permutation",
    "PositionStratified",
    "Quadratic",
    "ShapleyValueSampling",
    "ShapleyValues",
    "Shards",
    "TopK",
    "TopPlayers",
    "Truncated",
    "UnitEstimator",
    "Walker",
    "WalkingGame",
    "entry_shapley",
    "entry_shapley_on_ray",
    "fit_quadratic",
    "head_parts",
    "input_means",
    "input_parts",
    "neuron_game",
    "next_token_loss",
    "plan_entries",
    "read_state",
    "reconstruction_values",
    "score_shard",
    "weight_values",
    "write_state",
]
