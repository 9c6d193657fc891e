"""What a recipe would do to a model, before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from pysparse.measure.results import make_table, megabytes, to_jsonable
from pysparse.pruning.allocation import allocate
from pysparse.pruning.layout import BlockLayout
from pysparse.pruning.recipe import Evidence, Recipe
from pysparse.pruning.report import describe_recipe, structure_warning
from pysparse.pruning.target import resolve_sparsity


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One layer that will be pruned."""

    path: str
    shape: tuple[int, int]  # (out_features, in_features)
    sparsity: float  # its share of the budget
    pruned: int  # weights that will be zeroed, exactly
    dense_bytes: int
    packed_bytes: int  # predicted: kept values, a bit a weight, an offset a row


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

    @property
    def pruned(self) -> int:
        """Weights that will be zeroed."""
        return sum(layer.pruned for layer in self.layers)

    def table(self) -> Table:
        """Return a rich table, one line a layer and a total."""
        columns = ("layer", "shape", "sparsity", "to prune", "dense", "packed")
        rows: list[tuple[Any, ...]] = [
            (
                layer.path, f"{layer.shape[0]} x {layer.shape[1]}", f"{layer.sparsity:.1%}", layer.pruned,
                megabytes(layer.dense_bytes), megabytes(layer.packed_bytes),
            )
            for layer in self.layers
        ]  # fmt: skip
        dense, packed = (
            sum(getattr(layer, f"{kind}_bytes") for layer in self.layers) for kind in ("dense", "packed")
        )
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        rows.append(
            ("total", "", f"{self.pruned / weights:.1%}", self.pruned, megabytes(dense), megabytes(packed))
        )
        caption = (
            f"{self.structure}; {weights / self.model_parameters:.0%} of the model's {self.model_parameters:,} "
            f"parameters are in these layers, {len(self.skipped)} linear layers stay dense"
        )
        return make_table("plan: nothing was touched", columns, rows, "\n".join((caption, *self.warnings)))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        result: dict[str, Any] = to_jsonable(self)
        return result

    def __rich__(self) -> Table:
        return self.table()


def plan(layout: BlockLayout, recipe: Recipe, sparsity: float | None = None) -> PrunePlan:
    """Return what :func:`pysparse.pruning.run` would do; the model may be on the meta device.

    Raises ValueError for a wrong sparsity, and for an allocation that needs the model's activations.
    """
    if recipe.allocation.needs:
        name = type(recipe.allocation).__name__
        raise ValueError(f"{name} decides from activations: there is no plan before the model has been run")
    target = resolve_sparsity(recipe.structure, sparsity)
    budgets = allocate(recipe, [Evidence(layer, {}) for layer in layout.layers], target)
    layers = []
    for layer, budget in zip(layout.layers, budgets, strict=True):
        pruned = recipe.structure.pruned_count(*layer.shape, budget)
        item = layer.weight.element_size()
        packed = packed_bytes(*layer.shape, layer.size - pruned, item)
        layers.append(PlannedLayer(layer.path, layer.shape, budget, pruned, layer.size * item, packed))
    ragged = structure_warning(recipe.structure, layout.layers)
    return PrunePlan(
        target, str(recipe.structure), describe_recipe(recipe), recipe.needs_calibration, tuple(layers),
        layout.skipped, layout.model_size, (*layout.warnings, *([ragged] if ragged else [])),
    )  # fmt: skip


def packed_bytes(rows: int, cols: int, nnz: int, item_bytes: int) -> int:
    """Return the bytes of a [rows, cols] bitmap matrix with ``nnz`` values: values, mask bits, row offsets."""
    return nnz * item_bytes + rows * ((cols + 7) // 8) + rows * 8
