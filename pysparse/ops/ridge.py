"""Many small ridge problems over one Hessian: a compiled kernel on the CPU, batched torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend


def can_ridge(gram: Tensor) -> bool:
    """Tell whether the compiled kernel takes problems over ``gram`` [n, n]: float32 on the CPU, n <= 512."""
    return (
        backend.available()
        and gram.device.type == "cpu"
        and gram.dtype == torch.float32
        and 1 <= len(gram) <= int(backend.core().RIDGE_MAX)
    )


def ridge_rows(gram: Tensor, scale: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``B = I + D H D`` for every row: return v = D B^-1 D b and the diagonal of B^-1, both [R, n].

    ``gram`` is H [n, n], positive semidefinite; ``scale`` [R, n] holds the diagonals D of the rows, ``target``
    [R, n] their b; all of one dtype and device. With D^2 = gamma / sigma^2, v is the posterior mean under prior
    variances gamma. Float32 on the CPU runs the compiled kernel (:func:`can_ridge`), everything else
    :func:`ridge_rows_torch`. Raises ValueError for other shapes, and where B is not positive definite.
    """
    _check(gram, scale, target)
    solve = _compiled if can_ridge(gram) else ridge_rows_torch
    solution, inverse_diagonal = solve(gram, scale, target)
    if not bool(torch.isfinite(solution).all() & torch.isfinite(inverse_diagonal).all()):
        raise ValueError("a ridge problem is not positive definite or not finite: is the Hessian damaged?")
    return solution, inverse_diagonal


def ridge_rows_torch(gram: Tensor, scale: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Do as :func:`ridge_rows` does by batched Cholesky factors: [R, n, n] numbers at a time."""
    size = len(gram)
    matrix = scale[:, :, None] * gram * scale[:, None, :]
    matrix.diagonal(dim1=1, dim2=2).add_(1.0)
    lower, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise ValueError("a ridge problem is not positive definite or not finite: is the Hessian damaged?")
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    scaled = (scale * target)[:, :, None]
    solution = scale * (inverse.mT @ (inverse @ scaled))[:, :, 0]
    return solution, inverse.square().sum(dim=1)


def _compiled(gram: Tensor, scale: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    gram, scale, target = gram.contiguous(), scale.contiguous(), target.contiguous()
    solution, inverse_diagonal = torch.empty_like(scale), torch.empty_like(scale)
    rows, size = scale.shape
    backend.core().ridge_rows(
        gram.data_ptr(), scale.data_ptr(), target.data_ptr(), solution.data_ptr(), inverse_diagonal.data_ptr(),
        rows, size,
    )  # fmt: skip
    return solution, inverse_diagonal


def _check(gram: Tensor, scale: Tensor, target: Tensor) -> None:
    size = gram.shape[0] if gram.dim() else 0
    if gram.dim() != 2 or gram.shape[1] != size or size == 0:
        raise ValueError(f"a Hessian is a square matrix with at least one row, got {tuple(gram.shape)}")
    for name, tensor in (("scale", scale), ("target", target)):
        if tensor.dim() != 2 or tensor.shape[1] != size or tensor.shape != scale.shape:
            raise ValueError(f"{name} is [rows, {size}] for both, got {tuple(tensor.shape)}")
        if tensor.dtype != gram.dtype or tensor.device != gram.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, the Hessian {gram.dtype} on {gram.device}"
            )
