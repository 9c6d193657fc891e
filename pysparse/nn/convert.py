"""Convert a model's linear layers in place: zeros to sparse layers and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pysparse.formats import BitmapTensor
from pysparse.nn.compact import CompactLinear
from pysparse.nn.linear import DenseLinear, SparseLinear
from pysparse.nn.match import matches
from pysparse.nn.packing import Packing

# Below this sparsity the packed weight's bytes save too little at one token, and the unpacking costs
# more than it saves at many; measured per machine by the benchmarks.
MIN_SPARSITY = 0.3

Filter = Callable[[nn.Module, str], bool]


@dataclass(slots=True)
class ConversionReport:
    """What :func:`sparsify_` did with each linear layer, by module path."""

    sparse: dict[str, float] = field(default_factory=dict)  # path -> sparsity
    dense: dict[str, str] = field(default_factory=dict)  # path -> why it stayed dense


def sparsify_(
    model: nn.Module,
    filter_fn: Filter | None = None,
    *,
    min_sparsity: float = MIN_SPARSITY,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    dense_kernels: bool = True,
    values: str | None = None,
    pattern: str | None = None,
    group_size: int | None = None,
    activation_bits: int = 8,
) -> ConversionReport:
    """Replace, in place, each ``nn.Linear`` with enough zeros by a :class:`SparseLinear`; prunes nothing.

    ``targets`` and ``ignore`` hold class names, module paths or "re:" expressions; ``filter_fn(module, path)``
    decides in their stead. Layers under ``min_sparsity`` stay dense, with the cause in the report;
    with ``dense_kernels`` they run as :class:`DenseLinear` on the compiled dense kernel.
    ``values="int8"`` makes :class:`CompactLinear` layers, of the bitmap layers that there are too, with
    ``group_size`` inputs a scale (None: one scale a row) and tokens quantised to ``activation_bits``.
    ``pattern="n:m"`` (n kept of m) is checked in every layer, and packed with compact indices where these take
    no more bytes than a mask and have a vector kernel (2:4, 1:4, 2:8, 1:8, 2:16), else under a mask.
    Raises ValueError, before any layer is changed, for a ``min_sparsity`` outside [0, 1] and, naming the layer,
    for weights that cannot be kept so: a crowded group, a NaN or infinity in int8, over 65536 inputs.
    """
    if not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity is a fraction between 0 and 1, got {min_sparsity}")
    packing = Packing(values, pattern, group_size, activation_bits)
    report = ConversionReport()
    kinds = (nn.Linear, DenseLinear) if packing.is_plain else (nn.Linear, DenseLinear, SparseLinear)
    for path, linear in model.named_modules():
        if type(linear) not in kinds:
            continue
        chosen = filter_fn(linear, path) if filter_fn else (
            matches(linear, path, targets) and not matches(linear, path, ignore)
        )  # fmt: skip
        sparsity = _checked_sparsity(path, linear, packing if chosen else Packing(), min_sparsity)
        if chosen and sparsity >= min_sparsity:
            report.sparse[path] = sparsity
        elif not isinstance(linear, SparseLinear):
            cause = f"{sparsity:.0%} sparse, below min_sparsity={min_sparsity:.0%}"
            report.dense[path] = cause if chosen else "not a target"
    for path in (*report.sparse, *(report.dense if dense_kernels else ())):
        layer: Any = model.get_submodule(path)  # one by one: each dense weight goes when its packing has come
        packed = packed_layer(layer, packing) if path in report.sparse else DenseLinear.from_linear(layer)
        _replace(model, path, packed.train(layer.training))
    return report


def packed_layer(linear: Any, packing: Packing) -> SparseLinear | CompactLinear:
    """Return a linear layer, dense with zeros or a bitmap, in that packing; the bias is shared."""
    rows = linear.bitmap() if isinstance(linear, SparseLinear) else BitmapTensor.from_dense(linear.weight)
    packing = packing.fitted(rows.shape, rows.nnz, rows.dtype)
    if packing.is_plain:
        return linear if isinstance(linear, SparseLinear) else SparseLinear.from_bitmap(rows, linear.bias)
    return CompactLinear(packing.pack(rows), linear.bias, packing.activation_bits, rows.dtype)


def _checked_sparsity(path: str, linear: Any, packing: Packing, min_sparsity: float) -> float:
    """Return a layer's fraction of zeros; ValueError where one that is to be packed cannot be."""
    if isinstance(linear, SparseLinear):
        zeros = linear.sparsity
    else:
        zeros = 1.0 - int(torch.count_nonzero(linear.weight)) / max(1, linear.weight.numel())
    if zeros >= min_sparsity and not packing.is_plain:
        try:
            packing.check(linear.weight.detach())
        except ValueError as error:
            raise ValueError(f"layer '{path}': {error}") from None
    return zeros


def densify_(model: nn.Module) -> nn.Module:
    """Put plain ``nn.Linear`` layers back in place of every sparse and dense kernel layer; return ``model``."""
    for path, module in [
        (p, m) for p, m in model.named_modules() if isinstance(m, SparseLinear | CompactLinear | DenseLinear)
    ]:
        if isinstance(module, SparseLinear | CompactLinear):
            _replace(model, path, module.to_dense())
        else:
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            _replace(model, path, linear.train(module.training))
    return model


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    if not path:
        raise ValueError("the model itself is the linear layer: use SparseLinear.from_dense(linear)")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
