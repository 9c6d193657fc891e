"""What a recipe would do to a model, before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from pysparse.measure.results import make_table, megabytes, to_jsonable
from pysparse.pruning.allocation import WeightsUnknownError, allocate
from pysparse.pruning.forecast import Forecast, forecast
from pysparse.pruning.layout import BlockLayout, PrunableLayer, skipped_note
from pysparse.pruning.mixed import mixed_note, pattern_of
from pysparse.pruning.recipe import Evidence, Recipe
from pysparse.pruning.report import describe_recipe, structure_warning
from pysparse.pruning.solve import pruned_count
from pysparse.pruning.target import resolve_sparsity


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One layer that will be pruned."""

    path: str
    shape: tuple[int, int]  # (out_features, in_features)
    sparsity: float | None  # its share of the budget; None when it is not known yet
    pruned: int | None  # weights that will be zeroed, exactly
    dense_bytes: int
    packed_bytes: int | None  # predicted: kept values, a bit a weight, an offset a row
    structure: str | None = None  # of this layer


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """Layers, budgets and predicted bytes of a recipe on a model."""

    sparsity: float  # the target
    structure: str
    recipe: dict[str, Any]
    needs_calibration: bool
    layers: tuple[PlannedLayer, ...]
    skipped: dict[str, str]
    model_parameters: int
    warnings: tuple[str, ...] = ()
    forecast: Forecast | None = None  # of the time; None when the amount of calibration is not known

    @property
    def known(self) -> bool:
        """Tell whether the sparsity of each layer is known; else only the totals are."""
        return all(layer.sparsity is not None for layer in self.layers)

    @property
    def weights(self) -> int:
        """Number of weights in the layers that will be pruned."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def pruned(self) -> int:
        """Weights that will be zeroed: exact, or the target's share when the layers' are not known yet."""
        counts = [layer.pruned for layer in self.layers if layer.pruned is not None]
        return sum(counts) if self.known else round(self.sparsity * self.weights)

    @property
    def packed_bytes(self) -> int:
        """Predicted bytes of all these layers; it depends on their total of zeros alone."""
        item = sum(layer.dense_bytes for layer in self.layers) / self.weights
        overhead = sum(packed_bytes(*layer.shape, 0, 0) for layer in self.layers)
        return overhead + round((self.weights - self.pruned) * item)

    def table(self) -> Table:
        """Return a rich table, one line a layer and a total."""
        columns = ("layer", "shape", "structure", "sparsity", "to prune", "dense", "packed")
        rows: list[tuple[Any, ...]] = [
            (
                layer.path, f"{layer.shape[0]} x {layer.shape[1]}", layer.structure or "?",
                "?" if layer.sparsity is None else f"{layer.sparsity:.1%}",
                "?" if layer.pruned is None else layer.pruned, megabytes(layer.dense_bytes),
                "?" if layer.packed_bytes is None else megabytes(layer.packed_bytes),
            )
            for layer in self.layers
        ]  # fmt: skip
        dense = sum(layer.dense_bytes for layer in self.layers)
        rows.append(
            ("total", "", "", f"{self.pruned / self.weights:.1%}", self.pruned, megabytes(dense),
             megabytes(self.packed_bytes))
        )  # fmt: skip
        caption = (
            f"{self.structure}; {self.weights / self.model_parameters:.0%} of the model's {self.model_parameters:,} "
            f"parameters are in these layers, {skipped_note(self.skipped)}"
        )
        time = () if self.forecast is None else (f"predicted time: {self.forecast}",)
        return make_table(
            "plan: nothing was touched", columns, rows, "\n".join((caption, *time, *self.warnings))
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, totals first."""
        totals: dict[str, Any] = {
            "known": self.known, "pruned": self.pruned, "packed_bytes": self.packed_bytes,
            "predicted_seconds": None if self.forecast is None else self.forecast.total,
        }  # fmt: skip
        return {**totals, **to_jsonable(self)}

    def __rich__(self) -> Table:
        return self.table()


def plan(
    layout: BlockLayout,
    recipe: Recipe,
    sparsity: float | None = None,
    evidence: Sequence[Evidence] | None = None,
    tokens: int | None = None,
) -> PrunePlan:
    """Return what :func:`pysparse.pruning.run` would do; the model may be on the meta device.

    An allocation that looks at activations decides from ``evidence``
    (:func:`pysparse.pruning.gather_evidence`); without it, or without the weights that it looks at, or while a
    search is still to come, the layers' sparsities are not known yet: the plan has the totals, and says so.
    The time is predicted for ``tokens`` tokens of calibration. Raises ValueError for a wrong sparsity.
    """
    target = resolve_sparsity(recipe.structure, sparsity)
    budgets, reason = _budgets(layout, recipe, target, evidence)
    shares: Sequence[float | None] = [None] * len(layout.layers) if budgets is None else budgets
    layers = tuple(
        _planned(layer, recipe, budget) for layer, budget in zip(layout.layers, shares, strict=True)
    )
    notes = (
        structure_warning(recipe.structure, layout.layers),
        reason,
        mixed_note(recipe.structure, budgets or []),
    )
    return PrunePlan(
        target, str(recipe.structure), describe_recipe(recipe), recipe.needs_calibration, layers,
        layout.skipped, layout.model_size, (*layout.warnings, *filter(None, notes)),
        None if tokens is None else forecast(layout, recipe, target, tokens),
    )  # fmt: skip


def _budgets(
    layout: BlockLayout, recipe: Recipe, target: float, evidence: Sequence[Evidence] | None
) -> tuple[list[float] | None, str | None]:
    """Return the layers' sparsities, or None and why they are not known."""
    name = type(recipe.allocation).__name__
    unknown = f"the sparsities of the layers are not known yet: {name} "
    if recipe.allocation.needs and evidence is None:
        return None, unknown + "decides from activations; pass calibration to have the plan computed"
    if getattr(recipe.allocation, "searched", False):
        return None, unknown + "searches its setting by pruning and scoring the model"
    found = [Evidence(layer, {}) for layer in layout.layers] if evidence is None else evidence
    try:
        return allocate(recipe, found, target), None
    except WeightsUnknownError:
        return None, unknown + "looks at the weights; plan the loaded model to have it computed"


def _planned(layer: PrunableLayer, recipe: Recipe, budget: float | None) -> PlannedLayer:
    item = layer.weight.element_size()
    if budget is None:
        return PlannedLayer(layer.path, layer.shape, None, None, layer.size * item, None)
    structure = pattern_of(recipe.structure, budget)
    pruned = pruned_count(layer, structure, budget, bool(recipe.needs))
    packed = packed_bytes(*layer.shape, layer.size - pruned, item)
    return PlannedLayer(layer.path, layer.shape, budget, pruned, layer.size * item, packed, str(structure))


def packed_bytes(rows: int, cols: int, nnz: int, item_bytes: int) -> int:
    """Return the bytes of a [rows, cols] bitmap matrix with ``nnz`` values: values, mask bits, row offsets."""
    return nnz * item_bytes + rows * ((cols + 7) // 8) + rows * 8
