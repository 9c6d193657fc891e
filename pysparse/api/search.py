"""The search for ATP's common difference: prune, score on text kept apart, put the dense weights back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pysparse import data
from pysparse.api.loading import Texts
from pysparse.calib import Calibration, load_texts
from pysparse.calib.offload import tensors_of
from pysparse.measure.progress import Advance
from pysparse.measure.quality import safe_exp, score_models
from pysparse.measure.windows import TokenWindows, choose_window, text_windows
from pysparse.methods import ATP, BetaSearch, beta_grid, search_beta
from pysparse.pruning import BlockLayout, Evidence, Execution, Recipe, resolve_sparsity, run
from pysparse.pruning.run import Propagate

_HELD_BACK = 5  # one document in five is scored instead of calibrated on
_WINDOWS = 32  # scored in each trial
_PHASE = "searching ATP's beta"


def is_searched(recipe: Recipe) -> bool:
    """Tell whether the allocation of ``recipe`` has a setting that is still to be found."""
    return isinstance(recipe.allocation, ATP) and recipe.allocation.searched


def part_texts(calibration: Any, search_texts: Texts | None) -> tuple[Any, list[str]]:
    """Return what to calibrate on and the texts to score in the search.

    Without ``search_texts`` every fifth document of the calibration texts (None: the bundled ones) is held
    back for it. Raises ValueError when there are fewer than five documents, or tokens instead of texts.
    """
    if search_texts is not None:
        return calibration, load_texts(search_texts)
    source = data.calibration_texts() if calibration is None else calibration
    if isinstance(source, str | Path):
        source = load_texts(source)
    texts = isinstance(source, list | tuple) and all(isinstance(item, str) for item in source)
    if not texts or len(source) < _HELD_BACK:
        what = f"{len(source)} texts" if texts else f"calibration of type {type(source).__name__}"
        raise ValueError(
            f"ATP searches beta on text that is not calibrated on, and cannot hold any back from {what}: pass "
            "search_texts=[...] (not the text of your test), or a beta, e.g. allocation='atp:beta=0.01'"
        )
    held_back = list(source[_HELD_BACK - 1 :: _HELD_BACK])
    rest = [text for index, text in enumerate(source) if index % _HELD_BACK != _HELD_BACK - 1]
    return rest, held_back


def search_windows(model: nn.Module, tokenizer: Any, texts: list[str], seed: int) -> TokenWindows:
    """Return the windows that each trial is scored on; ValueError without a tokenizer or with too little text."""
    if tokenizer is None:
        raise ValueError("ATP's search scores text and needs a tokenizer: pass tokenizer=..., or a beta")
    try:
        return text_windows(tokenizer, texts, choose_window(model, None), max_windows=_WINDOWS, seed=seed)
    except ValueError as error:
        raise ValueError(f"the text for ATP's search: {error}") from None


def find_beta(
    layout: BlockLayout,
    recipe: Recipe,
    sparsity: float | None,
    calibration: Calibration | None,
    windows: TokenWindows,
    propagate: Propagate,
    advance: Advance,
    execution: Execution,
) -> tuple[Recipe, BetaSearch]:
    """Return ``recipe`` with the beta of least perplexity, and what was tried; the weights stay as they were.

    Keeps a copy of the blocks while it runs. Each trial is a whole pruning and one scoring; the journal of
    ``execution`` remembers the trials that are done.
    """
    model = layout.model
    score_models({"dense": model}, windows)  # refuses what gives no perplexity before a weight is touched
    layers = [Evidence(layer, {}) for layer in layout.layers]
    target = resolve_sparsity(recipe.structure, sparsity)
    betas = beta_grid(layers, target)

    journal, trials = execution.journal, dataclasses.replace(execution, journal=None)

    def trial(beta: float) -> float:
        with _restored(layout):
            tried = dataclasses.replace(recipe, allocation=ATP(beta))
            run(layout, tried, sparsity, calibration, propagate=propagate, execution=trials)
            score = score_models({"pruned": model}, windows)["pruned"]
        return safe_exp(score.nats_per_token)

    def merit(beta: float) -> float:
        advance(_PHASE, betas.index(beta), len(betas))
        return trial(beta) if journal is None else journal.remember(f"beta={beta!r}", lambda: trial(beta))

    with _quiet():
        found = search_beta(betas, merit)
    advance(_PHASE, len(betas), len(betas))
    return dataclasses.replace(recipe, allocation=ATP(found.beta)), found


@contextmanager
def _restored(layout: BlockLayout) -> Iterator[None]:
    """Put back every parameter and buffer of the blocks afterwards: a reconstruction may change biases too."""
    kept = [{name: one.clone() for name, one in tensors_of(block)} for _, block in layout.blocks]
    try:
        yield
    finally:
        with torch.no_grad():
            for (_, block), values in zip(layout.blocks, kept, strict=True):
                for name, tensor in tensors_of(block, writable=True):
                    tensor.copy_(values[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the trials from repeating the warnings that the final run gives."""
    logger = logging.getLogger("pysparse")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
