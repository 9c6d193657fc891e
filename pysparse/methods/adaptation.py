"""The rounds of an adaptation: prune a little, give adapters their rank, train them under the mask, merge."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pysparse.calib import Calibration
from pysparse.methods.attach import Attached
from pysparse.methods.block_features import reconstruction_errors
from pysparse.methods.losa import LoSA
from pysparse.methods.losa_budgets import rates_by_similarity, with_rates
from pysparse.nn import Adapter
from pysparse.pruning import BlockLayout, Recipe, run

_LOGGER = logging.getLogger("pysparse")
ADAPTATIONS = ("losa", "masked-lora", "masked-full")


@dataclass(frozen=True, slots=True)
class Trained:
    """What the training of a round says."""

    steps: int
    first_loss: float
    last_loss: float  # the mean of the last quarter of the steps


@dataclass(frozen=True, slots=True)
class Round:
    """One round as it was done; losses are nats per token of the training text."""

    index: int  # from 1
    total: int
    target: float
    sparsity: float  # achieved, over the layers' weights
    rates: list[float]  # sparsity asked of each block; empty when the model was sparse already
    errors: list[float]  # reconstruction error of each block; empty when ranks are uniform
    ranks: list[int]  # of each block; empty without adapters
    trained: Trained
    seconds: float


@dataclass(frozen=True, slots=True)
class Adapt:
    """The last stage of a recipe: :func:`pysparse.adapt` with these settings.

    Without a sparsity of its own "masked-lora" and "masked-full" train under the zeros that the stages before
    have made; "losa" needs one and goes on pruning up to it.
    """

    method: str = "masked-lora"
    host: str = "wanda"  # that prunes
    rounds: int = 5  # of "losa"
    rank: int = 8
    alpha: float = 16.0  # the scale of the adapters is alpha / rank
    learning_rate: float = 2e-4
    epochs: float = 1.0
    batch_size: int = 8
    bf16: bool = False
    texts: str | None = None  # file to train on; None: the bundled calibration text

    def __post_init__(self) -> None:
        if self.method not in ADAPTATIONS:
            raise ValueError(f"unknown method '{self.method}'; known: {', '.join(ADAPTATIONS)}")
        for name in ("rounds", "rank", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_adapter(self.alpha)
        check_training(self.epochs, self.learning_rate)


def check_adapter(alpha: float, dropout: float = 0.0) -> None:
    """Raise ValueError for a scale or a dropout with which an adapter learns nothing."""
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} must be a number above 0: adapters are scaled by alpha / rank")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} must be in [0, 1): at 1 an adapter sees no input")


def check_training(epochs: float, learning_rate: float) -> None:
    """Raise ValueError for a training without a step, or a rate that no step can take."""
    if not 0.0 < epochs < math.inf:
        raise ValueError(f"epochs={epochs} must be a number above 0: training takes at least a step")
    if not 0.0 <= learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate} must be a number of 0 or more")


class Train(Protocol):
    """Trains what asks for gradients in a model."""

    def __call__(self, attached: Attached, index: int, total: int) -> Trained:
        """Train for round ``index`` of ``total``."""


class Progress(Protocol):
    """Where rounds are kept, so that a later run can go on."""

    def save(self, state: State) -> None:
        """Keep the model as it goes into the training of its round."""

    def load(self) -> State | None:
        """Return what :meth:`save` kept last, or None."""


@dataclass(slots=True)
class State:
    """Pruned for round ``index``, and not yet trained."""

    index: int
    target: float
    rates: list[float]
    errors: list[float]
    ranks: list[int]
    weights: dict[str, torch.Tensor]  # float32 [out_features, in_features] with zeros, by layer
    adapters: dict[str, Adapter]
    done: list[Round] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is done in each round."""

    sparsities: list[float | None]  # of each round; None: the zeros that are there
    mean_ranks: list[int]  # of each round; 0: no adapters, the kept weights are trained
    host: Recipe | None  # prunes; None: nothing is pruned
    losa: LoSA | None  # sparsities by similarity and ranks by error; None: uniform
    scale: float = 2.0
    dropout: float = 0.0
    similarity_sequences: int = 64
    seed: int = 0


class Adaptation:
    """Rounds over one model, which is float32 and changed in place."""

    def __init__(
        self,
        layout: BlockLayout,
        schedule: Schedule,
        calibration: Calibration | None,
        train: Train,
        *,
        progress: Progress | None = None,
        callbacks: tuple[Callable[[Round], None], ...] = (),
    ) -> None:
        self._layout, self._schedule, self._calibration = layout, schedule, calibration
        self._train, self._progress, self._callbacks = train, progress, callbacks
        self._dense: BlockLayout | None = None
        self._adapters: dict[str, Adapter] = {}
        self._blocks = sorted({layer.block for layer in layout.layers})

    def run(
        self, keep_last: Callable[[Attached], Any] = lambda attached: None, dtype: torch.dtype = torch.float32
    ) -> list[Round]:
        """Do all rounds and return what each did; the model is merged in the end.

        ``keep_last`` is called with the trained layers of the last round before they are merged; the merged
        weights are then rounded to ``dtype``. With progress kept by an earlier run, the rounds that it finished
        are not done again.
        """
        schedule = self._schedule
        total = len(schedule.sparsities)
        state = self._progress.load() if self._progress is not None else None
        if schedule.losa is not None:
            self._dense = _twin(self._layout)
        done = [] if state is None else list(state.done)
        for index in range(len(done) + 1, total + 1):
            start = time.perf_counter()
            if state is None or state.index != index:
                state = self._prepare(index, done)
                if self._progress is not None:
                    self._progress.save(state)
            attached = self._attach(state)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(schedule.seed + index)
                trained = self._train(attached, index, total)
            if index == total:
                keep_last(attached)
            self._adapters = attached.merge(dtype if index == total else torch.float32)
            done.append(
                Round(
                    index, total, state.target, self._sparsity(), state.rates, state.errors, state.ranks, trained,
                    time.perf_counter() - start,
                )
            )  # fmt: skip
            _LOGGER.info(
                "round %d of %d: sparsity %.4f, loss %.4f -> %.4f",
                index, total, done[-1].sparsity, trained.first_loss, trained.last_loss,
            )  # fmt: skip
            for callback in self._callbacks:
                callback(done[-1])
        return done

    def _prepare(self, index: int, done: list[Round]) -> State:
        """Prune for a round and size its adapters."""
        schedule = self._schedule
        target, mean_rank = schedule.sparsities[index - 1], schedule.mean_ranks[index - 1]
        rates: list[float] = []
        if target is not None and schedule.host is not None:
            recipe, mean = schedule.host, target
            if schedule.losa is not None and self._calibration is not None:
                width, sequences = schedule.losa.half_width(target), schedule.similarity_sequences
                rates = rates_by_similarity(self._layout, self._calibration, target, width, sequences)
                recipe, mean = with_rates(recipe, self._layout, rates, target)
            run(self._layout, recipe, mean, self._calibration)
        achieved = self._sparsity()
        errors: list[float] = []
        ranks = [mean_rank] * len(self._blocks) if mean_rank else []
        if schedule.losa is not None and self._dense is not None and self._calibration is not None:
            found = reconstruction_errors(self._dense, self._layout, self._calibration)
            errors = [found[block] for block in self._blocks]
            ranks = schedule.losa.ranks(errors, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(schedule.seed + 1000 * index)
            adapters = self._sized(ranks)
        weights = {layer.path: layer.weight for layer in self._layout.layers}
        return State(
            index, achieved if target is None else target, rates, errors, ranks, weights, adapters, list(done)
        )

    def _sized(self, ranks: list[int]) -> dict[str, Adapter]:
        by_block = dict(zip(self._blocks, ranks, strict=True)) if ranks else {}
        return {
            layer.path: (
                self._adapters[layer.path].resized(by_block[layer.block])
                if layer.path in self._adapters
                else Adapter.fresh(layer.shape, by_block[layer.block], self._schedule.scale)
            )
            for layer in self._layout.layers
            if layer.block in by_block
        }

    def _attach(self, state: State) -> Attached:
        for layer in self._layout.layers:
            if state.weights[layer.path].data_ptr() != layer.weight.data_ptr():
                layer.write(state.weights[layer.path])
        state.weights.clear()
        return Attached(self._layout, state.adapters, dropout=self._schedule.dropout)

    def _sparsity(self) -> float:
        kept = sum(int(layer.weight.count_nonzero()) for layer in self._layout.layers)
        return 1.0 - kept / self._layout.size


def _twin(layout: BlockLayout) -> BlockLayout:
    """Return the layout of a copy of the model, for outputs of the model as it was."""
    model = copy.deepcopy(layout.model)
    blocks = tuple((path, model.get_submodule(path)) for path, _ in layout.blocks)
    return BlockLayout(model, blocks, (), {})


def mean_of_last(losses: list[float]) -> float:
    """Return the mean of the last quarter of ``losses``, NaN for none."""
    last = losses[-max(1, math.ceil(len(losses) / 4)) :]
    return sum(last) / len(last) if last else math.nan
