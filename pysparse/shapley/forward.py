"""Heads, neurons and blocks as players of whole forward passes: what the loss on a text grows by without them.

A coalition's rows carry its mask: a part that writes through some inputs of a matrix (an attention head through the
output projection, a neuron through the second matrix of an FFN) has these inputs zeroed or set to their mean, an
absent block returns what it was given. Many coalitions go through one pass, side by side in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pysparse.shapley.game import Coalitions, Values, check_players


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What a player stands for: inputs ``begin`` to ``end`` of ``module``, or with ``end`` 0 the whole module.

    A module that is absent as a whole returns its first input, so it must keep the shape: a block.
    """

    module: nn.Module
    begin: int = 0
    end: int = 0


def input_parts(module: nn.Module, size: int) -> tuple[Part, ...]:
    """Return the inputs of a matrix in groups of ``size``: heads of an output projection, neurons of an FFN.

    Raises ValueError unless ``size`` divides the number of inputs.
    """
    inputs = getattr(module, "in_features", None) or getattr(module, "weight", torch.empty(0)).shape[0]
    if size < 1 or inputs % size:
        raise ValueError(f"groups of {size} do not divide {inputs} inputs")
    return tuple(Part(module, begin, begin + size) for begin in range(0, inputs, size))


def next_token_loss(output: Any, ids: Tensor) -> Tensor:
    """Return the mean nats per predicted token, [rows], of a causal model's output (logits, or with ``.logits``)."""
    logits = getattr(output, "logits", output)[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardGame:
    """v(S) = -mean over sequences of ``loss(model(ids), ids)`` with only the parts in S.

    ``ids`` int64 [sequences, tokens]; ``rows`` sequences go through the model at once (a coalition takes one row for
    each of ``ids``). ``means``, one tensor a part, [inputs of the part], stands for absent inputs instead of zero
    (:func:`input_means`). The model is used as it is: put it into eval mode. Raises ValueError for no players, ids
    of another shape and means that do not fit.
    """

    model: nn.Module
    ids: Tensor
    parts: Sequence[Part]
    loss: Callable[[Any, Tensor], Tensor] = next_token_loss
    rows: int = 64
    means: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        check_players(len(self.parts))
        if self.ids.dim() != 2 or self.ids.shape[1] < 2 or len(self.ids) < 1 or self.rows < 1:
            raise ValueError(
                f"ids are [sequences, at least 2 tokens] and rows at least 1, got {tuple(self.ids.shape)}, {self.rows}"
            )
        whole = [part.module for part in self.parts if part.end == 0]
        if len(whole) != len(set(whole)) or set(whole) & {part.module for part in self.parts if part.end}:
            raise ValueError("a module that is absent as a whole has one part")
        if self.means is not None:
            sizes = [part.end - part.begin for part in self.parts]
            if 0 in sizes or [tuple(mean.shape) for mean in self.means] != [(size,) for size in sizes]:
                raise ValueError("means are one tensor for each part, of as many entries as it has inputs")

    @property
    def n_players(self) -> int:
        """How many parts there are."""
        return len(self.parts)

    def __call__(self, coalitions: Coalitions) -> Values:
        """Return the values, float64 [B]: whole sequences for groups of coalitions, or coalitions one by one."""
        total = np.zeros(len(coalitions))
        at_once = max(1, self.rows // len(self.ids))
        step = min(self.rows, len(self.ids))
        for first in range(0, len(coalitions), at_once):
            some = coalitions[first : first + at_once]
            for begin in range(0, len(self.ids), step):
                ids = self.ids[begin : begin + step]
                total[first : first + len(some)] -= self._losses(some, ids).sum(axis=1)
        return total / len(self.ids)

    def _losses(self, coalitions: Coalitions, ids: Tensor) -> Values:
        """Return the losses [coalitions, sequences] of one pass."""
        present = torch.from_numpy(coalitions).to(ids.device).repeat_interleave(len(ids), dim=0)
        batch = ids.repeat(len(coalitions), 1)
        with torch.no_grad(), self._absent(present):
            losses = self.loss(self.model(batch), batch)
        if losses.shape != (len(batch),):
            raise ValueError(
                f"the loss has shape {tuple(losses.shape)}, expected one for each of {len(batch)} rows"
            )
        return np.asarray(losses.double().cpu().numpy()).reshape(len(coalitions), len(ids))

    @contextmanager
    def _absent(self, present: Tensor) -> Iterator[None]:
        """Take parts out for the rows of a batch: ``present`` bool [rows, players]."""
        players: dict[nn.Module, list[int]] = {}
        for player, part in enumerate(self.parts):
            players.setdefault(part.module, []).append(player)
        with ExitStack() as hooks:
            for module, mine in players.items():
                if self.parts[mine[0]].end:
                    hook: Any = module.register_forward_pre_hook(self._replacing(mine, present))
                else:
                    hook = module.register_forward_hook(_bypassing(present[:, mine[0]]), with_kwargs=True)
                hooks.callback(hook.remove)
            yield

    def _replacing(self, mine: list[int], present: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = inputs[0].clone()  # [rows, tokens, inputs]
            for player in mine:
                part = self.parts[player]
                gone = ~present[:, player]
                mean = 0.0 if self.means is None else self.means[player].to(x)
                x[gone, ..., part.begin : part.end] = mean
            return (x, *inputs[1:])

        return hook


def _bypassing(present: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        given = inputs[0] if inputs else named["hidden_states"]
        made = output[0] if isinstance(output, tuple) else output
        kept = torch.where(present.view(-1, *[1] * (made.dim() - 1)), made, given)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    return hook


def input_means(model: nn.Module, ids: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Return each part's mean input over the tokens of ``ids``, float32 [inputs of the part] each."""
    means: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        means[module] = inputs[0].flatten(0, -2).double().mean(dim=0)

    with torch.no_grad(), ExitStack() as hooks:
        for module in {part.module for part in parts}:
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        model(ids)
    return tuple(means[part.module][part.begin : part.end].float() for part in parts)
