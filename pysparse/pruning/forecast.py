"""How long a recipe will take on a model: its arithmetic, by rates measured on this machine for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from pysparse.calib import STATISTICS
from pysparse.pruning.layout import BlockLayout, PrunableLayer
from pysparse.pruning.recipe import Recipe
from pysparse.pruning.target import check_sparsity

_SIZE = 1024  # of the square products that are timed
_SAMPLE = (256, 2048)  # of the weight that is pruned for the rate of a recipe without an update
_SWEEP_SHARE = 0.5  # of a product's rate: a sweep reads a row of U for each weight that it prunes
_FACTOR = 1.6  # floating-point operations for an inverse Cholesky factor, over n^3


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted seconds on the CPU. An estimate: attention, tails of the text and a busy machine are left out."""

    calibration: float  # forward passes and statistics
    pruning: float  # scores, masks, updates
    tokens: int  # of calibration that were reckoned with, at most

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.calibration + self.pruning

    def __str__(self) -> str:
        return (
            f"about {_duration(self.total)} (calibration on {self.tokens:,} tokens {_duration(self.calibration)}, "
            f"pruning {_duration(self.pruning)}) on this CPU with {torch.get_num_threads()} threads"
        )


def forecast(layout: BlockLayout, recipe: Recipe, sparsity: float, tokens: int) -> Forecast:
    """Return the time that :func:`pysparse.pruning.run` will take for ``tokens`` tokens of calibration.

    The model may be on the meta device. A product of the model's dtype, one of float32 and a small pruning are
    timed, once in a process: about a second. A search of the allocation is not included.
    """
    threads, dtype = torch.get_num_threads(), layout.layers[0].weight.dtype
    inputs = {_input_of(layer) for layer in layout.layers}  # layers that share one share its statistics
    passes = 2.0 * bool(recipe.needs) + bool(recipe.allocation.needs)  # one for statistics, one to propagate
    weights = sum(one.numel() for _, block in layout.blocks for one in block.parameters() if one.dim() > 1)
    calibration = 2.0 * passes * tokens * weights / _product_rate(dtype, threads)
    if "gram" not in recipe.needs:
        count = sum(layer.size for layer in layout.layers)
        return Forecast(calibration, count / _pruning_rate(recipe, sparsity), tokens * bool(passes))
    rate = _product_rate(torch.float32, threads)
    calibration += sum(2.0 * tokens * cols**2 for *_, cols in inputs) / rate
    pruning = 0.0
    if "gram" in recipe.reconstruction.needs:
        pruning += sum(_FACTOR * cols**3 for *_, cols in inputs) / rate
        for rows, cols in (layer.shape for layer in layout.layers):
            pruning += sparsity * rows * cols**2 / (_SWEEP_SHARE * rate)
    return Forecast(calibration, pruning, tokens)


def _input_of(layer: PrunableLayer) -> tuple[int, str, int]:
    """Return what tells inputs apart: the block, the module that owns the layer, and the width."""
    return layer.block, layer.path.rpartition(".")[0], layer.shape[1]


@lru_cache
def _product_rate(dtype: torch.dtype, threads: int) -> float:
    """Return floating-point operations a second of a product of ``dtype`` with ``threads`` threads."""
    left, right = torch.ones(_SIZE, _SIZE, dtype=dtype), torch.ones(_SIZE, _SIZE, dtype=dtype)
    return 2.0 * _SIZE**3 / _fastest(lambda: left @ right)


def _pruning_rate(recipe: Recipe, sparsity: float) -> float:
    """Return how many weights a second the recipe scores and masks, from the pruning of a small matrix."""
    rows, cols = _SAMPLE
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    stats = {name: STATISTICS[name](cols, torch.device("cpu")).value(1) for name in recipe.needs}
    fixed = recipe.structure.fixed_sparsity
    target = check_sparsity(sparsity if fixed is None else fixed)
    solve = recipe.reconstruction.solve
    seconds = _fastest(lambda: solve(weight, stats, recipe.importance, recipe.structure, target))
    return rows * cols / seconds


def _fastest(function: Callable[[], object], rounds: int = 3) -> float:
    best = float("inf")
    with torch.no_grad():
        function()
        for _ in range(rounds):
            start = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - start)
    return best


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
