"""Other ways to the same values: a vectorised torch sampler, and captum's ShapleyValueSampling if it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysparse.ops import EntryDraw, EntrySamples, fm_marginals

CAPTUM_BATCH = 256  # samples that share a permutation, captum's fastest here
_PEAK = """
import resource, sys
import numpy as np
from pysparse.ops import EntrySamples
from pysparse.shapley import EntryRun, FactorisationMachine, entry_shapley
rng = np.random.default_rng(0)
ids = (rng.integers(0, 1000, (2048, 39)) + 1000 * np.arange(39)).astype(np.int32)
table = (0.05 * rng.normal(size=(39_000, 16))).astype(np.float32)
labels = rng.integers(0, 2, 2048).astype(np.float32)
source = EntrySamples(table, np.zeros((39, 16), np.float32), ids, labels)
entry_shapley(FactorisationMachine(), source, EntryRun(budget=int(sys.argv[1]) * 2048 * 2 * 624))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def torch_sampler(table: Tensor, ids: Tensor, labels: Tensor, keys: Tensor, pair: bool = False) -> Tensor:
    """One permutation a sample, or a pair, without a loop over steps; base zero; marginals [B, cols, fields].

    Players go in the order of their random ``keys``, int32 [B, cols, fields]: sorted once over all and once within
    each column, where they lie side by side (whole numbers and this layout sort faster by a third), so no inverse
    permutation is made. The reverse order uses the same sorts: before it takes an entry its column's sum is that of
    the entries that went before, and of this one.
    """
    e = table[ids].transpose(1, 2).contiguous()  # [B, cols, fields]
    orders = keys.flatten(1).argsort(dim=1, stable=True)  # equal keys: the same order in both sorts
    turn = keys.argsort(dim=2, stable=True)  # within each column
    gone = torch.gather(e, 2, turn)
    through = gone.cumsum(2)
    sums = e.sum(2, keepdim=True)
    logit = 0.5 * (sums.squeeze(2).square() - e.square().sum(2)).sum(1, keepdim=True)
    walks = [(orders, -gone * (sums - through))]
    if pair:
        walks.append((orders.flip(1), -gone * (through - gone)))
    result = torch.zeros_like(e).flatten(1)
    for order, removals in walks:
        steps = torch.empty_like(e).scatter_(2, turn, removals).flatten(1)
        along = torch.cat([logit, logit + steps.gather(1, order).cumsum(1)], dim=1)
        loss = torch.nn.functional.softplus(along) - labels[:, None] * along
        result.scatter_add_(1, order, loss.diff(dim=1))
    return (result / len(walks)).view_as(e)


def torch_keys(samples: int, fields: int, cols: int) -> Tensor:
    """Random keys of a batch, int32 [samples, cols, fields]."""
    return torch.randint(2**31 - 1, (samples, cols, fields), dtype=torch.int32)


def orders_of(keys: Tensor) -> NDArray[np.int32]:
    """The orders that ``keys`` stand for, in our numbers: player f * cols + k, int32 [samples, players]."""
    _, cols, fields = keys.shape
    orders = keys.flatten(1).argsort(dim=1, stable=True)
    return (orders % fields * cols + orders // fields).numpy().astype(np.int32)


class TorchTotals:
    """Sums of marginals and of squares a table entry, as ours: float64 [rows, cols]."""

    def __init__(self, table: Tensor) -> None:
        self.sums, self.squares = (torch.zeros(table.shape, dtype=torch.float64) for _ in range(2))

    def add(self, ids: Tensor, marginals: Tensor) -> None:
        rows = marginals.transpose(1, 2).double().reshape(-1, self.sums.shape[1])
        self.sums.index_add_(0, ids.flatten(), rows)
        self.squares.index_add_(0, ids.flatten(), rows.square())


def captum_calls(source: EntrySamples) -> dict[str, tuple[Callable[[], Any], int]]:
    """captum's sampling of the same game, each call with how many sample-permutations it makes; {} without captum.

    The forward function takes rows of embeddings already looked up, base zero, and returns log losses.
    """
    if importlib.util.find_spec("captum") is None:
        return {}
    from captum.attr import ShapleyValueSampling

    fields, cols = source.base.shape

    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        e = rows.view(-1, fields, cols)
        logit = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(1)
        return torch.nn.functional.softplus(logit) - labels * logit

    sampling = ShapleyValueSampling(losses)
    batch = min(CAPTUM_BATCH, len(source.ids))
    rows = torch.from_numpy(source.table)[torch.from_numpy(source.ids[:batch]).long()].flatten(1)
    labels = torch.from_numpy(source.labels[:batch])

    def attribute(count: int, at_once: int) -> Callable[[], Any]:
        return lambda: sampling.attribute(
            rows[:count], additional_forward_args=(labels[:count],), n_samples=1, perturbations_per_eval=at_once
        )  # fmt: skip

    return {
        "captum, one sample": (attribute(1, 1), 1),
        "captum, one sample, 64 at once": (attribute(1, 64), 1),
        f"captum, {batch} samples": (attribute(batch, 1), batch),
    }


def variance_ratio(source: EntrySamples, samples: int, draws: int) -> float:
    """Return the variance of one order's marginals over that of a pair's mean: how many orders a pair is worth.

    Of ``samples`` samples, within each of them over ``draws`` independent draws, the mean over players.
    """
    part = source.part(0, samples)
    spread = []
    for antithetic in (False, True):
        drawn = [
            fm_marginals(part, EntryDraw(5, visit=visit, antithetic=antithetic)) for visit in range(draws)
        ]
        spread.append(float(np.stack(drawn).astype(np.float64).var(axis=0, ddof=1).mean()))
    return spread[0] / spread[1]


def peak_bytes(passes: int) -> int:
    """Return the peak memory of a process that makes ``passes`` pairs of orders for each of 2,048 samples."""
    command = [sys.executable, "-c", _PEAK, str(passes)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
