"""Pruning by hyperpriors on the weights' variances: EBF, after Li, Dong and Zeng 2025, as a criterion for weights.

The framework is theirs (arXiv 2511.06235, for inverse problems); its use for weights, row by row with the
Hessian of the layer's output error, the blocks and the budgets are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysparse.bayes.rows import RowHyperprior, polish_rows, refit_rows, solve_columns, solve_rows
from pysparse.methods.obs import check_finite, inverse_factor
from pysparse.pruning import Importance, MaskStructure, Pruned, Stats
from pysparse.pruning.structure import count_of

_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Emergent:
    """The evidence decides: a weight survives when its score exceeds 1. Sparsity is a result, row by row.

    The target sparsity is not used, except that 0 leaves a layer dense and that a plan shows it.
    """

    @property
    def fixed_sparsity(self) -> float | None:
        """None: the sparsity is found."""
        return None

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return ``scores`` > 1, bool of the same shape [R, C]; ValueError when a score is NaN."""
        count = int(scores.isnan().sum())
        if count:
            raise ValueError(f"{count} of {scores.numel()} scores are NaN: is the weight damaged?")
        return scores > 1.0

    def pruned_count(self, rows: int, cols: int, sparsity: float) -> int:
        """Return the count that the target would give: the true one is known only after a run."""
        return count_of(rows * cols, sparsity)

    def dense_columns(self, cols: int) -> int:
        """Return 0: every column can be pruned."""
        return 0

    def step(self, block_size: int) -> int:
        """Return ``block_size``."""
        return block_size

    def keep_columns(self, scores: Tensor, sparsity: float, start: int) -> Tensor:
        """Do as :meth:`keep` does."""
        return self.keep(scores, sparsity)

    def __str__(self) -> str:
        return "by evidence"


@dataclass(frozen=True, slots=True)
class Columns:
    """Whole input columns go, for all rows: those with the least mean score. A neuron before them goes with each."""

    @property
    def fixed_sparsity(self) -> float | None:
        """None: any number of columns."""
        return None

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """Prune floor(sparsity * C) columns of ``scores`` [R, C]; of equal ones the lower index goes first."""
        totals = scores.double().mean(dim=0)
        if bool(totals.isnan().any()):
            raise ValueError("a score is NaN: is the weight damaged?")
        order = torch.argsort(totals, stable=True)
        keep = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
        keep[:, order[: count_of(len(totals), sparsity)]] = False
        return keep

    def pruned_count(self, rows: int, cols: int, sparsity: float) -> int:
        """Return how many weights of a [rows, cols] matrix are pruned."""
        return rows * count_of(cols, sparsity)

    def dense_columns(self, cols: int) -> int:
        """Return 0: every column can be pruned."""
        return 0

    def step(self, block_size: int) -> int:
        """Raise ValueError: columns compete over the whole matrix, not within a block."""
        raise ValueError("whole columns are known for whole rows alone, not for blocks of columns")

    def keep_columns(self, scores: Tensor, sparsity: float, start: int) -> Tensor:
        """Raise ValueError, as :meth:`step` does."""
        raise ValueError("whole columns are known for whole rows alone, not for blocks of columns")

    def __str__(self) -> str:
        return "whole columns"


@dataclass(frozen=True, slots=True)
class Evidence:
    """One-shot evidence w_ij^2 / ([H^-1]_jj sigma_i^2 (1 + kappa)): above 1 a weight has earned its place.

    That is the optimal brain surgeon's saliency against a threshold. sigma_i^2 = ``tau`` times the mean that a
    weight contributes to the output energy of its row, w^T H w / in_features, so that the amount of calibration
    data cancels.
    """

    tau: float = 0.1
    kappa: float = 0.0
    damping: float = 0.01  # of the mean diagonal of the Hessian

    def __post_init__(self) -> None:
        _check_settings(self.tau, self.damping)
        RowHyperprior(self.kappa)

    @property
    def needs(self) -> tuple[str, ...]:
        """The second moments of the inputs."""
        return ("gram",)

    def __call__(self, weight: Tensor, stats: Stats) -> Tensor:
        """Return the evidence, float32 [out_features, in_features], for ``stats["gram"]`` [in, in]."""
        upper = inverse_factor(stats["gram"], self.damping).upper
        work = weight.float()
        noise = row_noise(work, stats["gram"], self.tau)
        return work.square() / (upper.square().sum(dim=0) * noise * (1.0 + self.kappa))


def row_noise(weight: Tensor, gram: Tensor, tau: float) -> Tensor:
    """Return sigma^2 [R, 1]: ``tau`` times the mean share of a weight in its row's output energy."""
    energy = ((weight @ gram) * weight).sum(dim=1, keepdim=True)
    return (tau * energy / weight.shape[1]).clamp_min(_TINY)


@dataclass(frozen=True, slots=True)
class EbfUpdate:
    """Blocks of columns, left to right: find each weight's evidence, choose, refit, and correct what lies right.

    A block's Hessian is the one that is left when the columns right of it may make its errors good: the inverse
    of (U^T U) of its columns, U the factor that SparseGPT uses. With Emergent sigma^2 follows from ``tau`` and
    the evidence decides. With a budget (unstructured, n:m) sigma^2 is set to where the one-shot test would keep
    the wished number, the iteration moves on from there, and the weights of highest evidence stay. With Columns
    the variances are shared over the rows. The importance of the recipe is not asked.

    Survivors are refit in their block, then by ``polish`` steps of conjugate gradients over the whole row.
    """

    tau: float = 0.1  # tolerated error of a row in mean shares of a weight; Emergent and Columns
    kappa: float = 0.0  # 0 is the flat hyperprior
    power: float = 1.0  # of the hyperprior: 1 is half-Laplace, below 1 half-generalised Gaussian
    damping: float = 0.01
    block_size: int = 64
    iterations: int = 15
    polish: int = 15
    refit: bool = True

    def __post_init__(self) -> None:
        _check_settings(self.tau, self.damping)
        RowHyperprior(self.kappa, self.power)
        for name, least, most in (("block_size", 1, 512), ("iterations", 0, 1000), ("polish", 0, 1000)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} is a whole number from {least} to {most}, got {value!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The second moments of the inputs."""
        return ("gram",)

    def solve(
        self, weight: Tensor, stats: Stats, importance: Importance, structure: MaskStructure, sparsity: float
    ) -> Pruned:
        """Prune ``weight`` [out_features, in_features] for ``stats["gram"]`` [in_features, in_features].

        Computed in float32, returned in the weight's dtype. Raises ValueError when the weight is not finite or no
        damping makes the Hessian positive definite.
        """
        check_finite(weight)
        factor = inverse_factor(stats["gram"], self.damping)
        gram = damped(stats["gram"], self.damping)
        work = weight.to(torch.float32, copy=True)
        if isinstance(structure, Columns):
            solution, keep = self._columns(work, gram, structure, sparsity)
        else:
            solution, keep = self._blocks(work, gram, factor.upper, structure, sparsity)
        if self.refit and self.polish:
            solution = polish_rows(gram, weight.float(), keep, solution, self.polish)
        return Pruned(solution.to(weight.dtype), keep, factor.warnings)

    def _columns(
        self, weight: Tensor, gram: Tensor, structure: Columns, sparsity: float
    ) -> tuple[Tensor, Tensor]:
        noise = float(row_noise(weight, gram, self.tau).mean())
        found = solve_columns(gram, weight, noise, self.kappa, self.iterations)
        keep = structure.keep(found.theta.float().expand_as(weight), sparsity)
        live = keep[0].nonzero()[:, 0]
        solution = torch.zeros_like(weight)
        if self.refit and len(live):
            part = gram[live][:, live].double()
            solution[:, live] = torch.linalg.solve(part, (weight @ gram)[:, live].double().T).T.float()
        else:
            solution = found.mean.float() * keep
        return solution, keep

    def _blocks(
        self, work: Tensor, gram: Tensor, upper: Tensor, structure: MaskStructure, sparsity: float
    ) -> tuple[Tensor, Tensor]:
        rows, cols = work.shape
        keep = torch.ones(rows, cols, dtype=torch.bool, device=work.device)
        noise = row_noise(work, gram, self.tau) if isinstance(structure, Emergent) else None
        step = structure.step(self.block_size)
        width = self.block_size // step * step
        for start in range(0, cols, width):
            part = slice(start, min(start + width, cols))
            inverse = upper[part, part].double().inverse()
            local = (inverse @ inverse.T).float()  # the Hessian that the columns right of it leave
            kept = work[:, part].clone()
            chosen, mean = self._block(kept, local, noise, structure, sparsity, start)
            keep[:, part] = chosen
            work[:, part] = refit_rows(local, kept, chosen) if self.refit else mean * chosen
            error = (kept - work[:, part]) @ inverse.float()
            work[:, part.stop :].addmm_(error, upper[part, part.stop :], alpha=-1)
        return work, keep

    def _block(
        self, weight: Tensor, gram: Tensor, noise: Tensor | None, structure: MaskStructure, sparsity: float,
        start: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the mask and the posterior means of one block."""
        diagonal = gram.double().inverse().diagonal().float()
        if noise is None:
            noise = _budget_noise(weight.square() / diagonal, sparsity)
        prior = RowHyperprior(self.kappa, self.power)
        found = solve_rows(gram, weight, noise, prior, self.iterations, diagonal)
        return structure.keep_columns(found.theta / (1.0 + self.kappa), sparsity, start), found.mean


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return a copy of ``gram`` with ``damping`` of its mean diagonal added, as the factor has it."""
    matrix = gram.float().clone()
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    diagonal.masked_fill_(diagonal <= 0, 1.0).add_(damping * mean)
    return matrix


def _budget_noise(saliency: Tensor, sparsity: float) -> Tensor:
    """Return the sigma^2 [R, 1] at which the one-shot test prunes ``sparsity`` of these weights [R, n]."""
    count = min(max(count_of(saliency.numel(), sparsity), 1), saliency.numel())
    threshold = saliency.flatten().kthvalue(count).values
    return threshold.clamp_min(_TINY).expand(len(saliency), 1)


def _check_settings(tau: Any, damping: Any) -> None:
    for name, value, least in (("tau", tau, "above"), ("damping", damping, "from")):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (value > 0 if least == "above" else value >= 0) or value == float("inf"):
            raise ValueError(f"{name} is a finite number {least} 0, got {value!r}")
