"""What pruning did, layer by layer: exact counts, times, warnings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from pysparse.measure.results import (
    Chart,
    Result,
    make_table,
    megabytes,
    save_plot,
    to_jsonable,
)
from pysparse.pruning.layout import PrunableLayer, skipped_note
from pysparse.pruning.recipe import MaskStructure, Recipe
from pysparse.pruning.structure import Unstructured

_SHORT = 0.005  # sparsity that may be missing without a word
_LONG = 64  # layers above which the table shows one line a block


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """One pruned weight matrix."""

    path: str
    block: int
    shape: tuple[int, int]  # (out_features, in_features)
    structure: str
    requested: float  # sparsity
    pruned: int  # weights that the mask removed
    zeros: int  # weights that are zero now: the pruned ones and those that were zero and survived
    seconds: float  # to score, select and write
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of weights that the mask removed."""
        return self.pruned / max(1, self.size)


@dataclass(frozen=True, slots=True)
class PruneReport(Result):
    """What :func:`pysparse.pruning.run` did."""

    target: float  # sparsity asked for
    recipe: dict[str, Any]
    layers: tuple[PrunedLayer, ...]
    skipped: dict[str, str]  # what else holds matrices and was not pruned, or not under this path, and why
    model_parameters: int
    calibration: dict[str, Any] | None  # None: the method needs none
    propagate: str  # whether a block's statistics saw the blocks before it "pruned" or "dense"
    seed: int
    seconds: dict[str, float]  # by phase, and "total"
    threads: int
    warnings: tuple[str, ...] = ()
    search: dict[str, Any] | None = None  # what was tried to find a setting of the allocation, if that was
    memory: dict[str, int | str] = field(default_factory=dict)  # bytes: the process at its largest

    @property
    def weights(self) -> int:
        """Number of weights in the pruned matrices."""
        return sum(layer.size for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Weights that the masks removed over all weights of the pruned matrices."""
        return sum(layer.pruned for layer in self.layers) / max(1, self.weights)

    @property
    def share_of_model(self) -> float:
        """Weights in the pruned matrices over all parameters of the model."""
        return self.weights / max(1, self.model_parameters)

    def table(self) -> Table:
        """Return a rich table; a model with many layers gets one line a block."""
        columns = ("layer", "shape", "structure", "asked", "pruned", "sparsity", "seconds")
        rows = [_row(name, group) for name, group in self._groups().items()]
        rows.append(_row("total", self.layers))
        return make_table(f"pruned {len(self.layers)} layers", columns, rows, "\n".join(self._remarks()))

    def _groups(self) -> dict[str, list[PrunedLayer]]:
        if len(self.layers) <= _LONG:
            return {layer.path: [layer] for layer in self.layers}
        groups: dict[str, list[PrunedLayer]] = {}
        for layer in self.layers:
            groups.setdefault(f"block {layer.block}", []).append(layer)
        return {f"{name} ({len(group)} layers)": group for name, group in groups.items()}

    def _remarks(self) -> list[str]:
        share = (
            f"{self.share_of_model:.0%} of the model's {self.model_parameters:,} parameters are in these layers; "
            f"{skipped_note(self.skipped)}; {self.seconds['total']:.1f} s"
            + (
                f", {megabytes(int(peak))} resident at most"
                if (peak := self.memory.get("resident_peak"))
                else ""
            )
        )
        source = "no calibration" if self.calibration is None else (
            f"calibrated on {self.calibration['sequences']} sequences of {self.calibration['source']}"
        )  # fmt: skip
        searched = [] if self.search is None else [
            f"{name} = {value:.4g} was found in {len(self.search['tried'])} trials on text kept apart"
            for name, value in self.search.items() if name != "tried"
        ]  # fmt: skip
        return [share, source, *searched, *self.warnings]

    def with_warnings(self, warnings: Sequence[str]) -> PruneReport:
        """Return a copy with more warnings."""
        return dataclasses.replace(self, warnings=(*self.warnings, *warnings))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, totals first."""
        result: dict[str, Any] = {
            "sparsity": self.sparsity, "weights": self.weights, "share_of_model": self.share_of_model,
            **to_jsonable(self),
        }  # fmt: skip
        for entry, layer in zip(result["layers"], self.layers, strict=True):
            entry["sparsity"] = layer.sparsity
        return result

    def plot(self, path: str | Path) -> Path:
        """Draw sparsity and seconds by block, and the search if there was one; RuntimeError without matplotlib."""
        sparsity: dict[str, tuple[list[float], list[float]]] = {}
        seconds: dict[float, float] = {}
        for layer in self.layers:
            x, y = sparsity.setdefault(layer.path.rpartition(".")[2], ([], []))
            x.append(layer.block)
            y.append(layer.sparsity)
            seconds[layer.block] = seconds.get(layer.block, 0.0) + layer.seconds
        bars = {"": (list(seconds), list(seconds.values()))}
        charts = [
            Chart(f"sparsity by layer, {self.sparsity:.1%} in all", "block", "fraction of zeros", sparsity),
            Chart("time to score, select and write", "block", "seconds", bars, bars=True),
        ]
        if self.search is not None:
            tried = {
                "": ([pair[0] for pair in self.search["tried"]], [pair[1] for pair in self.search["tried"]])
            }
            charts.append(Chart("search", "setting", "perplexity on text kept apart", tried))
        parts = (f"{part} {value['type']}" for part, value in self.recipe.items())
        return save_plot(path, charts, caption=", ".join(parts))


def _row(name: str, group: Sequence[PrunedLayer]) -> tuple[Any, ...]:
    size = max(1, sum(layer.size for layer in group))
    shapes, structures = ({getattr(layer, key) for layer in group} for key in ("shape", "structure"))
    return (
        name,
        " x ".join(map(str, next(iter(shapes)))) if len(shapes) == 1 else "various",
        next(iter(structures)) if len(structures) == 1 else "various",
        f"{sum(layer.requested * layer.size for layer in group) / size:.2%}",
        sum(layer.pruned for layer in group),
        f"{sum(layer.pruned for layer in group) / size:.2%}",
        f"{sum(layer.seconds for layer in group):.3f}",
    )


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the parts of a recipe as {part: {"type": class name, field: value, ...}}."""
    parts = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return {
        name: {"type": type(part).__name__, **(to_jsonable(part) if dataclasses.is_dataclass(part) else {})}
        for name, part in parts.items()
    }


def shortfall_warning(structure: MaskStructure, layers: Sequence[PrunedLayer], target: float) -> str | None:
    """Say that whole numbers of weights a row came to clearly less than ``target``; None otherwise."""
    pruned, size = sum(layer.pruned for layer in layers), sum(layer.size for layer in layers)
    if not isinstance(structure, Unstructured) or not size or target - pruned / size <= _SHORT:
        return None
    return (
        f"{pruned / size:.2%} of the weights were pruned, {target:.2%} were asked for: each {structure.group} loses a "
        "whole number of weights, rounded down"
    )


def structure_warning(structure: MaskStructure, layers: Sequence[PrunableLayer]) -> str | None:
    """Say once which layers have a width that the pattern does not divide; None when all fit."""
    ragged = [layer for layer in layers if structure.dense_columns(layer.shape[1])]
    if not ragged:
        return None
    cols = ragged[0].shape[1]
    return (
        f"{len(ragged)} layers have in_features that {structure} does not divide, the last columns stay dense: "
        f"{ragged[0].path} has {cols}, its last {structure.dense_columns(cols)} are not pruned"
    )
