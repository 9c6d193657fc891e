"""Convert a model's linear layers in place: zeros to sparse layers and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pysparse.formats import BitmapTensor
from pysparse.nn.compact import CompactLinear
from pysparse.nn.dense import DenseLinear
from pysparse.nn.dispatch import MIN_SPARSITY, OPTIMIZE, Verdict, judge
from pysparse.nn.fused import fuse_, unfuse_
from pysparse.nn.linear import SparseLinear
from pysparse.nn.match import matches
from pysparse.nn.mixin import check_module
from pysparse.nn.norm import unfuse_norms_
from pysparse.nn.packing import Packing, grid_of

Filter = Callable[[nn.Module, str], bool]
_NOT_A_TARGET = Verdict(False, "not a target")
_FOLLOWERS: list[Callable[[nn.Module], None]] = []


@dataclass(slots=True)
class ConversionReport:
    """What :func:`sparsify_` did with each linear layer, by module path."""

    sparse: dict[str, float] = field(default_factory=dict)  # path -> sparsity
    dense: dict[str, str] = field(default_factory=dict)  # path -> why it stayed dense, and what it runs on


def sparsify_(
    model: nn.Module,
    filter_fn: Filter | None = None,
    *,
    optimize: str = "balanced",
    tokens: int = 1,
    min_sparsity: float | None = None,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    dense_kernels: bool = True,
    values: str | None = None,
    pattern: str | None = None,
    group_size: int | None = None,
    activation_bits: int = 8,
    fuse: bool = False,
) -> ConversionReport:
    """Replace, in place, each ``nn.Linear`` whose zeros pay by a :class:`SparseLinear`; prunes nothing.

    ``optimize`` says what pays, by this machine's measured costs (see ``pysparse tune``; else measured now):
    "balanced": being faster with ``tokens`` rows a call (1: generating text; an encoder passes batch times length)
    and never taking more memory than the dense weight. Memory is weighed first: with another number of rows such a
    layer may be slower than the dense one. "speed": being faster with any number; a layer may hold pair blocks and
    a dense copy too, and is slower with none but by misprediction. "memory": being smaller, whatever the speed.
    ``min_sparsity`` (a fraction of zeros) decides in their stead, as 0.3 does for what is not measured: tiny weights,
    float16, on a GPU, int8 values, patterns.

    ``targets`` and ``ignore`` hold class names, module paths or "re:" expressions; ``filter_fn(module, path)`` decides
    in their stead. What stays dense is in the report with the cause; with ``dense_kernels`` as :class:`DenseLinear`.
    ``values``, ``pattern``, ``group_size`` and ``activation_bits`` are those of :class:`Packing`: int8 values make
    :class:`CompactLinear` layers, of SparseLinear ones too; a pattern is checked in every layer, and packed by compact
    indices where these are read faster than a mask (:meth:`Packing.fitted`). With ``fuse``, see :func:`fuse_`.
    Raises ValueError, before any layer is changed, for an unknown ``optimize``, ``tokens`` below 1, a
    ``min_sparsity`` outside [0, 1] and, naming the layer, for weights that cannot be kept so: a crowded group,
    a NaN or infinity in int8, over 65536 inputs. TypeError for what is no module.
    """
    check_module(model)
    _check_wishes(optimize, tokens, min_sparsity)
    packing = Packing(values, pattern, group_size, activation_bits)
    chosen = filter_fn or (
        lambda layer, path: matches(layer, path, targets) and not matches(layer, path, ignore)
    )
    verdicts = {
        path: _verdict(path, layer, packing, min_sparsity, optimize, tokens)
        if chosen(layer, path)
        else _NOT_A_TARGET
        for path, layer in _linears(model, packing)
    }
    report = _convert(model, verdicts, packing, OPTIMIZE[optimize], dense_kernels)
    report.dense |= _others(model)
    if fuse:
        fuse_(model)
    _tell(model)
    return report


def on_conversion(tell: Callable[[nn.Module], None]) -> None:
    """Have ``tell(model)`` called after each :func:`sparsify_` and :func:`densify_`: by what saves models, say."""
    _FOLLOWERS.append(tell)


def _tell(model: nn.Module) -> None:
    for follower in _FOLLOWERS:
        follower(model)


def _linears(model: nn.Module, packing: Packing) -> list[tuple[str, Any]]:
    """Return what may be packed: linear layers of torch's, and where values or places change, bitmap layers too."""
    kinds = (nn.Linear, DenseLinear) if packing.is_plain else (nn.Linear, DenseLinear, SparseLinear)
    return [(path, module) for path, module in model.named_modules() if type(module) in kinds]


def _others(model: nn.Module) -> dict[str, str]:
    """Return why layers that multiply by a weight, but are not ``nn.Linear`` itself, stay as they are."""
    known = (nn.Linear, DenseLinear, SparseLinear, CompactLinear)
    return {
        path: f"{type(module).__name__} is not torch.nn.Linear itself: left as it is"
        for path, module in model.named_modules()
        if type(module) not in known and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }


def _convert(
    model: nn.Module, verdicts: dict[str, Verdict], packing: Packing, prefill: str, dense_kernels: bool
) -> ConversionReport:
    """Put the layers in place, one by one: each dense weight goes when its packing has come."""
    report = ConversionReport()
    for path, verdict in verdicts.items():
        layer: Any = model.get_submodule(path)
        if verdict.packs:
            report.sparse[path] = _sparsity(layer)
            packed: nn.Module = packed_layer(layer, packing)
            if isinstance(packed, SparseLinear | CompactLinear):
                packed.prefill = prefill
        elif isinstance(layer, SparseLinear):
            continue
        else:
            packed = DenseLinear.from_linear(layer) if dense_kernels else layer
            kernel = packed.kernel if isinstance(packed, DenseLinear) else "dense torch"
            report.dense[path] = f"{verdict.reason}; {kernel}"
        _replace(model, path, packed.train(layer.training))
    return report


def packed_layer(linear: Any, packing: Packing) -> SparseLinear | CompactLinear:
    """Return a linear layer, dense with zeros or a bitmap, in that packing; the bias is shared."""
    rows = linear.bitmap() if isinstance(linear, SparseLinear) else BitmapTensor.from_dense(linear.weight)
    packing = packing.fitted(rows.shape, rows.nnz, rows.dtype)
    if packing.is_plain:
        return linear if isinstance(linear, SparseLinear) else SparseLinear.from_bitmap(rows, linear.bias)
    return CompactLinear(
        packing.pack(rows, grid_of(linear)), linear.bias, packing.activation_bits, rows.dtype
    )


def _check_wishes(optimize: str, tokens: int, min_sparsity: float | None) -> None:
    if optimize not in OPTIMIZE:
        raise ValueError(f"optimize is one of {', '.join(OPTIMIZE)}; got '{optimize}'")
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    if min_sparsity is not None and not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity is a fraction between 0 and 1, got {min_sparsity}")


def _sparsity(linear: nn.Linear | SparseLinear) -> float:
    if isinstance(linear, SparseLinear):
        return linear.sparsity
    return 1.0 - int(torch.count_nonzero(linear.weight)) / max(1, linear.weight.numel())


def _verdict(
    path: str, linear: Any, packing: Packing, min_sparsity: float | None, optimize: str, tokens: int
) -> Verdict:
    """Decide about one layer; ValueError where one that is to be packed cannot be."""
    zeros = _sparsity(linear)
    if min_sparsity is None and packing.is_plain and linear.weight.device.type == "cpu":
        shape = (linear.out_features, linear.in_features)
        return judge(shape, zeros, linear.weight.dtype, optimize, tokens)
    threshold = MIN_SPARSITY if min_sparsity is None else min_sparsity
    if zeros < threshold:
        return Verdict(False, f"{zeros:.0%} sparse, below min_sparsity={threshold:.0%}")
    if not packing.is_plain:
        try:
            packing.check(linear.weight.detach())
        except ValueError as error:
            raise ValueError(f"layer '{path}': {error}") from None
    return Verdict(True, f"{zeros:.0%} sparse")


def densify_(model: nn.Module) -> nn.Module:
    """Put plain ``nn.Linear`` layers back for every sparse and dense kernel layer; undo fusions, return ``model``."""
    unfuse_norms_(unfuse_(model))
    for path, module in [
        (p, m) for p, m in model.named_modules() if isinstance(m, SparseLinear | CompactLinear | DenseLinear)
    ]:
        if isinstance(module, SparseLinear | CompactLinear):
            _replace(model, path, module.to_dense())
        else:
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            _replace(model, path, linear.train(module.training))
    _tell(model)
    return model


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    if not path:
        raise ValueError("the model itself is the linear layer: use SparseLinear.from_dense(linear)")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
