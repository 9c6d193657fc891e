"""Which weights to prune: the smallest of each row, or of each group of m, by compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend
from pysparse.ops import pruning_cuda
from pysparse.ops.linear import _DTYPE_CODES


def can_select(weight: Tensor) -> bool:
    """Tell whether the compiled kernels take ``weight``: float32 or bfloat16, contiguous, on the CPU.

    On a GPU float16 too, and where a report vouches for the kernels.
    """
    return pruning_cuda.takes(weight) or (
        backend.available()
        and weight.device.type == "cpu"
        and weight.dtype in _DTYPE_CODES
        and weight.dim() == 2
        and weight.is_contiguous()
    )


def select_rows(weight: Tensor, scale: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a bool mask without exactly the ``count`` smallest ``|weight| * scale`` of each row, and the weight.

    ``weight`` is [R, C] as :func:`can_select` wants it, ``scale`` float32 [C] and not negative. Of equal scores
    the lower column goes first. The second result is the weight with zeros where it is not kept. Raises
    ValueError when a score is NaN.
    """
    _check(weight, scale)
    if weight.is_cuda:
        return pruning_cuda.select(weight, scale, count=count)  # type: ignore[return-value]
    keep, pruned = torch.empty(weight.shape, dtype=torch.bool), torch.empty_like(weight)
    backend.core().select_rows(*_arguments(weight, scale), count, keep.data_ptr(), pruned.data_ptr())
    return keep, pruned


def row_mask(scores: Tensor, count: int, scale: Tensor | None = None) -> Tensor:
    """Return the mask alone; without ``scale`` the ``scores`` [R, C] are what is compared, signs included."""
    _check(scores, scale)
    if scores.is_cuda:
        return pruning_cuda.select(scores, scale, count=count, want_pruned=False)[0]
    keep = torch.empty(scores.shape, dtype=torch.bool)
    backend.core().select_rows(*_arguments(scores, scale), count, keep.data_ptr(), 0)
    return keep


def select_nm(weight: Tensor, scale: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Return a bool mask of the ``n`` largest ``|weight| * scale`` of every ``m`` columns of a row, and the weight.

    As :func:`select_rows`; the columns of a short group at the end are all kept.
    """
    _check(weight, scale)
    if weight.is_cuda:
        return pruning_cuda.select(weight, scale, n=n, m=m)  # type: ignore[return-value]
    keep, pruned = torch.empty(weight.shape, dtype=torch.bool), torch.empty_like(weight)
    backend.core().select_nm(*_arguments(weight, scale), n, m, keep.data_ptr(), pruned.data_ptr())
    return keep, pruned


def nm_mask(scores: Tensor, n: int, m: int, scale: Tensor | None = None) -> Tensor:
    """Return the mask alone; without ``scale`` the ``scores`` [R, C] are what is compared, signs included."""
    _check(scores, scale)
    if scores.is_cuda:
        return pruning_cuda.select(scores, scale, n=n, m=m, want_pruned=False)[0]
    keep = torch.empty(scores.shape, dtype=torch.bool)
    backend.core().select_nm(*_arguments(scores, scale), n, m, keep.data_ptr(), 0)
    return keep


def _check(weight: Tensor, scale: Tensor | None) -> None:
    if not can_select(weight):
        raise ValueError(
            f"the kernels select from contiguous float32 or bfloat16 matrices on the CPU, got {weight.dtype} "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    if scale is not None and not (
        scale.dtype == torch.float32 and scale.shape == weight.shape[1:] and scale.is_contiguous()
    ):
        raise ValueError(
            f"scale is contiguous float32 [{weight.shape[1]}], got {scale.dtype} {tuple(scale.shape)}"
        )


def _arguments(weight: Tensor, scale: Tensor | None) -> tuple[int, int, int, int, int]:
    rows, cols = weight.shape
    return _DTYPE_CODES[weight.dtype], weight.data_ptr(), 0 if scale is None else scale.data_ptr(), rows, cols
