"""Shaver (Tran et al. 2024, arXiv 2411.13052): prune an embedding table to any budget from one array of scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pysparse.calib.clicks import Clicks
from pysparse.methods.ctr_training import logits_of
from pysparse.nn import SparseEmbedding
from pysparse.nn.ctr import CtrModel
from pysparse.ops import EntrySamples
from pysparse.ops.shapley_entries import Players, check_players
from pysparse.shapley import (
    DeepModel,
    EntryRun,
    EntryShapley,
    FactorisationMachine,
    Walker,
    entry_shapley,
)
from pysparse.shapley.entries import ErrorKind, cost_of_a_draw
from pysparse.shapley.sampling import Progress

Base = Literal["codebook", "zero"]
_CHUNK = 8192  # samples of a gradient


@dataclass(frozen=True, slots=True, eq=False)
class EntryScores:
    """One score an entry; every budget is a cut of the same order, so masks are nested."""

    scores: NDArray[np.float64]  # [rows, dims], the lowest go first
    base: NDArray[np.float32]  # [fields, dims], what stands in for a pruned entry
    field_sizes: tuple[int, ...]
    shapley: EntryShapley | None = None  # values and errors, where the scores come from them

    def keep(self, sparsity: float) -> Tensor:
        """Return the mask that drops floor(rows * dims * sparsity) entries, bool [rows, dims]; ties by position."""
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"sparsity is in [0, 1], got {sparsity}")
        if not np.isfinite(self.scores).all():
            raise ValueError(f"{int((~np.isfinite(self.scores)).sum())} scores are not finite")
        keep = np.ones(self.scores.size, bool)
        order = np.argsort(self.scores, axis=None, kind="stable")
        keep[order[: int(self.scores.size * sparsity)]] = False
        return torch.from_numpy(keep.reshape(self.scores.shape))


def field_codebook(
    table: NDArray[np.floating[Any]], field_sizes: Sequence[int], counts: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """Return each field's mean row, weighted by ``counts`` [rows] of occurrences: float64 [fields, dims].

    It minimises the expected squared error of a lookup whose row is replaced (section 1.4 of the specification of
    the paper's code). Raises ValueError for counts that do not fit and for a field that never occurs.
    """
    if counts.shape != (len(table),) or sum(field_sizes) != len(table):
        raise ValueError(f"{len(table)} rows, but counts of {counts.shape} and fields of {sum(field_sizes)}")
    result = np.empty((len(field_sizes), table.shape[1]))
    begin = 0
    for place, size in enumerate(field_sizes):
        weights = counts[begin : begin + size].astype(np.float64)
        if not weights.sum() > 0.0:
            raise ValueError(f"field {place} (rows {begin} to {begin + size - 1}) does not occur in the data")
        result[place] = weights @ table[begin : begin + size].astype(np.float64) / weights.sum()
        begin += size
    return result


def base_of(model: CtrModel, clicks: Clicks, base: Base) -> NDArray[np.float32]:
    """Return what stands in for pruned entries, [fields, dims]: the codebook, or zeros."""
    if base not in ("codebook", "zero"):
        raise ValueError(f"base is 'codebook' or 'zero', got {base!r}")
    _check_fields(model, clicks)
    if base == "zero":
        return np.zeros((len(clicks.field_sizes), model.config.dims), np.float32)
    return field_codebook(_table(model), clicks.field_sizes, clicks.counts()).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Shaver:
    """Score entries by the magnitude of their Shapley values in the game of the mean log loss."""

    passes: int = 1  # over the data
    target: Literal["label", "model"] = "label"  # "model": the dense model's own probability, needs no labels
    base: Base = "codebook"
    rank: Literal["abs", "signed"] = "abs"
    antithetic: bool = True  # Differs from the paper: its code draws single orders
    seed: int = 0
    stop: float | None = None  # end early once largest error over spread is below (0.01 in the paper's code)
    state: Path | None = None  # where a run that is cut off goes on
    progress: Progress | None = None
    # "field": a sample's rows are its players, cols times fewer; a row's value is shared over its entries by their
    # distance from the base (:func:`spread_over_entries`).
    players: Players = "entry"
    se: ErrorKind = (
        "population"  # as :class:`pysparse.shapley.EntryRun` says; "permutation" takes passes by twos
    )

    def __post_init__(self) -> None:
        check_players(self.players)
        if self.passes < 1:
            raise ValueError(f"passes is at least 1, got {self.passes}")
        if self.se == "permutation" and self.passes % 2:
            raise ValueError(f"se='permutation' needs an even number of passes, got {self.passes}")
        if self.target not in ("label", "model") or self.rank not in ("abs", "signed"):
            raise ValueError(
                f"target is 'label' or 'model', rank 'abs' or 'signed'; got {self.target!r}, {self.rank!r}"
            )

    def evaluations(self, clicks: Clicks, dims: int) -> int:
        """Return how many evaluations of the head a run makes at most."""
        players = len(clicks.field_sizes) * (dims if self.players == "entry" else 1)
        return self.passes * cost_of_a_draw(players, self.antithetic) * len(clicks.ids)

    def __call__(self, model: CtrModel, clicks: Clicks) -> EntryScores:
        """Estimate all values with the compiled walks; the model is read in eval mode and not changed.

        Raises ValueError for fields that do not fit the model, a field without occurrences and numbers that are not
        finite.
        """
        samples = entry_samples(model, clicks, self.base, self.target)
        run = EntryRun(
            self.evaluations(clicks, samples.table.shape[1]), self.seed, self.antithetic, self.stop,
            state=self.state, progress=self.progress, players=self.players, se=self.se,
        )  # fmt: skip
        values = entry_shapley(walker_of(model), samples, run)
        mean = values.mean
        if self.players == "field":
            mean = spread_over_entries(mean, _distance(model, clicks, samples.base))
        scores = np.abs(mean) if self.rank == "abs" else mean
        return EntryScores(scores, samples.base, clicks.field_sizes, values)


def spread_over_entries(values: NDArray[np.float64], distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share the values of rows [rows, 1] out over their entries in proportion to |``distance``| [rows, cols].

    A row sums to its value; one that is its base has the value 0 and so have its entries (section 2.3 of the
    specification of the paper's code).
    """
    size = np.abs(distance)
    total = size.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(size, total, out=np.zeros_like(size), where=total > 0.0)
    return values * shares


def walker_of(model: CtrModel) -> Walker:
    """Return the compiled walk of a click model."""
    head = model.head()
    return FactorisationMachine() if head is None else DeepModel(head)


def entry_samples(
    model: CtrModel, clicks: Clicks, base: Base = "codebook", target: Literal["label", "model"] = "label"
) -> EntrySamples:
    """Return the game's samples: table, base, ids, what no entry moves, and labels or the model's probabilities."""
    codes = base_of(model, clicks, base)
    labels = clicks.labels
    if target == "model":
        labels = (1.0 / (1.0 + np.exp(-logits_of(model, clicks).astype(np.float64)))).astype(np.float32)
    with torch.inference_mode():
        offset = model.offset(torch.from_numpy(clicks.ids)).float().contiguous().numpy()
    return EntrySamples(_table(model), codes, clicks.ids, labels, offset)


Scorer = Callable[[CtrModel, Clicks], EntryScores]


@dataclass(frozen=True, slots=True)
class EntryMagnitude:
    """|entry - base|: plain magnitude with base "zero"."""

    base: Base = "zero"

    def __call__(self, model: CtrModel, clicks: Clicks) -> EntryScores:
        """Score without an evaluation of the model."""
        codes = base_of(model, clicks, self.base)
        distance = np.abs(_distance(model, clicks, codes))
        return EntryScores(distance, codes, clicks.field_sizes)


@dataclass(frozen=True, slots=True)
class CodebookError:
    """occurrences * (entry - base)^2: the squared error that replacing the entry adds to all lookups. It is free."""

    base: Base = "codebook"

    def __call__(self, model: CtrModel, clicks: Clicks) -> EntryScores:
        """Score without an evaluation of the model."""
        codes = base_of(model, clicks, self.base)
        scores = clicks.counts()[:, None] * _distance(model, clicks, codes) ** 2
        return EntryScores(scores, codes, clicks.field_sizes)


@dataclass(frozen=True, slots=True)
class EntryTaylor:
    """|gradient of the mean log loss * (base - entry)|: the first-order change of the loss (Molchanov et al. 2017)."""

    base: Base = "codebook"

    def __call__(self, model: CtrModel, clicks: Clicks) -> EntryScores:
        """Score by one pass forward and backward over the data, in eval mode."""
        codes = base_of(model, clicks, self.base)
        gradient = np.zeros(model.table.shape)
        was = model.training
        model.eval()
        ids, labels = torch.from_numpy(clicks.ids), torch.from_numpy(clicks.labels)
        for part, wanted in zip(ids.split(_CHUNK), labels.split(_CHUNK), strict=True):
            loss = nn.functional.binary_cross_entropy_with_logits(model(part), wanted, reduction="sum")
            (found,) = torch.autograd.grad(loss, [model.table])
            gradient += found.numpy()
        model.train(was)
        scores = np.abs(gradient / len(ids) * _distance(model, clicks, codes))
        return EntryScores(scores, codes, clicks.field_sizes)


@dataclass(frozen=True, slots=True)
class RandomEntries:
    """Scores drawn at random: what any method has to beat."""

    base: Base = "codebook"
    seed: int = 0

    def __call__(self, model: CtrModel, clicks: Clicks) -> EntryScores:
        """Draw the scores."""
        codes = base_of(model, clicks, self.base)
        scores = np.random.default_rng(self.seed).random(tuple(model.table.shape))
        return EntryScores(scores, codes, clicks.field_sizes)


def prune_embedding(model: CtrModel, scores: EntryScores, sparsity: float) -> CtrModel:
    """Return a copy of the model that looks its rows up in a packed table; for inference."""
    return pack_embedding(model, scores.keep(sparsity), scores.base, scores.field_sizes)


def pack_embedding(
    model: CtrModel, keep: Tensor, base: NDArray[np.float32], field_sizes: Sequence[int]
) -> CtrModel:
    """Return a copy of the model with only the entries of ``keep`` and ``base`` in place of the others."""
    result = copy.deepcopy(model).eval()
    result.embedding = SparseEmbedding.from_dense(
        model.table.detach(), keep, field_sizes=field_sizes, codebook=torch.from_numpy(base)
    )
    return result


def _table(model: CtrModel) -> NDArray[np.float32]:
    return np.ascontiguousarray(model.table.detach().cpu().float().numpy())


def _distance(model: CtrModel, clicks: Clicks, codes: NDArray[np.float32]) -> NDArray[np.float64]:
    return _table(model).astype(np.float64) - np.repeat(codes, clicks.field_sizes, axis=0)


def _check_fields(model: CtrModel, clicks: Clicks) -> None:
    if clicks.field_sizes != model.config.field_sizes:
        raise ValueError(
            f"the data have fields of {list(clicks.field_sizes)} values, the model {list(model.config.field_sizes)}"
        )
    if len(clicks.ids) == 0:
        raise ValueError("there are no samples")
