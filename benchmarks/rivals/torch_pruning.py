"""Pruning in plain torch: the published algorithms as they are usually written, and the best forms found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
DAMPING = 0.01
Pattern = tuple[int, int] | None  # n zeroed of m; None: half of each block of columns


def stable_sort_mask(weight: Tensor, norms: Tensor, count: int) -> Tensor:
    """Wanda as published: sort every row, mark the first indices."""
    order = (weight.abs().float() * norms).sort(dim=1, stable=True).indices[:, :count]
    return torch.ones(weight.shape, dtype=torch.bool).scatter_(1, order, False)


def topk_mask(weight: Tensor, norms: Tensor, count: int) -> Tensor:
    """A selection instead of a sort; which of equal scores go is not defined."""
    order = (weight.abs().float() * norms).topk(count, dim=1, largest=False, sorted=False).indices
    return torch.ones(weight.shape, dtype=torch.bool).scatter_(1, order, False)


def kthvalue_mask(weight: Tensor, norms: Tensor, count: int) -> Tensor:
    """A threshold for each row; among equal scores it takes too many."""
    scores = weight.abs().float() * norms
    return scores > scores.kthvalue(count, dim=1, keepdim=True).values


def column_loop_nm(weight: Tensor, norms: Tensor, n: int, m: int) -> Tensor:
    """n zeroed of m as published: a loop over the groups of columns."""
    scores = weight.abs().float() * norms
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for start in range(0, weight.shape[1], m):
        chosen = scores[:, start : start + m].topk(n, dim=1, largest=False).indices
        mask.scatter_(1, start + chosen, True)
    return ~mask


def grouped_topk_nm(weight: Tensor, norms: Tensor, n: int, m: int) -> Tensor:
    groups = (weight.abs().float() * norms).unflatten(1, (-1, m))
    chosen = groups.topk(n, dim=2, largest=False, sorted=False).indices
    return torch.ones(groups.shape, dtype=torch.bool).scatter_(2, chosen, False).flatten(1)


def compared_nm(weight: Tensor, norms: Tensor, n: int, m: int) -> Tensor:
    """Every weight counts who goes before it, place by place: the fastest form in torch, and stable."""
    scores = weight.abs().float() * norms
    groups = scores.reshape(len(scores), -1, m).permute(2, 0, 1).contiguous()
    rank = torch.zeros(groups.shape, dtype=torch.int8)
    for place in range(m):
        rank[: place + 1] += groups[place] < groups[: place + 1]
        rank[place + 1 :] += groups[place] <= groups[place + 1 :]
    return (rank >= n).permute(1, 2, 0).reshape(scores.shape)


def damped(gram: Tensor) -> Tensor:
    """A copy of H with 1 % of its mean diagonal added, and ones for inputs that are always zero."""
    matrix = gram.clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return matrix


def plain_factor(gram: Tensor) -> Tensor:
    """U as published: Cholesky, inverse, Cholesky of the inverse."""
    lower = torch.linalg.cholesky(damped(gram))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).contiguous()


def tuned_factor(gram: Tensor) -> Tensor:
    """U from the factor of the reversed matrix: no inverse of H, by library calls."""
    lower = torch.linalg.cholesky(damped(gram).flip(0, 1))
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False)
    return inverse.flip(0, 1).contiguous()


def plain_sweep(weight: Tensor, upper: Tensor, pattern: Pattern, sparsity: float = 0.5) -> Tensor:
    """SparseGPT as published: a loop over columns, a sort of each block's scores, one product a block."""
    work = weight.clone()
    for start in range(0, work.shape[1], BLOCK):
        end = min(start + BLOCK, work.shape[1])
        block, diagonal = work[:, start:end].clone(), upper.diagonal()[start:end]
        inner, errors = upper[start:end, start:end], torch.zeros(len(work), end - start)
        if pattern is None:
            scores = block**2 / diagonal**2
            mask = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
        else:
            mask = torch.zeros(block.shape, dtype=torch.bool)
        for i in range(end - start):
            if pattern is not None and i % pattern[1] == 0:
                scores = block[:, i : i + pattern[1]] ** 2 / diagonal[i : i + pattern[1]] ** 2
                mask.scatter_(1, i + scores.topk(pattern[0], dim=1, largest=False).indices, True)
            kept = block[:, i].clone()
            kept[mask[:, i]] = 0
            errors[:, i] = (block[:, i] - kept) / inner[i, i]
            block[:, i:] -= errors[:, i : i + 1] @ inner[i : i + 1, i:]
            block[:, i] = kept
        work[:, start:end] = block
        work[:, end:] -= errors @ upper[start:end, end:]
    return work


def tuned_sweep(weight: Tensor, upper: Tensor, pattern: Pattern, sparsity: float = 0.5) -> Tensor:
    """The same with a selection instead of a sort, columns contiguous, and every update in place."""
    work = weight.clone()
    for start in range(0, work.shape[1], BLOCK):
        end = min(start + BLOCK, work.shape[1])
        block = work[:, start:end].T.contiguous()  # [columns, rows]
        inner = upper[start:end, start:end]
        scale = (1 / inner.diagonal())[:, None]
        if pattern is None:
            scores = (block * scale).abs_()
            mask = scores <= scores.flatten().kthvalue(int(scores.numel() * sparsity)).values
        else:
            mask = torch.empty(block.shape, dtype=torch.bool)
        errors = torch.empty(block.shape)
        for i in range(end - start):
            if pattern is not None and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                mask[group] = _smallest((block[group] * scale[group]).abs_(), pattern[0])
            torch.mul(block[i] * scale[i], mask[i], out=errors[i])
            block[i].masked_fill_(mask[i], 0)
            block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
        work[:, start:end] = block.T
        work[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
    return work


def _smallest(scores: Tensor, n: int) -> Tensor:
    """Mark the n smallest of each column of [m, rows], by comparing the rows with each other."""
    rank = torch.zeros(scores.shape, dtype=torch.int8)
    for place in range(len(scores)):
        rank[: place + 1] += scores[place] < scores[: place + 1]
        rank[place + 1 :] += scores[place] <= scores[place + 1 :]
    return rank < n


ROW_MASKS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "torch stable sort": stable_sort_mask, "torch topk": topk_mask, "torch kthvalue": kthvalue_mask,
}  # fmt: skip
NM_MASKS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "torch column loop": column_loop_nm, "torch grouped topk": grouped_topk_nm, "torch comparisons": compared_nm,
}  # fmt: skip
