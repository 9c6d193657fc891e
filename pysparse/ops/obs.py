"""The optimal brain surgeon's sweep over the columns of a weight, by compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats import Int8Grid
from pysparse.ops import pruning_cuda
from pysparse.ops.sweep_pattern import SweepPattern


def can_sweep(weight: Tensor) -> bool:
    """Tell whether a compiled sweep takes ``weight``: on the CPU, or on a GPU with validated kernels."""
    if weight.is_cuda:
        return not backend.cuda_gate("pruning")
    return backend.available() and weight.device.type == "cpu"


def can_factor(matrix: Tensor) -> bool:
    """Tell whether the compiled products take ``matrix``: float32 on the CPU, rows contiguous."""
    on_cpu = backend.available() and matrix.device.type == "cpu"
    return on_cpu and matrix.dtype == torch.float32 and matrix.stride(1) == 1


def cholesky_leaf() -> int:
    """Return the largest size that :func:`inverse_cholesky_leaf` takes."""
    return int(backend.core().CHOLESKY_LEAF)


def add_product(target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """Add ``alpha * left @ right`` to ``target``, with the same bits for any number of threads.

    Float32 matrices on the CPU, views included; ``left`` and ``target`` have contiguous rows, ``right`` any
    strides, and ``target`` overlaps neither. Raises ValueError for other shapes or types.
    """
    (rows, depth), cols = left.shape, right.shape[1]
    matrices = (target, left, right)
    if right.shape[0] != depth or tuple(target.shape) != (rows, cols):
        raise ValueError(f"{tuple(left.shape)} @ {tuple(right.shape)} does not give {tuple(target.shape)}")
    if any(one.dtype != torch.float32 or one.device.type != "cpu" for one in matrices) or (
        left.stride(1) != 1 or target.stride(1) != 1
    ):
        raise ValueError("products are of float32 matrices on the CPU, the left one with contiguous rows")
    backend.core().add_product(
        target.data_ptr(), target.stride(0), left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0),
        right.stride(1), rows, depth, cols, alpha,
    )  # fmt: skip


def inverse_cholesky_leaf(matrix: Tensor) -> bool:
    """Replace a small symmetric L L^T by L^-1 in place; False when it is not positive definite."""
    if not can_factor(matrix) or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a leaf is a square float32 matrix on the CPU, got {tuple(matrix.shape)}")
    return bool(backend.core().inverse_cholesky_leaf(matrix.data_ptr(), len(matrix), matrix.stride(0)))


def obs_sweep(
    weight: Tensor, upper: Tensor, scale: Tensor, pattern: SweepPattern, grid: Int8Grid | None = None
) -> tuple[Tensor, Tensor]:
    """Prune ``weight`` [R, C] from left to right; each error is made good by the columns right of it.

    ``upper`` is U [C, C] with H^-1 = U^T U, ``scale`` [C] makes the score |w| * scale, both float32. Masks are
    chosen by the weights as updated so far; of equal scores the lower column goes first, in a joint block the
    upper row. On a ``grid`` (CPU only) kept weights are rounded to it, and that error is made good too. Returns the new
    weights, float32, and the mask; the same bits for any number of threads.
    Raises ValueError for other shapes, a diagonal that is not positive or a score that is NaN.
    """
    rows, cols = weight.shape
    for name, tensor, shape in (("upper", upper, (cols, cols)), ("scale", scale, (cols,))):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or tensor.device != weight.device:
            place = "the CPU" if weight.is_cpu else str(weight.device)
            raise ValueError(
                f"{name} is float32 {shape} on {place}, got {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
    if weight.is_cuda:
        if grid is not None:
            raise ValueError(f"a grid is for weights on the CPU, this one is on {weight.device}")
        return pruning_cuda.sweep(weight, upper, scale, pattern)
    work = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    upper, scale = upper.contiguous(), scale.contiguous()
    keep = torch.empty(work.shape, dtype=torch.bool)
    counts = torch.tensor(pattern.counts, dtype=torch.int64)
    steps = None if grid is None else grid.scales.contiguous()
    if steps is not None and (len(steps) != rows or steps.dtype != torch.float32):
        raise ValueError(f"the grid has scales {steps.dtype} of {len(steps)} rows, the weight has {rows}")
    rounding: dict[str, Any] = {}
    if grid is not None and steps is not None:
        rounding = {"steps": (steps.data_ptr(), steps.numel()), "group_cols": grid.group_size}
    backend.core().obs_sweep(
        work.data_ptr(), upper.data_ptr(), scale.data_ptr(), keep.data_ptr(), rows, cols, pattern.block,
        pattern.joint, (counts.data_ptr(), len(counts)), pattern.n, pattern.m,
        **rounding,
    )  # fmt: skip
    return work, keep
