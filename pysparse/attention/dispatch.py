"""Which attention a call gets: planned, exact, and the reason, which is counted."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.attention.checks import check_count
from pysparse.attention.crossover import gpu_crossover, known_crossover
from pysparse.attention.exact import Shape, exact_attention
from pysparse.attention.log import DENSE, SPARSE, Tally
from pysparse.attention.plan import Attended, AttentionInput, Fused, Planner, attend, check_planner, dense

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How long prompts are computed.

    ``planner`` None is exact attention. Prompts of fewer than ``min_length`` keys (None: the measured crossover, or
    without one the planner's own), decoding steps and ``dense_layers`` are exact as well, and so is a call whose
    plan would compute more than ``max_density`` of the pairs. ``sample_rows`` rows of each planned call are
    computed exactly too, to report the recall. ``profile`` tells the time for selection from that for the product,
    in two passes instead of one.
    """

    planner: Planner | None = None
    min_length: int | None = None
    max_density: float = 0.6
    dense_layers: frozenset[int] = frozenset()
    sample_rows: int = 0
    profile: bool = False

    def __post_init__(self) -> None:
        if self.planner is not None:
            check_planner(self.planner)
        if self.min_length is not None:
            check_count("min_length", self.min_length)
        if not 0 <= self.max_density <= 1:
            raise ValueError(f"max_density={self.max_density} is a share of the pairs: it lies in [0, 1]")
        check_count("sample_rows", self.sample_rows)
        for layer in self.dense_layers:
            check_count("a layer in dense_layers", layer)
        object.__setattr__(self, "dense_layers", frozenset(self.dense_layers))


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a call got: out [B, Hq, N, D], the way and reason for the log, and what to count there."""

    out: Tensor
    way: str
    reason: str
    tally: Tally


def run_attention(given: AttentionInput, options: AttentionOptions, layer: int = -1) -> Outcome:
    """Compute one causal call of ``layer``, planned where that pays."""
    reason, planner, start = (
        why_exact(given, options, layer, given.query.is_cuda),
        options.planner,
        time.perf_counter(),
    )
    fused = planner if isinstance(planner, Fused) and not options.profile else None
    if fused and not reason and options.max_density < 1 and fused.estimate(given) > options.max_density:
        reason = _too_dense(options)
    if planner is None or reason:
        asked = time.perf_counter() - start
        out = _exact(given)
        return Outcome(out, DENSE, reason, _tally(given, 1.0, asked, time.perf_counter() - start - asked))
    result = fused.attend(given) if fused else attend(given, planner, options.max_density)
    tally = _tally(given, result.density, result.select_seconds, result.compute_seconds)
    if result.dropped:
        return Outcome(result.out, DENSE, _too_dense(options), tally)
    if options.sample_rows:
        _sample(given, result, options.sample_rows, tally)
    return Outcome(result.out, SPARSE, "", tally)


def _exact(given: AttentionInput) -> Tensor:
    """Return exact attention: the compiled kernel's, and torch's on a GPU, where it is as fast or faster."""
    if not given.query.is_cuda:
        return dense(given)[0]
    shape = Shape(given.scale, given.q_offset, given.key_range)
    return exact_attention(given.query, given.key, given.value, shape)


def _too_dense(options: AttentionOptions) -> str:
    return f"density above {options.max_density:.2f}"


def why_exact(given: AttentionInput, options: AttentionOptions, layer: int, on_gpu: bool = False) -> str:
    """Return why this call is not to be planned; "" when it is.

    ``on_gpu``: by what a GPU run measured beside torch's own attention, not by what is known of this CPU.
    """
    if options.planner is None:
        return ""
    if layer in options.dense_layers:
        return "layer in dense_layers"
    least, source = _least_keys(options.planner, options.min_length, given.query.dtype, on_gpu)
    longest = max((one.end for one in given.bounds()), default=0)
    return "" if longest >= least else f"fewer than {least} keys{source}"


def _least_keys(planner: Planner, asked: int | None, dtype: torch.dtype, on_gpu: bool) -> tuple[int, str]:
    """Return from how many keys on a call is planned, and who says so where it is a measurement."""
    if asked is not None:
        return asked, ""
    if on_gpu and planner.crossover:  # 0: the user brought the lists
        return max(planner.crossover, gpu_crossover()), ", as measured on a GPU"
    found = known_crossover(planner, dtype)
    if found is None:
        return planner.crossover, ""
    if found.keys is None:  # longer calls may pay or not: the planner's bound and a doubling are a guess
        least = max(planner.crossover, 2 * found.longest)
        return least, f", measured up to {found.longest} and not faster"
    return found.keys, ", as measured"


def row_recall(given: AttentionInput, lse: Tensor, rows: Tensor) -> Tensor:
    """Return the share of attention mass that a sparse result holds: float32 [B, Hq, len(rows)], 1 = all.

    ``lse`` [B, Hq, N] is the result's log-sum-exp and ``rows`` int64 the query rows to look at. More than 1 by more
    than rounding would mean that a key was counted twice. Rows in padding are NaN.
    """
    whole = torch.full((*lse.shape[:2], len(rows)), math.nan)
    for b, one in enumerate(given.bounds()):
        query = given.query[b, :, rows].float().unflatten(0, (given.key.shape[1], -1))
        key = given.key[b, :, one.start : one.start + one.end].float()
        logits = (query @ key.unsqueeze(1).transpose(2, 3)).flatten(0, 1) * given.scale
        position = (rows + given.q_offset - one.start).unsqueeze(1)
        future = torch.arange(key.shape[1]) > position
        known = (position >= one.first) & (position < one.end)
        exact = logits.masked_fill_(future, -torch.inf).logsumexp(-1)
        whole[b] = torch.where(known.squeeze(1), (lse[b, :, rows] - exact).exp(), math.nan)
    return whole


def _sample(given: AttentionInput, result: Attended, count: int, tally: Tally) -> None:
    rows = torch.linspace(0, given.query.shape[2] - 1, min(count, given.query.shape[2])).long()
    recall = row_recall(given, result.lse, rows)
    recall = recall[~recall.isnan()]
    if recall.numel():
        tally.recall_sum, tally.recall_rows = float(recall.sum()), recall.numel()
        tally.recall_min = float(recall.min())


def _tally(given: AttentionInput, density: float, select: float, compute: float) -> Tally:
    rows = sum(one.end - one.first for one in given.bounds())
    return Tally(1, rows, density * rows, select, compute)
