"""Selection and sweep on CUDA tensors, by kernels with the CPU's rules and bits; used where a GPU report vouches.

Gram matrices have no kernel here: X^T X is a dense product, and torch's (cuBLAS) runs at the matrix units' rate. The
sweep's updates are a dense product too, but cuBLAS sums in an order of its own; these sum in the CPU's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend
from pysparse.ops.sweep_pattern import SweepPattern

_ENTRIES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def takes(weight: Tensor) -> bool:
    """Tell whether the kernels take ``weight``: a contiguous float matrix on a CUDA device, and the gate open."""
    return (
        weight.is_cuda
        and weight.dtype in _ENTRIES
        and weight.dim() == 2
        and weight.is_contiguous()
        and not backend.cuda_gate("pruning")
    )


def _target(tensor: Tensor) -> tuple[int | None, int]:
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _refuse(damage: Tensor, scale: Tensor | None, scores: int) -> None:
    """Raise ValueError for what the kernels counted; not in a graph's capture, where nothing may wait."""
    if torch.cuda.is_current_stream_capturing():
        return
    nan, negative = damage.tolist()
    if negative:
        assert scale is not None
        column = int((scale < 0).nonzero()[0, 0])
        raise ValueError(f"scale {float(scale[column])} of column {column} is negative")
    if nan:
        raise ValueError(f"{nan} of {scores} scores are NaN: is the weight damaged?")


def select(
    weight: Tensor, scale: Tensor | None, *, count: int = 0, n: int = 0, m: int = 0, want_pruned: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the mask and, if wanted, the pruned weight: ``count`` of each row go, or for ``m`` > 0 all but n of m.

    ``weight`` [R, C] as :func:`takes` wants it, ``scale`` float32 [C] on its device, or None. Raises ValueError for
    impossible numbers before anything runs, and for NaN scores and negative scales.
    """
    rows, cols = weight.shape
    if scale is not None and scale.device != weight.device:
        raise ValueError(f"scale is on {scale.device}, the weight on {weight.device}")
    if m and not 0 < n < m <= 64:
        raise ValueError(f"an n:m pattern keeps 0 < n < m <= 64 weights, got {n}:{m}")
    if not m and not 0 <= count <= cols:
        raise ValueError(f"cannot prune {count} of {cols} columns")
    keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    pruned = torch.empty_like(weight) if want_pruned else None
    damage = torch.zeros(2, dtype=torch.int32, device=weight.device)
    matrix = (weight.data_ptr(), 0 if scale is None else scale.data_ptr(), rows, cols)
    results = (keep.data_ptr(), 0 if pruned is None else pruned.data_ptr(), damage.data_ptr())
    entry = _ENTRIES[weight.dtype]
    if m:
        backend.cuda().select_nm(entry, matrix, n, m, results, *_target(weight))
    else:
        backend.cuda().select_rows(entry, matrix, count, False, results, *_target(weight))
    _refuse(damage, scale, weight.numel())
    return keep, pruned


def sweep(weight: Tensor, upper: Tensor, scale: Tensor, pattern: SweepPattern) -> tuple[Tensor, Tensor]:
    """Return the new weights, float32, and the mask, as :func:`pysparse.ops.obs_sweep` on the CPU, bit for bit."""
    rows, cols = weight.shape
    for name, tensor in (("upper", upper), ("scale", scale)):
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}, the weight on {weight.device}")
    _check_pattern(pattern, rows, cols)
    smallest = float(upper.diagonal().min()) if cols else 1.0
    if not smallest > 0.0:
        raise ValueError(f"the factor's diagonal has {smallest}, it must be positive")
    if bool((scale < 0).any()) or bool(scale.isnan().any()):
        raise ValueError("a scale is negative or NaN")
    work = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    upper, scale = upper.contiguous(), scale.contiguous()
    keep = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    errors = work.new_empty((rows, backend.cuda().OBS_STRIP))
    damage = torch.zeros(2, dtype=torch.int32, device=work.device)
    operands = (work, upper, scale, keep, errors, damage)
    backend.cuda().obs_sweep(
        tuple(tensor.data_ptr() for tensor in operands), (rows, cols, pattern.block), pattern.joint,
        list(pattern.counts), pattern.n, pattern.m, *_target(work),
    )  # fmt: skip
    _refuse(damage, None, weight.numel())
    return work, keep


def _check_pattern(pattern: SweepPattern, rows: int, cols: int) -> None:
    """Raise ValueError for a pattern that does not fit a [rows, cols] weight."""
    n, m, block = pattern.n, pattern.m, pattern.block
    if block < 1:
        raise ValueError(f"a block has at least one column, got {block}")
    if n:
        if not 0 < n < m <= 64 or block % m:
            raise ValueError(
                f"blocks of {block} columns and {n}:{m}: 0 < n < m <= 64, and m divides the block"
            )
        return
    if len(pattern.counts) != -(-cols // block):
        raise ValueError(f"{len(pattern.counts)} counts for {-(-cols // block)} blocks of {block} columns")
    for index, count in enumerate(pattern.counts):
        size = min(block, cols - index * block) * (rows if pattern.joint else 1)
        if not 0 <= count <= size:
            raise ValueError(f"cannot prune {count} of {size} weights in block {index}")
