"""Convert a model's linear layers in place: zeros to sparse layers and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pysparse.nn.compact import CompactLinear
from pysparse.nn.linear import DenseLinear, SparseLinear
from pysparse.nn.match import matches

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
    ``values="int8"`` and ``pattern="n:m"`` (n kept of m, checked) make :class:`CompactLinear` layers instead, with
    ``group_size`` inputs a scale and tokens quantised to ``activation_bits``.
    Raises ValueError when ``min_sparsity`` is not in [0, 1].
    """
    if not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity is a fraction between 0 and 1, got {min_sparsity}")
    report = ConversionReport()
    for path, linear in [(p, m) for p, m in model.named_modules() if type(m) in (nn.Linear, DenseLinear)]:
        chosen = filter_fn(linear, path) if filter_fn else (
            matches(linear, path, targets) and not matches(linear, path, ignore)
        )  # fmt: skip
        sparsity = 1.0 - int(torch.count_nonzero(linear.weight)) / max(1, linear.weight.numel())
        if chosen and sparsity >= min_sparsity:
            replacement: nn.Module = (
                SparseLinear.from_dense(linear)
                if values is None and pattern is None
                else CompactLinear.from_dense(
                    linear, values, pattern, group_size=group_size, activation_bits=activation_bits
                )
            ).train(linear.training)
            report.sparse[path] = sparsity
        else:
            cause = (
                f"{sparsity:.0%} sparse, below min_sparsity={min_sparsity:.0%}" if chosen else "not a target"
            )
            report.dense[path] = cause
            replacement = DenseLinear.from_linear(linear) if dense_kernels else linear
        _replace(model, path, replacement)
    return report


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
