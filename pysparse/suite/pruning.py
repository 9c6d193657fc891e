"""What a cell does to its model: fold, learn rates, prune, recalibrate, reconstruct."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pysparse.api import prune
from pysparse.api.loading import Windows, calibration_for, tokenizer_or_none
from pysparse.calib.batches import Batch
from pysparse.measure.quality import evaluating
from pysparse.methods import learn_rates, recipe_for
from pysparse.models.discover import discover
from pysparse.pruning import (
    BlockLayout,
    StructuralMethod,
    fold_batch_norm_,
    match_outputs_,
    recalibrate_,
)
from pysparse.pruning.run import without_cache
from pysparse.suite.cells import Cell
from pysparse.suite.recipes import Plan
from pysparse.suite.tasks import Scope, Task


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned copy of a model, and what is zero in it now."""

    model: nn.Module
    sparsity: (
        float  # zeros over all weights in scope; of a smaller model, the share of the blocks' parameters gone
    )
    layers: list[dict[str, Any]]  # name, shape [out, in], sparsity; none for a smaller model


def prune_copy(dense: nn.Module, task: Task, cell: Cell, plan: Plan) -> Pruned:
    """Prune a copy of ``dense`` as ``cell`` says; ``dense`` stays as it is."""
    job = _Job(dense, task, cell, plan)
    return job.run()


class _Job:
    def __init__(self, dense: nn.Module, task: Task, cell: Cell, plan: Plan) -> None:
        self._task, self._cell, self._plan, self._scope = task, cell, plan, task.scope
        self._reference = copy.deepcopy(dense) if plan.spec.fold_batch_norm else dense
        self._batches: tuple[Batch, ...] | None = None
        self._material = task.calibration(dense, cell.model, seed=cell.seed)
        if plan.spec.fold_batch_norm:
            fold_batch_norm_(self._reference, self.batches()[0], lambda batch: call(self._reference, batch))
        self._model = copy.deepcopy(self._reference)

    def batches(self) -> tuple[Batch, ...]:
        """Return the calibration data as inputs of the model."""
        if self._batches is None:
            spec = self._plan.spec
            cut = Windows(spec.num_samples, spec.max_length, seed=self._cell.seed)
            tokenizer = tokenizer_or_none(self._reference, self._reference, None)
            self._batches = calibration_for(self._material, self._reference, tokenizer, cut).batches
        return self._batches

    def run(self) -> Pruned:
        layout = _layout(self._model, self._scope)
        report = self._prune(layout)
        if isinstance(self._plan.method, StructuralMethod):
            return Pruned(self._model, float(report.sparsity), [])
        if self._plan.spec.recalibrate:
            with torch.no_grad(), evaluating(self._model):
                recalibrate_(self._model, self.batches(), lambda batch: call(self._model, batch))
        self._reconstruct()
        return _counted(self._model, layout)

    def _prune(self, layout: BlockLayout) -> Any:
        spec, cell, method = self._plan.spec, self._cell, self._plan.method
        if self._plan.learned is not None:
            with without_cache(self._model):
                rates = learn_rates(layout, self.batches(), cell.sparsity, self._plan.learned, call)
            method = recipe_for(spec.method, cell.pattern, rates)
        needs = isinstance(method, StructuralMethod) or method.needs_calibration
        return prune(
            self._model, cell.sparsity, recipe=method, calibration=self._material if needs else None,
            num_samples=spec.num_samples, max_length=spec.max_length, targets=self._scope.targets,
            ignore=self._scope.ignore, whole=self._scope.whole, propagate=spec.propagate,  # type: ignore[arg-type]
            seed=cell.seed, progress=False,
        ).report  # fmt: skip

    def _reconstruct(self) -> None:
        matching = self._plan.matching
        if matching is None:
            return
        settings = dataclasses.replace(matching, seed=matching.seed + self._cell.seed)
        scope = dataclasses.replace(self._scope, whole=matching.granularity != "block")
        layout = _layout(self._model, scope)
        with (
            without_cache(self._model),
            without_cache(self._reference),
        ):  # a cache would outlive the step it is made in
            match_outputs_(layout, self._reference, self.batches(), settings, _structure(self._plan), call)


def call(model: nn.Module, batch: Batch) -> Any:
    """Run ``model`` on a calibration batch."""
    return model(*batch.args, **batch.kwargs)


def _structure(plan: Plan) -> Any:
    return None if isinstance(plan.method, StructuralMethod) else plan.method.structure


def _layout(model: nn.Module, scope: Scope) -> BlockLayout:
    return discover(model, scope.targets, scope.ignore, whole=scope.whole)


def _counted(model: nn.Module, layout: BlockLayout) -> Pruned:
    """Count what is zero in each layer, whoever made it so."""
    zeros = [layer.size - int(torch.count_nonzero(layer.weight)) for layer in layout.layers]
    layers = [
        {"name": layer.path, "shape": list(layer.shape), "sparsity": count / max(1, layer.size)}
        for layer, count in zip(layout.layers, zeros, strict=True)
    ]
    return Pruned(model, sum(zeros) / max(1, layout.size), layers)
