"""What is sparse in a model: one line a linear layer, as a table, a plot, a dict or JSON."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pysparse.measure.memory import model_bytes
from pysparse.measure.results import (
    Chart,
    Result,
    make_table,
    megabytes,
    save_plot,
    to_jsonable,
)
from pysparse.measure.twins import linear_layers
from pysparse.nn import CompactLinear, DenseLinear, SparseLinear

_LONG = 64  # layers above which the table shows one line per kind of layer


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear layer."""

    path: str
    shape: tuple[int, int]  # (out_features, in_features)
    dtype: str
    sparsity: float  # fraction of zeros (packed layers: of weights that are not stored)
    stored_bytes: int  # of the weight in memory now
    dense_bytes: int
    kernel: str  # what a forward pass runs, and why


@dataclass(frozen=True, slots=True)
class Report(Result):
    """Sparsity, bytes and kernels of a model's linear layers; prints itself as a table."""

    layers: tuple[LayerReport, ...]
    model_bytes: int  # parameters and buffers of the whole model

    @property
    def sparsity(self) -> float:
        """Zeros over all weights of the linear layers that are at all sparse (1 % or more)."""
        return _pooled([layer for layer in self.layers if layer.sparsity >= 0.01])

    @property
    def linear_bytes(self) -> int:
        """Bytes of all linear weights in memory."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def linear_bytes_dense(self) -> int:
        """Bytes of the same weights stored densely."""
        return sum(layer.dense_bytes for layer in self.layers)

    def table(self) -> Table:
        """Return a rich table; models with many layers are summed up per kind of layer."""
        columns = ("layer", "shape", "dtype", "sparsity", "stored", "dense", "kernel")
        rows = [_row(name, group) for name, group in self._groups().items()]
        rows.append(("total", "", "", f"{_pooled(list(self.layers)):.1%}", megabytes(self.linear_bytes),
                     megabytes(self.linear_bytes_dense), ""))  # fmt: skip
        return make_table(f"{len(self.layers)} linear layers", columns, rows)

    def _groups(self) -> dict[str, list[LayerReport]]:
        if len(self.layers) <= _LONG:
            return {layer.path: [layer] for layer in self.layers}
        groups: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault(layer.path.rpartition(".")[2], []).append(layer)
        return {f"*.{name} ({len(group)})": group for name, group in groups.items()}

    def plot(self, path: str | Path) -> Path:
        """Draw the sparsity of each layer into ``path``; RuntimeError without matplotlib."""
        kinds: dict[str, tuple[list[float], list[float]]] = {}
        for index, layer in enumerate(self.layers):
            x, y = kinds.setdefault(layer.path.rpartition(".")[2], ([], []))
            x.append(index)
            y.append(layer.sparsity)
        return save_plot(path, [Chart("sparsity by layer", "linear layer", "fraction of zeros", kinds)])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        result: dict[str, Any] = to_jsonable(self)
        result.update(
            sparsity=self.sparsity, linear_bytes=self.linear_bytes, linear_bytes_dense=self.linear_bytes_dense
        )
        return result

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def _repr_html_(self) -> str:
        console = Console(record=True, width=120, file=io.StringIO())
        console.print(self.table())
        return console.export_html(inline_styles=True)


def report(model: nn.Module) -> Report:
    """Describe the linear layers of ``model``, packed or not; ValueError when it has none."""
    layers = tuple(_describe(path, module) for path, module in linear_layers(model).items())
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear layers: there is nothing to prune or report")
    return Report(layers, model_bytes(model).total)


def _describe(path: str, module: nn.Module) -> LayerReport:
    if isinstance(module, SparseLinear | CompactLinear):
        shape = (module.out_features, module.in_features)
        dense = shape[0] * shape[1] * module.dtype.itemsize
        return LayerReport(
            path, shape, _name(module.dtype), module.sparsity, module.nbytes, dense, module.kernel
        )
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    rows, cols = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]  # Conv1D is transposed
    zeros = 1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    size = weight.numel() * weight.element_size()
    kernel = "pysparse dense for few tokens, else torch" if isinstance(module, DenseLinear) else "torch dense"
    return LayerReport(path, (int(rows), int(cols)), _name(weight.dtype), zeros, size, size, kernel)


def _row(name: str, group: list[LayerReport]) -> tuple[str, ...]:
    shapes, dtypes, kernels = (
        {getattr(one, field) for one in group} for field in ("shape", "dtype", "kernel")
    )
    return (
        name,
        " x ".join(map(str, next(iter(shapes)))) if len(shapes) == 1 else "various",
        next(iter(dtypes)) if len(dtypes) == 1 else "various",
        f"{_pooled(group):.1%}",
        megabytes(sum(one.stored_bytes for one in group)),
        megabytes(sum(one.dense_bytes for one in group)),
        next(iter(kernels)) if len(kernels) == 1 else "various",
    )


def _pooled(layers: list[LayerReport]) -> float:
    weights = [layer.shape[0] * layer.shape[1] for layer in layers]
    return sum(layer.sparsity * n for layer, n in zip(layers, weights, strict=True)) / max(1, sum(weights))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
