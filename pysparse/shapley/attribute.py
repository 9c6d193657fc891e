"""The face of captum's ShapleyValueSampling over the estimators here: with a seed, standard errors and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysparse.shapley.estimators import Permutation
from pysparse.shapley.game import Coalitions, Values, as_values
from pysparse.shapley.sampling import Options, UnitEstimator

_PAIRS = Permutation()


@dataclass(frozen=True, slots=True, eq=False)
class Attributions:
    """Attributions of a batch, both of the shape of the inputs."""

    values: Tensor
    stderr: Tensor
    evaluations: int  # rows that went through ``forward``


@dataclass(frozen=True, slots=True, eq=False)
class Repeated:
    """An argument that belongs to one input, [1, ...]: each of that input's perturbations needs it too."""

    row: Tensor

    def times(self, count: int) -> Tensor:
        """Return the row ``count`` times, [count, ...], a copy that the function may write to."""
        return self.row.repeat_interleave(count, dim=0)


@dataclass(frozen=True, slots=True, eq=False)
class FeatureGame:
    """One input's features as players: absent ones take the baseline's values.

    ``features`` numbers the players, int64 of the input's shape without the batch: entries of one number come and
    go together.
    """

    forward: Callable[..., Any]
    row: Tensor  # [1, ...]
    baseline: Tensor  # [1, ...] or [...]-like, broadcast to the row
    features: Tensor
    n_players: int
    target: int | None = None
    arguments: tuple[Any, ...] = ()  # a :class:`Repeated` one has a row for each coalition

    def __call__(self, coalitions: Coalitions) -> Values:
        """Return the forward function's outputs, float64 [B]."""
        present = torch.from_numpy(coalitions).to(self.row.device)[:, self.features]  # [B, ...]
        arguments = [
            one.times(len(coalitions)) if isinstance(one, Repeated) else one for one in self.arguments
        ]
        with torch.no_grad():
            output = self.forward(torch.where(present, self.row, self.baseline), *arguments)
        if self.target is not None:
            output = output[:, self.target]
        return as_values(output)


@dataclass(frozen=True, slots=True)
class ShapleyValueSampling:
    """``ShapleyValueSampling(forward).attribute(inputs)``: permutation sampling of input features.

    Differs from captum: permutations come in antithetic pairs, each input draws its own from ``seed`` (captum: torch's
    global generator), and :meth:`attribute_with_error` tells the standard errors. The baseline is 0 by default.
    """

    forward: Callable[..., Any]
    estimator: UnitEstimator = _PAIRS

    def attribute(self, inputs: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        """Return attributions of the shape of ``inputs``; see :meth:`attribute_with_error`."""
        return self.attribute_with_error(inputs, *arguments, **settings).values

    def attribute_with_error(
        self,
        inputs: Tensor,
        baselines: Tensor | float = 0.0,
        target: int | Tensor | None = None,
        additional_forward_args: Any = None,
        feature_mask: Tensor | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 64,
        seed: int = 0,
    ) -> Attributions:
        """Attribute ``forward(inputs)[:, target]`` to the features of each input.

        ``inputs`` [B, ...]; ``baselines`` a number or a tensor that broadcasts to an input; ``target`` an index or
        one for each input; ``feature_mask`` int64 of an input's shape (a leading axis of 1 is taken) groups entries;
        ``additional_forward_args``, one or a tuple, follow the inputs: of a tensor of B rows each input's own row is
        repeated for all of its perturbations, as in captum, and anything else is passed as it is; ``n_samples`` units
        (pairs of permutations by default) an input; ``perturbations_per_eval`` rows a call.
        Raises ValueError for masks, targets and numbers that do not fit, and for outputs that are not finite.
        """
        if n_samples < 1:
            raise ValueError(f"n_samples is at least 1, got {n_samples}")
        features, players = _features(inputs, feature_mask)
        extra = () if additional_forward_args is None else additional_forward_args
        extra = extra if isinstance(extra, tuple) else (extra,)
        values, stderr, evaluations = torch.empty_like(inputs), torch.empty_like(inputs), 0
        for index, row in enumerate(inputs):
            game = FeatureGame(
                self.forward, row[None], _baseline(baselines, inputs, index), features, players,
                _target(target, index, len(inputs)), _own(extra, index, len(inputs)),
            )  # fmt: skip
            budget = 2 + n_samples * self.estimator.cost(players)
            result = self.estimator.estimate(
                game, budget, _own_seed(seed, index), Options(perturbations_per_eval)
            )
            values[index] = _spread(result.mean, features, inputs)
            stderr[index] = _spread(result.stderr, features, inputs)
            evaluations += result.evaluations
        return Attributions(values, stderr, evaluations)


def _features(inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    shape = inputs.shape[1:]
    if inputs.dim() < 2 or not inputs.is_floating_point():
        raise ValueError(f"inputs are floats of shape [batch, ...], got {inputs.dtype} {tuple(inputs.shape)}")
    if mask is None:
        return torch.arange(shape.numel(), device=inputs.device).view(shape), shape.numel()
    mask = mask[0] if mask.dim() == inputs.dim() and len(mask) == 1 else mask
    numbers = mask.unique().tolist()
    if mask.shape != shape or numbers != list(range(len(numbers))):
        raise ValueError(
            f"feature_mask has shape {tuple(shape)} and numbers 0, 1, ... without gaps, got {tuple(mask.shape)} "
            f"and {numbers[:8]}"
        )
    return mask.to(inputs.device, torch.int64), len(numbers)


def _baseline(baselines: Tensor | float, inputs: Tensor, index: int) -> Tensor:
    if not isinstance(baselines, Tensor):
        return torch.full_like(inputs[:1], float(baselines))
    if baselines.shape == inputs.shape:
        return baselines[index : index + 1]
    return baselines.to(inputs).expand_as(inputs[:1])


def _target(target: int | Tensor | None, index: int, count: int) -> int | None:
    if target is None or isinstance(target, int):
        return target
    if target.numel() != count:
        raise ValueError(f"{target.numel()} targets for {count} inputs")
    return int(target.flatten()[index])


def _own(arguments: tuple[Any, ...], index: int, count: int) -> tuple[Any, ...]:
    """Return the arguments of one input of ``count``."""
    return tuple(
        Repeated(one[index : index + 1]) if isinstance(one, Tensor) and one.shape[:1] == (count,) else one
        for one in arguments
    )


def _own_seed(seed: int, index: int) -> int:
    """Return a seed of its own for each input: neighbours must not share their permutations."""
    return (seed + index * 0x9E3779B97F4A7C15) % (1 << 64)


def _spread(values: np.ndarray[Any, Any], features: Tensor, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like)[features]
