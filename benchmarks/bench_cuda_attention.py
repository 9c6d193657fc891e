"""Attention over stripes and blocks on a GPU, beside cuDNN's and flash attention through torch, in one run.

    PYSPARSE_EXPERIMENTAL=1 python benchmarks/bench_cuda_attention.py --out OUT/cuda_attention.json

32 query heads, 8 key heads, 128 dimensions, bfloat16, causal. Medians of interleaved rounds. Random stripes at the
given share of the candidates; what choosing them takes is timed apart; every kernel is checked against torch's result
in float32 on sampled rows first. FLOP count what a kernel is asked for: 4 D for each pair of a query and a key that it
may see; their share is that of the rate of torch's largest bf16 product. At a tenth of the stripes the same lists are
also gathered and given to torch's fused attention, head by head: what needs no kernel of ours.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_run import MOST_ATTENTION_ERROR, Run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pysparse import ops
from pysparse.formats import BlockIndex, StripeIndex
from pysparse.ops import attention_portable

HEADS, KEY_HEADS, DIM = 32, 8, 128
ROUNDS = 7
SAMPLED = 64  # rows whose result is checked
Call = Callable[[], Tensor]


def random_stripes(length: int, region: ops.AnchorRegion, share: float) -> StripeIndex:
    """Draw ``share`` of each group's candidates, for each query head."""
    groups = -(-length // region.group_size)
    key = torch.arange(length, device="cuda")
    last = torch.arange(groups, device="cuda")[:, None] * region.group_size - region.local
    candidate = (key >= region.init) & (key < last)
    parts = []
    for _ in range(HEADS):  # a head at a time: the mask of all would be gigabytes
        mask = (torch.rand(groups, length, device="cuda") < share) & candidate
        parts.append((mask.sum(dim=1), mask.nonzero()[:, 1].to(torch.int32)))
    offsets = torch.zeros(HEADS * groups + 1, dtype=torch.int64, device="cuda")
    torch.cumsum(torch.cat([counts for counts, _ in parts]), 0, out=offsets[1:])
    keys = torch.cat([part for _, part in parts])
    return StripeIndex(offsets, keys, (1, HEADS, groups), region.group_size, length)


def random_blocks(length: int, share: float) -> BlockIndex:
    """Draw ``share`` of the blocks before each block of rows, and its own."""
    blocks = -(-length // 128)
    mask = torch.rand(1, HEADS, blocks, blocks, device="cuda") < share
    mask = (mask & torch.ones_like(mask).tril(-1)) | torch.eye(blocks, device="cuda").bool()
    return BlockIndex.from_mask(mask)


def error(actual: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Callable[[Tensor], Tensor]) -> float:
    """Return the relative error of sampled rows; ``seen(rows)`` is the boolean mask [heads, rows, keys]."""
    rows = torch.linspace(0, q.shape[2] - 1, SAMPLED, device="cuda").long()
    groups = HEADS // KEY_HEADS
    keys, values = (x[0].float().repeat_interleave(groups, dim=0) for x in (k, v))
    logits = (q[0, :, rows].float() @ keys.mT * DIM**-0.5).masked_fill(~seen(rows), float("-inf"))
    expected = logits.softmax(-1) @ values
    return float((actual[0, :, rows].float() - expected).norm() / expected.norm())


def interleaved(calls: dict[str, Call]) -> dict[str, float]:
    """Return the median milliseconds of each call over rounds in which each runs once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(ROUNDS + 1):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if round:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(seen) for name, seen in times.items()}


def dense_rivals(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Return torch's dense attention by cuDNN and by flash attention."""

    def by(which: SDPBackend) -> Tensor:
        with sdpa_kernel(which):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return {
        "cudnn": lambda: by(SDPBackend.CUDNN_ATTENTION),
        "torch_flash": lambda: by(SDPBackend.FLASH_ATTENTION),
    }


def pairs_of(length: int, region: ops.AnchorRegion) -> tuple[float, float]:
    """Return how many pairs of query and key a head's dense attention meets, and how many its anchor region."""
    rows = torch.arange(length, dtype=torch.float64)
    near = (rows // region.group_size * region.group_size - region.local).clamp_min(0)
    seen = rows + 1 - near + torch.minimum(near, torch.tensor(float(region.init)))
    return length * (length + 1) / 2, float(seen.sum())


def matrix_rate() -> float:
    """Return the TFLOP/s of torch's product of two 8192 x 8192 bf16 matrices of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / interleaved({"product": lambda: a @ b})["product"] / 1e9


def stripes_and_region(
    index: StripeIndex, region: ops.AnchorRegion, length: int
) -> Callable[[Tensor], Tensor]:
    """Return the mask of rows that see their group's stripes and the anchor region."""
    mask, key = index.to_mask()[0], torch.arange(length, device="cuda")

    def seen(rows: Tensor) -> Tensor:
        start = rows[:, None] // region.group_size * region.group_size
        near = (key < region.init) | (key >= start - region.local)
        return (mask[:, rows // region.group_size] | near) & (key <= rows[:, None])

    return seen


@dataclass(frozen=True, slots=True)
class Work:
    """One length: its tensors, what is timed on them, how right each result is and how much it was asked for."""

    q: Tensor  # [1, HEADS, length, DIM]
    k: Tensor  # [1, KEY_HEADS, length, DIM]
    v: Tensor
    region: ops.AnchorRegion
    state: ops.AttentionState  # of the region
    calls: dict[str, Call]
    checks: dict[str, float]
    extra: dict[str, dict[str, float]]


def exact_work(length: int) -> Work:
    """Return tensors of a length with everything that needs no lists of keys."""
    q = torch.randn(1, HEADS, length, DIM, device="cuda").bfloat16()
    k, v = (torch.randn(1, KEY_HEADS, length, DIM, device="cuda").bfloat16() for _ in range(2))
    region = ops.AnchorRegion()
    state = ops.anchor_state(q, k, v, region)
    rivals = dense_rivals(q, k, v)
    calls = rivals | {
        "flash": lambda: ops.flash_attention(q, k, v)[0],
        "anchor region": lambda: ops.anchor_state(q, k, v, region).out,
        "identify": lambda: ops.identify_stripes(q, k, state.max, region, ops.StripeRule(theta=-2.0)).keys,
    }
    key = torch.arange(length, device="cuda")
    checks = {
        "flash": error(calls["flash"](), q, k, v, lambda rows: (key <= rows[:, None]).expand(HEADS, -1, -1))
    }
    every, close = pairs_of(length, region)
    extra = {name: {"pairs": HEADS * every} for name in (*rivals, "flash")}
    extra["anchor region"] = {"pairs": HEADS * close}
    return Work(q, k, v, region, state, calls, checks, extra)


def add_share(work: Work, share: float) -> None:
    """Add random stripes and blocks that keep ``share`` of the candidates."""
    q, k, v, region, state = work.q, work.k, work.v, work.region, work.state
    length, stripes, blocks_name = q.shape[2], f"stripes {share:.0%}", f"blocks {share:.0%}"
    index, blocks = random_stripes(length, region, share), random_blocks(length, share)
    parts = (state.out, state.max, state.denominator)
    # The operation checks its lists; the time of the kernels is that of lists just identified.
    lists = (index.offsets, index.keys, HEADS, region.group_size, *parts, None, DIM**-0.5, 0)
    work.calls[stripes] = lambda: torch.ops.pysparse.stripe_attention(q, k, v, *lists)[0]
    work.calls[blocks_name] = lambda: ops.block_sparse_attention(q, k, v, blocks)[0]
    if length <= 16384:  # the mask of a longer prompt would be gigabytes
        seen = stripes_and_region(index, region, length)
        work.checks[stripes] = error(work.calls[stripes](), q, k, v, seen)
    if share == 0.1:
        work.calls["gathered stripes 10%"] = lambda: attention_portable.stripe_attention(
            q, k, v, index, parts, [(0, length)], DIM**-0.5, 0
        )[0]
    work.extra[stripes] = {
        "pairs": index.nnz * region.group_size,
        "stripes": index.nnz,
        "density": index.nnz / (HEADS * length**2 / 2 / 2048),
    }
    # A head's last blocks are half seen.
    pairs = (blocks.nnz - HEADS * -(-length // 128) / 2) * 128**2
    work.extra[blocks_name] = {"pairs": pairs, "blocks": blocks.nnz}


def measure(length: int, shares: list[float], report: dict[str, Any]) -> str:
    """Check and time everything at one length."""
    work = exact_work(length)
    for share in shares:
        add_share(work, share)
    report["errors"][str(length)] = work.checks
    wrong = [name for name, e in work.checks.items() if not e < MOST_ATTENTION_ERROR]
    report["wrong"] += [f"{name} at {length}" for name in wrong]
    times = interleaved(work.calls)
    rows = figures(length, times, work.extra, shares, report["bf16_teraflops"])
    report["rows"] += rows
    for row in rows:
        rate = f", {row['teraflops']:4.0f} TFLOP/s" if "teraflops" in row else ""
        print(
            f"  {row['kernel']:24s} {row['milliseconds']:9.2f} ms, {row['over_cudnn']:5.2f} x cuDNN{rate}",
            flush=True,
        )
    return f"{len(times)} kernels"


def figures(
    length: int, times: dict[str, float], extra: dict[str, dict[str, float]], shares: list[float], peak: float
) -> list[dict[str, Any]]:
    """Return the rows of one length; ``times`` are milliseconds, ``peak`` the TFLOP/s of a large product."""
    whole = {
        f"anchor attention {share:.0%}": times["anchor region"]
        + times["identify"]
        + times[f"stripes {share:.0%}"]
        for share in shares
    }
    rows = []
    for name, milliseconds in (times | whole).items():
        row: dict[str, Any] = {"length": length, "kernel": name, "milliseconds": milliseconds} | extra.get(
            name, {}
        )
        if "pairs" in row:
            row["teraflops"] = 4 * DIM * row["pairs"] / milliseconds / 1e9
            row["matrix_share"] = row["teraflops"] / peak
        rows.append(row | {"over_cudnn": times["cudnn"] / milliseconds})
    return rows


def main() -> int:
    """Measure, print and write the report; 1 when a kernel was wrong or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536, 131072])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    options = parser.parse_args()
    run = Run.start(options.out, errors={})
    run.report["bf16_teraflops"] = matrix_rate()
    done = []
    for length in options.lengths:
        part = lambda length=length: measure(length, options.shares, run.report)  # noqa: E731
        done.append(run.part(f"length_{length}", part))
        torch.cuda.empty_cache()
    if all(done):
        run.vouch_for("attention")
    return run.close()


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
