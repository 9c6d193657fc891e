"""LoSA's arithmetic: how sparsity grows over rounds, where it goes, and how much rank a block gets.

Huang et al., "Dynamic Low-Rank Sparse Adaptation for Large Language Models", ICLR 2025. Blocks whose inputs
resemble those of all others are redundant and are pruned more; blocks whose output suffered more get more rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.pruning.target import check_sparsity

# Half the width of the band of block sparsities up to a target: the authors' figures. Beyond the last they
# have none, and it goes on.
BANDS = ((0.5, 0.01), (0.6, 0.02), (1.0, 0.03))


@dataclass(frozen=True, slots=True)
class LoSA:
    """How many rounds, and how much rank: the mean over blocks grows by one a round, as in the paper."""

    rounds: int = 5
    first_rank: int = 6  # mean rank of the blocks in the first round
    rank_step: int = 1  # by which the mean grows each round
    max_rank: int = 16  # of a block
    spread: float | None = None  # how far a block's sparsity may be from the target; None: the authors' bands
    rank_by_error: bool = True  # False: every block has the mean rank

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if self.rank_step < 0:
            raise ValueError(f"rank_step={self.rank_step} must not be negative: a mean rank never falls")
        if self.spread is not None and not 0.0 <= self.spread < 1.0:
            raise ValueError(
                f"spread={self.spread} must be in [0, 1): the most a block's sparsity differs by"
            )
        _check_budget(self.first_rank, self.max_rank)
        _check_budget(self.mean_rank(self.rounds), self.max_rank)

    def mean_rank(self, round_: int) -> int:
        """Return the mean rank of the blocks in round 1 to ``rounds``."""
        return self.first_rank + self.rank_step * (round_ - 1)

    def half_width(self, target: float) -> float:
        """Return how far a block's sparsity may be from ``target``; 0 gives all blocks one rate."""
        return band_half_width(target) if self.spread is None else self.spread

    def ranks(self, errors: Sequence[float], round_: int) -> list[int]:
        """Return the rank of each block, whose reconstruction errors are ``errors``, in a round."""
        mean = self.mean_rank(round_)
        return allocate_ranks(errors, mean, self.max_rank) if self.rank_by_error else [mean] * len(errors)

    def sparsities(self, final: float) -> list[float]:
        """Return the target of each round."""
        return cubic_ramp(final, self.rounds)


def cubic_ramp(final: float, rounds: int) -> list[float]:
    """Return S_t = S - S (1 - t/T)^3 for t = 1..T: most is pruned early, while adapters can still repair it."""
    check_sparsity(final)
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    return [final - final * (1 - step / rounds) ** 3 for step in range(1, rounds + 1)]


def band_half_width(target: float) -> float:
    """Return how far a block's sparsity may be from ``target``.

    Differs from the paper: it has no figure beyond 0.7; the last one goes on.
    """
    check_sparsity(target)
    return next(width for limit, width in BANDS if target <= limit)


def centered_gram(features: Tensor) -> Tensor:
    """Return K = F F^T of ``features`` [n, p], centred over rows and columns, float64 [n, n].

    The products are formed in float32, a block of columns at a time, and added in float64.
    """
    gram: Tensor = torch.zeros(len(features), len(features), dtype=torch.float64, device=features.device)
    for part in features.split(1 << 16, dim=1):
        part = part.float()
        gram.add_(part @ part.T)
    centered: Tensor = gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()
    return centered


def linear_cka(grams: Sequence[Tensor]) -> Tensor:
    """Return the similarity of each two of L representations, float64 [L, L]: ones on the diagonal.

    ``grams`` are centred [n, n]: CKA_ij = <K_i, K_j> / (|K_i| |K_j|), Kornblith et al. 2019, equation 3 (the
    biased estimator with a linear kernel). Raises ValueError for a representation that is constant over the
    rows, or not finite: its similarity to others is undefined.
    """
    rows = torch.stack([gram.double().flatten() for gram in grams])
    norms = rows.norm(dim=1, keepdim=True)
    for index, norm in enumerate(norms.flatten().tolist()):
        if not math.isfinite(norm) or norm == 0.0:
            raise ValueError(
                f"the input of block {index} is {'the same for all sequences' if norm == 0.0 else 'not finite'}: "
                "its similarity to other blocks is undefined"
            )
    rows = rows / norms
    return torch.matmul(rows, rows.T)


def redundancy(similarity: Tensor) -> list[float]:
    """Return each block's share of all similarity between different blocks; the shares add up to 1."""
    others = similarity.sum(dim=1) - similarity.diagonal()
    return [float(share) for share in others / others.sum()]


def block_rates(
    shares: Sequence[float],
    sizes: Sequence[int],
    target: float,
    half_width: float,
    lowest: Sequence[float] | None = None,
) -> list[float]:
    """Return the sparsity of each block: the exact optimum of LoSA's linear programme.

    Minimises sum_i n_i g_i x_i with the mean of x weighted by ``sizes`` n equal to ``target`` and every x_i
    within ``half_width`` of it, where g_i = exp(-b * share_i) falls with redundancy. Whatever b > 0 is, only
    the order of the shares decides: all start at their lower bound, and the most redundant are raised to the
    upper one until the budget is used up. Of equal shares the earlier block comes first.

    Differs from the paper: blocks of different sizes are weighted by them; no block falls below ``lowest``
    (what it has lost already, so that masks only grow); and the programme is solved, not approached.

    Raises ValueError when no rates within these bounds meet the target.
    """
    check_sparsity(target)
    if len(shares) != len(sizes) or not sizes:
        raise ValueError(f"{len(shares)} shares for {len(sizes)} blocks: there is one for each block")
    floor = [0.0] * len(sizes) if lowest is None else list(lowest)
    low = [max(target - half_width, before) for before in floor]
    high = [max(min(target + half_width, 1.0), bound) for bound in low]
    budget = target * sum(sizes) - sum(n * x for n, x in zip(sizes, low, strict=True))
    room = sum(n * (h - x) for n, x, h in zip(sizes, low, high, strict=True))
    slack = 1e-9 * sum(sizes)
    if budget < -slack or budget > room + slack:
        mean = (target * sum(sizes) - budget) / sum(sizes)
        raise ValueError(
            f"a mean sparsity of {target:g} cannot be met: the blocks' bounds allow {mean:.6g} to "
            f"{mean + room / sum(sizes):.6g}"
        )
    rates = low
    for block in sorted(range(len(sizes)), key=lambda one: -shares[one]):
        step = min(high[block] - rates[block], max(budget, 0.0) / sizes[block])
        rates[block] += step
        budget -= step * sizes[block]
    return rates


def allocate_ranks(errors: Sequence[float], mean_rank: int, max_rank: int = 16) -> list[int]:
    """Return a rank of 1 to ``max_rank`` for each block, in proportion to its reconstruction error.

    The shares of the budget ``mean_rank`` * L are rounded (half to even) and clipped; then one pass takes 1
    from the blocks with the least errors, or gives 1 to those with the largest, until the total is met. The
    cap may leave a part of the budget unused. Raises ValueError for a budget below one a block or above
    ``max_rank``, and for errors that are negative or not finite. Errors that are all zero share equally.
    """
    _check_budget(mean_rank, max_rank)
    for block, error in enumerate(errors):
        if not math.isfinite(error) or error < 0:
            raise ValueError(f"the reconstruction error of block {block} is {error!r}, not a number >= 0")
    total, budget = sum(errors), mean_rank * len(errors)
    shares = [error * budget / total if total else float(mean_rank) for error in errors]
    ranks = [min(max(round(share), 1), max_rank) for share in shares]
    order = sorted(range(len(errors)), key=lambda one: errors[one])
    for block in order:
        if sum(ranks) > budget and ranks[block] > 1:
            ranks[block] -= 1
    for block in reversed(order):
        if sum(ranks) < budget and ranks[block] < max_rank:
            ranks[block] += 1
    return ranks


def _check_budget(mean_rank: int, max_rank: int) -> None:
    if not 1 <= mean_rank <= max_rank:
        raise ValueError(
            f"a mean rank of {mean_rank} a block cannot be met: every block has a rank from 1 to {max_rank}"
        )
