"""Shapley values of weights, neurons and heads in the layer's reconstruction game, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pysparse.pruning import Stats
from pysparse.shapley.structured import weight_values


@dataclass(frozen=True, slots=True)
class ShapleyValue:
    """Score |phi|, phi = W * (W H): the average over all drop sets of what a weight adds to the layer's output energy.

    v(S) = -||sum of w_j x_j, j not in S||^2 is quadratic, so its values are exact and cost one product. With
    ``columns`` = n the players are groups of n input columns over all rows (1: the neurons that a down projection
    reads, head_dim: the heads that an output projection reads), whose value is spread evenly over their weights.
    A measure of contribution: weights that cancel each other count little, so as a score of single weights Wanda and
    SparseGPT choose better where inputs are strongly correlated.
    """

    columns: int = 0  # of a player; 0: every weight is a player of its row's game

    def __post_init__(self) -> None:
        if self.columns < 0:
            raise ValueError(
                f"columns is 0 for single weights or the columns of a player, got {self.columns}"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """The second moments of the inputs."""
        return ("gram",)

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return the scores, float32 [out_features, in_features].

        Raises ValueError when ``in_features`` is no multiple of ``columns``.
        """
        values = weight_values(weight, stats["gram"])
        if not self.columns:
            return values.abs().float()
        rows, cols = weight.shape
        if cols % self.columns:
            raise ValueError(f"{cols} input columns are no multiple of the {self.columns} of a player")
        players = values.sum(dim=0).view(-1, self.columns).sum(dim=1).abs() / (rows * self.columns)
        return players.float().repeat_interleave(self.columns).expand(rows, cols).contiguous()
