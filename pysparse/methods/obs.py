"""The optimal brain surgeon along the columns of a weight: the factor it needs and the sweep, in torch.

``U`` is the upper Cholesky factor of the inverse of the damped Hessian, ``H^-1 = U^T U``. Its row j holds what
pruning column j does to the columns right of it when those on the left are frozen (SparseGPT, section 3.3).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse import ops
from pysparse.formats import Int8Grid
from pysparse.pruning import MaskStructure

_LARGEST_DAMPING = 1.0
_SMALLEST_RETRY = 0.01
_CHUNK = 1 << 18  # elements turned at a time: 1 MB, in the cache
_LEAF = 512  # below this size the library's factorisation is as fast

Score = Callable[[Tensor, slice], Tensor]  # of the present weights [R, c] of some columns


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """What a sweep needs to know of a layer's inputs."""

    upper: Tensor  # U, float32 [in_features, in_features]
    scale: Tensor  # 1 / U_jj, float32 [in_features]; zero where an input was zero throughout
    warnings: tuple[str, ...] = ()


class NotPositiveDefiniteError(ValueError):
    """No damping made the Hessian positive definite."""


_last: tuple[weakref.ref[Tensor], tuple[int, float], Factor] | None = None


def inverse_factor(gram: Tensor, damping: float) -> Factor:
    """Return the factor for the Hessian ``gram`` [C, C], damped by ``damping`` times its mean diagonal.

    Where that is not positive definite, damping grows tenfold up to 1.0, then float64 on the CPU is tried;
    the factor's warnings say so. Inputs that were zero throughout are coupled with nothing.
    The last factor is kept for as long as its ``gram`` lives: layers that share inputs share it.
    Raises NotPositiveDefiniteError with all that was tried.
    """
    global _last
    state = gram._version, damping
    if _last is not None and _last[0]() is gram and _last[1] == state:
        return _last[2]
    _last = None  # frees the other layer's factor before this one is made
    factor = _factor(gram, damping)
    _last = weakref.ref(gram, _forget), state, factor
    return factor


def _forget(dead: weakref.ref[Tensor]) -> None:
    global _last
    if _last is not None and _last[0] is dead:
        _last = None


def _factor(gram: Tensor, damping: float) -> Factor:
    tried: list[str] = []
    for number, dtype in _attempts(damping):
        upper = _factor_once(gram, number, dtype)
        if upper is not None:
            used = f"{number:g}" + (" in float64" if dtype is torch.float64 else "")
            warnings = (f"{_reason(tried)}; damping {used} was used",) if tried else ()
            scale = torch.where(gram.diagonal() > 0, 1.0 / upper.diagonal(), 0.0)
            return Factor(upper, scale, warnings)
        tried.append(f"{number:g}" + (" in float64" if dtype is torch.float64 else ""))
    raise NotPositiveDefiniteError(_reason(tried))


def _reason(tried: list[str]) -> str:
    return f"the Hessian is not positive definite with damping {', '.join(tried)}"


def _attempts(damping: float) -> Iterator[tuple[float, torch.dtype]]:
    number = damping
    while True:
        yield number, torch.float32
        number = max(10 * number, _SMALLEST_RETRY)
        if number > _LARGEST_DAMPING:
            break
    yield damping, torch.float64


def _factor_once(gram: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """Return U, or None when the matrix is not positive definite in ``dtype``.

    With J the reversal of the order and J H J = L L^T, U is J L^-1 J: one factorisation and no inverse of H.
    """
    device = gram.device if dtype is torch.float32 else torch.device("cpu")
    flipped = gram.to(device, dtype).flip(0, 1)  # a copy
    diagonal = flipped.diagonal()
    mean = diagonal.mean()
    diagonal.masked_fill_(diagonal <= 0, 1.0).add_(damping * mean)
    if not inverse_cholesky(flipped):
        return None
    upper = _reversed_in_place(flipped).to(gram.device, torch.float32)
    usable = bool((upper.diagonal() > 0).all()) and bool(torch.isfinite(torch.stack(upper.aminmax())).all())
    return upper if usable else None


def _reversed_in_place(matrix: Tensor) -> Tensor:
    """Turn a contiguous ``matrix`` by half a turn, J M J, with little memory beside it; return it."""
    flat = matrix.view(-1)
    for start in range(0, flat.numel() // 2, _CHUNK):
        width = min(_CHUNK, flat.numel() // 2 - start)
        left = flat[start : start + width]
        right = flat[flat.numel() - start - width : flat.numel() - start]
        held = left.flip(0)
        left.copy_(right.flip(0))
        right.copy_(held)
    return matrix


def inverse_cholesky(matrix: Tensor) -> bool:
    """Replace the symmetric ``matrix`` = L L^T [n, n] by ``L^-1``; False when it is not positive definite.

    Only the lower triangle is read; on False what is left is undefined. By halves, so that nearly all the work
    is in large products, and in place: 0.8 n^3 operations, no inverse that is thrown away, and beside the matrix
    no more than strips of it. In float32 on the CPU the products are compiled ones, and the bits do not depend
    on the threads.
    """
    size, half = len(matrix), len(matrix) // 2
    compiled = ops.can_factor(matrix)
    if size <= (ops.cholesky_leaf() if compiled else _LEAF):
        return _leaf(matrix, compiled)
    first, below, rest = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    matrix[:half, half:] = 0
    if not inverse_cholesky(first):
        return False
    for part in reversed(
        _parts(half)
    ):  # L's part below its first half; what is zero of a triangle is left out
        below[:, part] = _product(below[:, : part.stop], first[part, : part.stop].T)
    for part in _parts(size - half):
        _add(rest[part.start :, part], below[part.start :], below[part].T, -1.0)
    if not inverse_cholesky(rest):
        return False
    for part in reversed(_parts(size - half)):
        below[part] = _product(rest[part, : part.stop], below[: part.stop])
    for part in _parts(half):
        below[:, part] = _product(below[:, part.start :], first[part.start :, part], -1.0)
    return True


def _leaf(matrix: Tensor, compiled: bool) -> bool:
    if compiled:
        return ops.inverse_cholesky_leaf(matrix)
    lower, info = torch.linalg.cholesky_ex(matrix)
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    matrix.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    return not int(info)


def _product(left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """Return ``alpha * left @ right``, all of it before any of its factors is written over."""
    result = left.new_zeros(len(left), right.shape[1])
    _add(result, left, right, alpha)
    return result


def _add(target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    if ops.can_factor(left):
        ops.add_product(target, left, right, alpha)
    else:
        target.addmm_(left, right, alpha=alpha)


def _parts(size: int) -> list[slice]:
    width = max(_LEAF // 2, size // 8)
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def sweep(
    weight: Tensor, upper: Tensor, score: Score, structure: MaskStructure, sparsity: float, block_size: int,
    grid: Int8Grid | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Prune ``weight`` [R, C] from left to right; each error is made good by the columns right of it.

    ``upper`` is U [C, C]. A mask is chosen for ``structure.step(block_size)`` columns at a time, by the
    ``score`` of the weights as they are by then. On a ``grid`` each kept weight is rounded at its turn, and that
    error is made good too. Returns the new weights, float32, and the mask.
    """
    step = structure.step(block_size)
    width = block_size // step * step
    work = weight.to(torch.float32, copy=True)
    keep = torch.ones(work.shape, dtype=torch.bool, device=work.device)
    for start in range(0, work.shape[1], width):
        end = min(start + width, work.shape[1])
        errors = torch.zeros(len(work), end - start, device=work.device)
        for column in range(start, end):
            if (column - start) % step == 0:
                part = slice(column, min(column + step, end))
                keep[:, part] = structure.keep_columns(score(work[:, part], part), sparsity, column)
            before, rest = work[:, column].clone(), slice(column + 1, end)
            if grid is not None:
                work[:, column] = grid.nearest(before, column)
            work[:, column].masked_fill_(~keep[:, column], 0)
            error = (before - work[:, column]) / upper[column, column]
            work[:, rest].addr_(error, upper[column, rest], alpha=-1)
            errors[:, column - start] = error
        work[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)  # what lies further right, at once
    return work, keep


def check_finite(weight: Tensor) -> None:
    """Raise ValueError, with the count, for a weight that holds NaN or infinity."""
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise ValueError(f"{bad} of {weight.numel()} weights are NaN or infinite: is the weight damaged?")
