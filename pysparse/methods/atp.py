"""ATP (Huang et al. 2025, "Determining Layer-Wise Sparsity for Large Language Models Through a
Theoretical Perspective").

Sparsity rises with depth in an arithmetic progression, because errors of early blocks grow on their way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pysparse.pruning import Evidence
from pysparse.pruning.projection import weighted_mean

INCREMENT = 0.002  # of beta from trial to trial in the paper, for stacks of 32 blocks and more
_TRIALS = 10  # about what the paper's increment comes to; short stacks take a larger increment
_RISES = 2  # in a row end the search: the figure of merit falls, then rises
_DUST = 1e-12  # of rounding, in the rate of a first block that goes down to 0
_MARGIN = 1e-9  # below the bound: at the bound itself the last block has no weight left


@dataclass(frozen=True, slots=True)
class ATP:
    """Block i of L gets s_i = S - beta * (L - 1) / 2 + beta * (i - 1): the progression with mean S.

    ``beta``, the common difference, is in [0, min(2 S, 2 (1 - S)) / (L - 1)); 0 is the uniform allocation.
    Without one, :func:`pysparse.prune` searches it: it prunes with each beta of a grid, and takes the one with
    the least perplexity on text that is neither calibrated on nor meant for a test.

    Differs from the paper: blocks of unequal size keep the progression, around the mean weighted by
    parameters; the search scores held-out calibration text (the released code scores the test text), also
    tries beta = 0, stops after two rises in a row, and takes a larger increment than 0.002 for stacks so short
    that the valid range would hold more than ten steps of it.
    """

    beta: float | None = None

    def __post_init__(self) -> None:
        if self.beta is not None and not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta, the step from block to block, must be 0 or more, got {self.beta!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing: the rates depend on the depth alone."""
        return ()

    @property
    def searched(self) -> bool:
        """Tell whether beta is still to be searched."""
        return self.beta is None

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return the sparsity of each layer; ValueError without a beta, or with one outside its range."""
        blocks, sizes = _sizes(layers)
        rates = dict(zip(blocks, self.rates(blocks, sizes, target), strict=True))
        return [rates[evidence.layer.block] for evidence in layers]

    def rates(self, blocks: Sequence[int], sizes: Sequence[int], target: float) -> list[float]:
        """Return the sparsity of the ``blocks`` (their places in the stack), of ``sizes`` weights each."""
        if self.beta is None:
            raise ValueError(
                "ATP has no beta yet: pass ATP(beta=...) or 'atp:beta=...', or let pysparse.prune search one"
            )
        middle = weighted_mean(blocks, sizes)
        rates = [target + self.beta * (block - middle) for block in blocks]
        if min(rates) < -_DUST or not max(rates) < 1.0:
            raise ValueError(
                f"beta={self.beta:g} drives a block out of [0, 1): {len(blocks)} blocks at sparsity {target:g} "
                f"take a beta below {beta_bound(blocks, sizes, target):.6g}"
            )
        return [max(0.0, rate) for rate in rates]


def beta_bound(blocks: Sequence[int], sizes: Sequence[int], target: float) -> float:
    """Return the least beta that takes the first block to 0 or the last one to 1; infinity for one block.

    For L blocks of one size it is min(2 S, 2 (1 - S)) / (L - 1).
    """
    middle = weighted_mean(blocks, sizes)
    if max(blocks) == min(blocks):
        return math.inf
    return min(target / (middle - min(blocks)), (1.0 - target) / (max(blocks) - middle))


def beta_grid(layers: Sequence[Evidence], target: float) -> list[float]:
    """Return 0 and the multiples of the increment that keep every block within [0, 1)."""
    bound = beta_bound(*_sizes(layers), target)
    if not math.isfinite(bound) or bound <= 0:
        return [0.0]
    increment = max(INCREMENT, bound / _TRIALS)
    count = math.floor((bound - _MARGIN) / increment)
    return [step * increment for step in range(count + 1)]  # multiples: a running sum would drift


@dataclass(frozen=True, slots=True)
class BetaSearch:
    """Which common differences were tried."""

    beta: float  # the best
    tried: tuple[tuple[float, float], ...]  # (beta, figure of merit: less is better) in order


def search_beta(betas: Sequence[float], merit: Callable[[float], float]) -> BetaSearch:
    """Find the beta with the least ``merit``, trying ``betas`` in order until it has risen twice in a row.

    Each trial costs one pruning and one evaluation. Of equal merits the smaller beta is taken. Raises
    ValueError when no trial gave a finite figure.
    """
    tried: list[tuple[float, float]] = []
    rises = 0
    for beta in betas:
        figure = merit(beta)
        rises = rises + 1 if tried and figure > tried[-1][1] else 0
        tried.append((beta, figure))
        if rises == _RISES:
            break
    finite = [(figure, beta) for beta, figure in tried if math.isfinite(figure)]
    if not finite:
        raise ValueError("no beta gave a finite figure: is the dense model sound on the search text?")
    return BetaSearch(min(finite)[1], tuple(tried))


def _sizes(layers: Sequence[Evidence]) -> tuple[list[int], list[int]]:
    sizes: dict[int, int] = {}
    for evidence in layers:
        sizes[evidence.layer.block] = sizes.get(evidence.layer.block, 0) + evidence.layer.size
    return list(sizes), list(sizes.values())
