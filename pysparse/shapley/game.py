"""What is to be shared among players: a function of coalitions, and the games that come ready made."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

Coalitions = NDArray[np.bool_]  # [B, n_players], True for players that are in
Values = NDArray[np.float64]  # [B]
Orders = NDArray[np.int32]  # [P, n_players], each row a permutation of the players

MAX_PLAYERS = 1 << 24


class Game(Protocol):
    """A cooperative game: how much each coalition is worth. Only differences matter to Shapley values."""

    @property
    def n_players(self) -> int:
        """How many players there are."""

    def __call__(self, coalitions: Coalitions) -> Values:
        """Return the values, float64 [B], of ``coalitions``, bool [B, n_players]."""


@runtime_checkable
class WalkingGame(Protocol):
    """A game that knows how to go on from a coalition to the next one, one player at a time."""

    def walk(self, orders: Orders) -> NDArray[np.float64]:
        """Return v along each order, float64 [P, n_players + 1]: from the empty coalition, players joining in turn."""


@dataclass(frozen=True, slots=True)
class FunctionGame:
    """A game that is the caller's own function.

    ``function`` takes coalitions, bool [B, n_players], as NumPy arrays or with ``inputs="torch"`` as tensors on
    ``device``, and returns B numbers as an array, a tensor or a list.
    """

    function: Callable[[Any], Any]
    n_players: int
    inputs: Literal["numpy", "torch"] = "numpy"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_players(self.n_players)
        if self.inputs not in ("numpy", "torch"):
            raise ValueError(f"inputs is 'numpy' or 'torch', got {self.inputs!r}")

    def __call__(self, coalitions: Coalitions) -> Values:
        """Return the function's values, float64 [B]."""
        if self.inputs == "numpy":
            return as_values(self.function(coalitions))
        with torch.no_grad():
            return as_values(self.function(torch.from_numpy(coalitions).to(self.device)))


def check_players(count: int) -> int:
    """Return ``count``; ValueError unless it is from 1 to 2^24."""
    if not 1 <= count <= MAX_PLAYERS:
        raise ValueError(f"a game has 1 to {MAX_PLAYERS} players, got {count}")
    return count


def as_real(values: Any) -> Values:
    """Return real numbers as float64; ValueError for complex ones, whose imaginary part must not get lost."""
    found = np.asarray(values)
    if np.iscomplexobj(found):
        raise ValueError(f"a game's values are real numbers, got {found.dtype}")
    return found.astype(np.float64, copy=False)


def check_budget(budget: Any) -> int:
    """Return ``budget`` as an int; ValueError unless it is a whole number of evaluations."""
    try:
        if not isinstance(budget, bool):
            return operator.index(budget)
    except TypeError:  # floats, NaN and infinity among them, text, None
        pass
    raise ValueError(f"budget is a whole number of evaluations, got {budget!r}")


def as_values(values: Any) -> Values:
    """Return what a function gave as float64 [B]; a trailing axis of size 1 is dropped. ValueError if complex."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values if values.is_complex() else values.double()).numpy()
    result = as_real(values)
    return result[:, 0] if result.ndim == 2 and result.shape[1] == 1 else result


def evaluate(game: Game, coalitions: Coalitions) -> Values:
    """Return the game's values; ValueError when there is not one finite number for each coalition."""
    values = as_values(game(coalitions))
    if values.shape != (len(coalitions),):
        raise ValueError(f"the game returned shape {values.shape} for {len(coalitions)} coalitions")
    check_finite(values, coalitions)
    return values


def check_finite(values: Values, coalitions: Coalitions) -> None:
    """Raise ValueError that names the first coalition whose value is not finite."""
    bad = ~np.isfinite(values)
    if bad.any():
        first = int(bad.argmax())
        members = np.flatnonzero(coalitions[first])
        shown = ", ".join(map(str, members[:8])) + (", ..." if len(members) > 8 else "")
        raise ValueError(
            f"the game's value of coalition {{{shown}}} ({len(members)} players) is {values[first]}"
        )


def ends(game: Game) -> tuple[float, float]:
    """Return v(nobody) and v(everybody): two evaluations."""
    pair = np.zeros((2, game.n_players), dtype=np.bool_)
    pair[1] = True
    empty, full = evaluate(game, pair)
    return float(empty), float(full)
