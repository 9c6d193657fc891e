"""Convert a model's linear layers in place: zeros to sparse layers and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pysparse.formats import BitmapTensor
from pysparse.nn.compact import CompactLinear
from pysparse.nn.dispatch import MIN_SPARSITY, OPTIMIZE, Verdict, judge
from pysparse.nn.fused import fuse_, unfuse_
from pysparse.nn.linear import DenseLinear, SparseLinear
from pysparse.nn.match import matches
from pysparse.nn.packing import Packing

Filter = Callable[[nn.Module, str], bool]
_NOT_A_TARGET = Verdict(False, "not a target")


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

    ``optimize`` says what pays. "balanced": being faster, by this machine's measured costs, with ``tokens`` rows a
    call (1: generating text; an encoder passes batch times length), in less memory than the dense weight, at any
    time. "speed": being faster with any number of rows; a layer may then hold pair blocks and a dense copy too, for
    the calls that gain from them, and outgrow its dense self. "memory": being smaller, and nothing is held beside
    the bitmap. The first call on a machine measures its costs, some seconds for each dtype (see ``pysparse tune``).
    ``min_sparsity`` (a fraction of zeros) decides in their stead, as 0.3 does for weights that are not measured:
    tiny ones, float16, on a GPU.

    ``targets`` and ``ignore`` hold class names, module paths or "re:" expressions; ``filter_fn(module, path)``
    decides in their stead. What stays dense is in the report with the cause; with ``dense_kernels`` it becomes a
    :class:`DenseLinear`, which takes the compiled dense kernel where that is faster than torch.
    ``values="int8"`` makes :class:`CompactLinear` layers, of the bitmap layers that there are too, with
    ``group_size`` inputs a scale (None: one scale a row) and tokens quantised to ``activation_bits``.
    ``pattern="n:m"`` (n kept of m) is checked in every layer, and packed with compact indices where these take
    no more bytes than a mask and have a vector kernel (2:4, 1:4, 2:8, 1:8, 2:16), else under a mask.
    Either is packed from 0.3 zeros on, or ``min_sparsity``.
    With ``fuse``, layers that share an input are computed in fewer calls, see :func:`pysparse.nn.fuse_`.
    Raises ValueError, before any layer is changed, for an unknown ``optimize``, ``tokens`` below 1, a
    ``min_sparsity`` outside [0, 1] and, naming the layer, for weights that cannot be kept so: a crowded group,
    a NaN or infinity in int8, over 65536 inputs.
    """
    _check_wishes(optimize, tokens, min_sparsity)
    packing = Packing(values, pattern, group_size, activation_bits)
    report = ConversionReport()
    kinds = (nn.Linear, DenseLinear) if packing.is_plain else (nn.Linear, DenseLinear, SparseLinear)
    for path, linear in model.named_modules():
        if type(linear) not in kinds:
            continue
        chosen = filter_fn(linear, path) if filter_fn else (
            matches(linear, path, targets) and not matches(linear, path, ignore)
        )  # fmt: skip
        verdict = _verdict(path, linear, packing, min_sparsity, optimize, tokens) if chosen else _NOT_A_TARGET
        if verdict.packs:
            report.sparse[path] = _sparsity(linear)
        elif not isinstance(linear, SparseLinear):
            report.dense[path] = verdict.reason
    for path in (*report.sparse, *report.dense):
        layer: Any = model.get_submodule(path)  # one by one: each dense weight goes when its packing has come
        if path in report.sparse:
            packed: nn.Module = packed_layer(layer, packing)
            if isinstance(packed, SparseLinear):
                packed.prefill = OPTIMIZE[optimize]
        else:
            packed = DenseLinear.from_linear(layer) if dense_kernels else layer
            kernel = packed.kernel if isinstance(packed, DenseLinear) else "dense torch"
            report.dense[path] += f"; {kernel}"
        _replace(model, path, packed.train(layer.training))
    if fuse:
        fuse_(model)
    return report


def packed_layer(linear: Any, packing: Packing) -> SparseLinear | CompactLinear:
    """Return a linear layer, dense with zeros or a bitmap, in that packing; the bias is shared."""
    rows = linear.bitmap() if isinstance(linear, SparseLinear) else BitmapTensor.from_dense(linear.weight)
    packing = packing.fitted(rows.shape, rows.nnz, rows.dtype)
    if packing.is_plain:
        return linear if isinstance(linear, SparseLinear) else SparseLinear.from_bitmap(rows, linear.bias)
    return CompactLinear(packing.pack(rows), linear.bias, packing.activation_bits, rows.dtype)


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
    """Put plain ``nn.Linear`` layers back in place of every sparse and dense kernel layer; return ``model``."""
    unfuse_(model)
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
