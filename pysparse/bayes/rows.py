"""The evidence of every weight of many rows at once: y_r = X^T w_r explained by few of the columns of X^T.

Only H = X X^T is needed: for each row A^T A = H and A^T y = H w. There is no real noise; sigma^2 is the output
error that is tolerated, and with it comes the sparsity. Theta = q^2 / s, of the leave-one-out quantities of
Tipping and Faul (2003), says how much evidence a weight has: at a fixed point of the flat hyperprior a weight is
kept exactly when Theta > 1. With all other weights free Theta is w^2 / ([H^-1]_ii sigma^2), the saliency of the
optimal brain surgeon (Hassibi and Stork 1993) against a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse import ops

_FAINT = 1e-3  # of gamma H_ii / sigma^2: below it 1 - diag(B^-1) has too few digits left in float32
_FREE = 1e4  # of gamma H_ii / sigma^2 in a refit: the prior is a 1e-4 th of the data
_REFITS = 3  # solutions, each of what the one before left: the prior's share falls to 1e-12


@dataclass(frozen=True, slots=True)
class RowHyperprior:
    """How much harder than under the flat hyperprior a weight finds it to stay.

    phi'(gamma) = kappa s_i (gamma / w_i^2)^(power - 1), s_i = 1 / (sigma^2 [H^-1]_ii): kappa 0 is flat, power 1
    half-Laplace, a power below 1 a half-generalised Gaussian. The test is Theta > 1 + kappa.
    """

    kappa: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.kappa < float("inf"):
            raise ValueError(f"kappa is not negative, got {self.kappa}")
        if not 0.0 < self.power <= 1.0:
            raise ValueError(f"the power of a row hyperprior is in (0, 1], got {self.power}")

    def slope(self, gamma: Tensor, start: Tensor, bar: Tensor) -> Tensor | float:
        """Return phi' at ``gamma`` [R, n] for variances that began as ``start``; ``bar`` is s_i [R, n]."""
        if self.kappa == 0.0:
            return 0.0
        if self.power == 1.0:
            return self.kappa * bar
        ratio = (gamma / start.clamp_min(torch.finfo(gamma.dtype).tiny)).clamp_min(1e-12)
        return self.kappa * bar * self.power * ratio ** (self.power - 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class RowEvidence:
    """What the iteration found."""

    gamma: Tensor  # prior variances, [R, n]
    mean: Tensor  # posterior mean v, shrunk towards zero, [R, n]
    theta: Tensor  # evidence of each weight, zero or not, [R, n]


def solve_rows(
    gram: Tensor,
    weight: Tensor,
    noise: Tensor,
    hyperprior: RowHyperprior | None = None,
    iterations: int = 15,
    inverse_diagonal: Tensor | None = None,
) -> RowEvidence:
    """Iterate gamma <- |v| / sqrt(g + phi') from gamma = w^2, each row on its own.

    ``gram`` H [n, n] (damped: positive definite), ``weight`` [R, n], ``noise`` sigma^2 [R, 1], positive. Weights
    that are zero stay zero. ``inverse_diagonal`` is diag H^-1 [n], needed for kappa > 0. Raises ValueError for
    noise that is not positive and for inputs that are not finite.
    """
    prior = RowHyperprior() if hyperprior is None else hyperprior
    _check(gram, weight, noise)
    target, limit = weight @ gram, gram.diagonal() / noise  # limit: the largest that g can be
    bar = limit if inverse_diagonal is None else 1.0 / (noise * inverse_diagonal)
    start = weight.square()
    gamma, g = start, limit
    for _ in range(iterations):
        mean, rest = ops.ridge_rows(gram, (gamma / noise).sqrt(), target)
        sure = gamma * limit > _FAINT
        g = torch.where(sure, torch.minimum((1.0 - rest) / gamma, limit), g)
        gamma = mean.abs() / (g + prior.slope(gamma, start, bar)).clamp_min(1e-30).sqrt()
    # Theta of what is nearly zero needs digits as well: such a variance is lifted to where they are there.
    lifted = torch.maximum(gamma, torch.where(weight != 0, _FAINT / limit, torch.zeros_like(gamma)))
    mean, rest = ops.ridge_rows(gram, (lifted / noise).sqrt(), target)
    used = (lifted * rest * (1.0 - rest)).clamp_min(torch.finfo(gamma.dtype).tiny)
    theta = torch.where(lifted > 0, mean.square() / used, torch.zeros_like(mean))
    return RowEvidence(gamma, mean, theta)


def solve_columns(
    gram: Tensor, weight: Tensor, noise: float, kappa: float = 0.0, iterations: int = 30
) -> RowEvidence:
    """Share gamma over all rows (M-SBL; Wipf and Rao 2007): whole columns stay or go.

    ``gram`` H [n, n], ``weight`` [R, n], ``noise`` sigma^2 > 0. gamma_i <- sqrt(sum_r v_ri^2 / (R g_i + phi')),
    in float64, one factor an iteration for all rows. ``gamma`` and ``theta`` are [n] here; theta is the mean
    over the rows of q^2 / s. With one row this is :func:`solve_rows`.
    """
    _check(gram, weight, torch.as_tensor(noise))
    h, w = gram.double(), weight.double()
    rows, target = len(w), w @ h
    limit = h.diagonal() / noise
    gamma = w.square().mean(dim=0)
    bar = limit
    if kappa:
        bar = 1.0 / (noise * torch.linalg.inv(h).diagonal())
    for _ in range(iterations):
        mean, g, _ = _shared_step(h, target, gamma, noise)
        gamma = (mean.square().sum(dim=0) / (rows * (g + kappa * bar))).sqrt()
    lifted = torch.where(w.abs().sum(dim=0) > 0, torch.maximum(gamma, 1e-9 / limit), 0.0)
    mean, g, rest = _shared_step(h, target, lifted, noise)
    used = (lifted * rest * (1.0 - rest)).clamp_min(1e-300)
    theta = torch.where(lifted > 0, mean.square().mean(dim=0) / used, 0.0)
    return RowEvidence(gamma, mean, theta)


def _shared_step(gram: Tensor, target: Tensor, gamma: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return posterior means [R, n], g [n] and the diagonal of B^-1 [n]."""
    scale = (gamma / noise).sqrt()
    matrix = scale[:, None] * gram * scale
    matrix.diagonal().add_(1.0)
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise ValueError("the Hessian is not positive semidefinite")
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=gram.dtype), upper=False)
    rest = inverse.square().sum(dim=0)
    mean = ((target * scale) @ inverse.T @ inverse) * scale
    limit = gram.diagonal() / noise
    g = torch.where(gamma * limit > 1e-8, (1.0 - rest) / gamma.clamp_min(1e-300), limit)
    return mean, torch.minimum(g, limit).clamp_min(1e-300), rest


def refit_rows(gram: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """Return, per row, the least-squares weights on ``keep`` for the outputs of ``weight``, zero elsewhere.

    v_S = H_SS^-1 (H w)_S by ridge problems with wide priors, repeated on what they left. [R, n] as ``weight``.
    """
    target = weight @ gram
    scale = torch.where(keep, (_FREE / gram.diagonal()).sqrt(), torch.zeros_like(weight))
    solution = torch.zeros_like(weight)
    for _ in range(_REFITS):
        solution = solution + ops.ridge_rows(gram, scale, target - solution @ gram)[0]
    return solution


def polish_rows(gram: Tensor, weight: Tensor, keep: Tensor, start: Tensor, steps: int) -> Tensor:
    """Go on towards the least-squares weights on ``keep`` from ``start`` by conjugate gradients, all rows at once.

    ``gram`` [n, n] of any size, the others [R, n]. The output error falls with every step; the diagonal is the
    preconditioner.
    """
    inverse = keep / gram.diagonal()
    solution = start.clone()
    left = ((weight - solution) @ gram).mul_(keep)
    direction = left * inverse
    energy = (left * direction).sum(dim=1, keepdim=True)
    tiny = torch.finfo(weight.dtype).tiny
    for _ in range(steps):
        image = (direction @ gram).mul_(keep)
        length = energy / (direction * image).sum(dim=1, keepdim=True).clamp_min(tiny)
        solution.addcmul_(direction, length)
        left.addcmul_(image, length, value=-1.0)
        scaled = left * inverse
        fresh = (left * scaled).sum(dim=1, keepdim=True)
        direction = scaled.addcmul_(direction, fresh / energy.clamp_min(tiny))
        energy = fresh
    return solution


def _check(gram: Tensor, weight: Tensor, noise: Tensor) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or weight.dim() != 2 or weight.shape[1] != len(gram):
        raise ValueError(
            f"H is [n, n] and the weight [R, n], got {tuple(gram.shape)} and {tuple(weight.shape)}"
        )
    if not bool(torch.isfinite(gram).all() & torch.isfinite(weight).all()):
        raise ValueError("H or the weight has entries that are NaN or infinite")
    if not bool((gram.diagonal() > 0).all()):
        raise ValueError("H has a diagonal entry that is not positive: damp it")
    if not bool(((noise > 0) & torch.isfinite(noise)).all()):
        raise ValueError(f"the noise variance sigma^2 is positive, the least is {float(noise.min())}")
