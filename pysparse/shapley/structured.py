"""Heads, neurons and blocks as players: what a part of a network adds to its output.

The parts of a sum: an attention layer writes sum_h C_h into the residual stream, C_h being head h's output times its
slice of the output projection; a two-layer MLP writes sum_j a_j W2[:, j]. Coalitions are then partial sums, and a
walk along an order is a running sum: O(width) a player.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysparse.shapley.game import Coalitions, Orders, Values, check_players

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class PartsGame:
    """v(S) = -loss(constant + sum of the parts in S), the mean over samples.

    ``loss`` "squared" is ||output - target||^2 with targets [samples, width]; "cross-entropy" takes classes,
    int64 [samples], and the outputs as logits.
    """

    parts: Floats  # [samples, players, width]
    constant: Floats  # [samples, width]
    targets: NDArray[np.float64] | NDArray[np.int64]
    loss: Literal["squared", "cross-entropy"] = "squared"

    def __post_init__(self) -> None:
        samples, players, width = self.parts.shape
        check_players(players)
        if self.constant.shape != (samples, width):
            raise ValueError(f"the constant has shape {self.constant.shape}, expected {(samples, width)}")
        if self.loss not in ("squared", "cross-entropy"):
            raise ValueError(f"loss is 'squared' or 'cross-entropy', got {self.loss!r}")
        wanted = (samples, width) if self.loss == "squared" else (samples,)
        if self.targets.shape != wanted:
            raise ValueError(
                f"targets have shape {self.targets.shape}, expected {wanted} for loss '{self.loss}'"
            )
        if self.loss == "cross-entropy" and not ((self.targets >= 0) & (self.targets < width)).all():
            raise ValueError(f"classes are in [0, {width}), got {self.targets.min()} to {self.targets.max()}")

    @property
    def n_players(self) -> int:
        """How many parts there are."""
        return int(self.parts.shape[1])

    def __call__(self, coalitions: Coalitions) -> Values:
        """Return the values, float64 [B]."""
        z = coalitions.astype(np.float64)
        total = np.zeros(len(z))
        for sample in range(len(self.parts)):
            total -= self._losses(z @ self.parts[sample] + self.constant[sample], sample)
        return total / len(self.parts)

    def walk(self, orders: Orders) -> NDArray[np.float64]:
        """Return v along each order, float64 [P, n_players + 1], by running sums."""
        result = np.zeros((len(orders), self.n_players + 1))
        for row, order in enumerate(orders):
            for sample in range(len(self.parts)):
                steps = np.concatenate([self.constant[sample][None], self.parts[sample][order]])
                result[row] -= self._losses(np.cumsum(steps, axis=0), sample)
        return result / len(self.parts)

    def _losses(self, outputs: Floats, sample: int) -> Values:
        if self.loss == "squared":
            return np.asarray(((outputs - self.targets[sample]) ** 2).sum(axis=1))
        highest = outputs.max(axis=1)
        normaliser = highest + np.log(np.exp(outputs - highest[:, None]).sum(axis=1))
        return np.asarray(normaliser - outputs[:, int(self.targets[sample])])


def neuron_game(
    hidden: Floats, weight: Floats, bias: Floats, targets: NDArray[np.float64] | NDArray[np.int64],
    loss: Literal["squared", "cross-entropy"] = "squared", absent: Floats | None = None,
) -> PartsGame:  # fmt: skip
    """Return the game of the hidden neurons of a two-layer network, output = W2 a + b.

    ``hidden`` activations a [samples, neurons], ``weight`` W2 [width, neurons], ``bias`` [width]. An absent neuron has
    the activation ``absent`` [neurons], for example its mean; 0 by default.
    """
    replaced = np.zeros(hidden.shape[1]) if absent is None else absent
    parts = (hidden - replaced)[:, :, None] * weight.T[None]
    constant = np.broadcast_to(bias + weight @ replaced, (len(hidden), len(bias)))
    return PartsGame(parts, np.ascontiguousarray(constant), targets, loss)


def head_parts(heads: Tensor, projection: Tensor) -> Tensor:
    """Return what each attention head writes into the residual stream, float64 [tokens, heads, width].

    ``heads`` [tokens, n_heads, head_dim] are the heads' outputs, ``projection`` [width, n_heads * head_dim] the weight
    of the output projection.
    """
    _, count, dim = heads.shape
    if projection.shape[1] != count * dim:
        raise ValueError(f"a projection of {projection.shape[1]} inputs for {count} heads of {dim}")
    slices = projection.double().view(len(projection), count, dim)
    return torch.einsum("thd,whd->thw", heads.double(), slices)


def reconstruction_values(parts: Tensor) -> Tensor:
    """Return the Shapley values of v(S) = -||sum of the parts not in S||^2, exactly: float64 [players].

    ``parts`` [samples, players, width]. The game is quadratic with the Gram matrix of the parts, whose row sums are the
    values: phi_h = <C_h, sum of all C>. They add up to ||sum of all C||^2.
    """
    wide = parts.double()
    return (wide * wide.sum(dim=1, keepdim=True)).sum(dim=(0, 2))


def weight_values(weight: Tensor, gram: Tensor) -> Tensor:
    """Return the Shapley values of the single weights of each row in its own reconstruction game: W * (W H).

    ``weight`` [out, in], ``gram`` H = X X^T [in, in]; v(S) = -||sum of w_j x_j for j not in S||^2. A row sums
    to w H w^T.
    """
    if gram.shape != (weight.shape[1],) * 2:
        raise ValueError(f"a Gram matrix {tuple(gram.shape)} for {weight.shape[1]} inputs")
    wide = weight.to(gram.dtype)
    return wide * (wide @ gram)
