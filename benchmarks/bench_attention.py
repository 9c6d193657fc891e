"""Prefill attention, 8 query and 2 key heads of 128, causal: our kernels beside torch's ways.

Random queries and keys with one direction in common: chosen keys stand out by some logit units, so that the rule
of AnchorAttention finds exactly them. The share of keys is set, the time of finding them is in every figure.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import Call, Run, command_line, restart_for_isa, show, threads_of, time_calls
from rich.table import Table
from rivals.peak_probe import peak_gigaflops
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pysparse import backend, ops
from pysparse.formats import BlockIndex, StripeIndex
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads

HEADS, KEY_HEADS, DIM, BLOCK = 8, 2, 128, 128
LENGTHS, QUICK_LENGTHS = (2048, 4096, 8192, 16384, 32768), (1024,)
SHARES = (0.05, 0.1, 0.2)  # of the candidate keys
SLOW_LENGTH = 16384  # torch's ways are not waited for beyond
FLEX_LENGTH = 8192
DENSE, SDPA, COMPOSED, FLEX = "dense", "torch sdpa", "torch matmuls", "torch flex, compiled"
RULE = ops.StripeRule(theta=5.0)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 3e-2  # relative Frobenius, of the exact ways: torch's bf16 product rounds the logits themselves


@dataclass(frozen=True, slots=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        return self.q.shape[2]


def draw(length: int, share: float, run_length: int, dtype: torch.dtype) -> Case:
    """Keys that stand out come in runs of ``run_length``; the first keys do, as a model's sinks."""
    generator = torch.Generator().manual_seed(length + run_length)
    q, k, v = (
        torch.randn(1, heads, length, DIM, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    runs = torch.rand(1, KEY_HEADS, math.ceil(length / run_length), generator=generator) < share
    chosen = runs.repeat_interleave(run_length, dim=2)[..., :length]
    chosen[..., :4] = True
    q[..., 0], k[..., 0] = 10.0, torch.where(chosen, 9.0, 0.0)  # 8 logit units
    return Case(q.to(dtype), k.to(dtype), v.to(dtype))


def composed(case: Case) -> Tensor:
    """torch's own products and softmax, a block of rows at a time: no N x N matrix, no masked half."""
    ratio = HEADS // KEY_HEADS
    outs = []
    for begin in range(0, case.length, BLOCK):
        end = min(case.length, begin + BLOCK)
        rows = case.q[0, :, begin:end].reshape(KEY_HEADS, -1, DIM)
        logits = (rows @ case.k[0, :, :end].mT).float() * DIM**-0.5
        logits = logits.view(KEY_HEADS, ratio, end - begin, end)
        future = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        logits[..., begin:].masked_fill_(future, -math.inf)
        weights = logits.softmax(dim=-1).to(case.q.dtype).view(KEY_HEADS, -1, end)
        outs.append((weights @ case.v[0, :, :end]).view(HEADS, end - begin, DIM))
    return torch.cat(outs, dim=1)[None]


def causal_block_mask(length: int) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")


def exact_ways(case: Case, compiled_flex: Callable[..., Any] | None) -> dict[str, Callable[[], Tensor]]:
    ways: dict[str, Callable[[], Tensor]] = {DENSE: lambda: ops.flash_attention(case.q, case.k, case.v)[0]}
    if case.length <= SLOW_LENGTH:
        ways[SDPA] = lambda: functional.scaled_dot_product_attention(
            case.q, case.k, case.v, is_causal=True, enable_gqa=True
        )
        ways[COMPOSED] = lambda: composed(case)
    if compiled_flex is not None and case.length <= FLEX_LENGTH:
        mask = causal_block_mask(case.length)
        ways[FLEX] = lambda: compiled_flex(case.q, case.k, case.v, block_mask=mask, enable_gqa=True)
    return ways


def blocks_like(index: StripeIndex, region: ops.AnchorRegion, length: int) -> BlockIndex:
    """The anchor region's blocks, and of the candidates' blocks so many at random that as many pairs are computed."""
    generator = torch.Generator().manual_seed(0)
    blocks, per_group = -(-length // BLOCK), region.group_size // BLOCK
    mask = torch.zeros(1, HEADS, blocks, blocks, dtype=torch.bool)
    for m in range(blocks):
        first = max(region.init // BLOCK, m // per_group * per_group - region.local // BLOCK)
        mask[:, :, m, : region.init // BLOCK] = True
        mask[:, :, m, first : m + 1] = True
        for h in range(HEADS):
            wished = round(int(index.counts[0, h, m // per_group]) / BLOCK)
            candidates = torch.arange(region.init // BLOCK, first)
            mask[0, h, m, candidates[torch.randperm(len(candidates), generator=generator)[:wished]]] = True
    return BlockIndex.from_mask(mask.tril(), BLOCK, BLOCK)


def density(index: StripeIndex, region: ops.AnchorRegion, length: int) -> float:
    """Computed pairs of a query and a key over those of the causal triangle."""
    position = torch.arange(length)
    first = (position // region.group_size * region.group_size - region.local).clamp(min=region.init)
    near = torch.where(first > position, region.init, region.init + position + 1 - first)
    near = torch.minimum(near, position + 1).double().mean()
    stripes = index.counts.double()[0].mean(dim=0)[position // region.group_size].mean()
    return float((near + stripes) / (position + 1).double().mean())


def sparse_ways(case: Case, region: ops.AnchorRegion) -> tuple[dict[str, Callable[[], Any]], StripeIndex]:
    q, k, v = case.q, case.k, case.v
    _, _, index = ops.anchor_attention(q, k, v, region, RULE)
    anchor = ops.anchor_state(q, k, v, region).max
    blocks = blocks_like(index, region, case.length)
    return {
        "stripes": lambda: ops.anchor_attention(q, k, v, region, RULE),
        "identification": lambda: ops.identify_stripes(q, k, anchor, region, RULE),
        "blocks": lambda: ops.block_sparse_attention(q, k, v, blocks),
    }, index


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def settings(length: int, quick: bool) -> Iterator[tuple[float, int, int]]:
    """(share, run length, group size) of the stripes at ``length``: one thing varied at a time."""
    group = 256 if quick else 2048
    yield 0.1, 1, group
    if not quick and length <= SLOW_LENGTH:  # beyond, one setting takes a minute
        yield from ((share, 1, group) for share in SHARES if share != 0.1)
        yield 0.1, 16, group
        yield from ((0.1, 1, smaller) for smaller in (512, 1024))


def run(options: argparse.Namespace, peak: float | None) -> Iterator[dict[str, Any]]:
    # Compiling takes longer than all the rest of a quick run.
    compiled_flex = None if options.quick else torch.compile(flex_attention, dynamic=False)
    for length in options.lengths or (QUICK_LENGTHS if options.quick else LENGTHS):
        case = draw(length, 0.1, 1, DTYPES[options.dtype])
        ways = exact_ways(case, compiled_flex)
        answers = {name: way() for name, way in ways.items()}
        errors = {name: relative_error(answer, answers[DENSE]) for name, answer in answers.items()}
        wrong = [name for name, error in errors.items() if not error < TOLERANCE]
        if SDPA in wrong:
            raise RuntimeError(f"ours and torch's attention differ at {length} tokens: {errors}")
        # Who is off by more than roundings is written down, and not timed.
        right = {name: way for name, way in ways.items() if name not in wrong}
        facts = {"tokens": length, "dtype": options.dtype, "errors": errors, "wrong": wrong}
        yield record(options, right, facts, peak)
        if length <= 2 * BLOCK:
            continue
        for share, run_length, group in settings(length, options.quick):
            if group * 2 <= length:
                yield sparse_row(options, length, share, run_length, group, peak)


def sparse_row(
    options: argparse.Namespace, length: int, share: float, run_length: int, group: int, peak: float | None
) -> dict[str, Any]:  # fmt: skip
    case = draw(length, share, run_length, DTYPES[options.dtype])
    region = ops.AnchorRegion(group)
    ways, index = sparse_ways(case, region)
    dense = partial(ops.flash_attention, case.q, case.k, case.v)
    facts = {
        "tokens": length, "dtype": options.dtype, "share": share, "run_length": run_length, "group_size": group,
        "density": density(index, region, length),
        "error": relative_error(ways["stripes"]()[0], dense()[0]),
    }  # fmt: skip
    return record(options, {DENSE: dense, **ways}, facts, peak)


def record(
    options: argparse.Namespace, ways: dict[str, Callable[[], Any]], facts: dict[str, Any], peak: float | None
) -> dict[str, Any]:  # fmt: skip
    calls = {name: Call(way, torch.no_grad) for name, way in ways.items()}
    timings = time_calls(calls, options.rounds, sample_seconds=0.0, warmup=1)
    speedups = {name: to_jsonable(one.speedup_over(timings[DENSE])) for name, one in timings.items()}
    row = {
        **facts,
        **{name: one.record() for name, one in timings.items()},
        "speedup_over_dense": speedups,
    }
    spread = timings[DENSE].spread()
    if spread is not None:
        row["dense_gigaflops"] = HEADS * 2 * DIM * facts["tokens"] ** 2 / spread.median / 1e3
        row["dense_share_of_peak"] = row["dense_gigaflops"] / peak if peak else None
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    lines = []
    for row in rows:
        what = "all keys" if "share" not in row else f"{row['share']:.0%} in runs of {row['run_length']}"
        ratios = [
            f"{name} {value['median']:.2f}" for name, value in row["speedup_over_dense"].items() if value
        ]
        milliseconds = (row[DENSE]["microseconds"] or {}).get("median")
        lines.append(
            [
                row["tokens"], what, row.get("group_size"), row.get("density"), row.get("error"),
                milliseconds and milliseconds / 1e3, row.get("dense_share_of_peak"), ", ".join(ratios),
            ]
        )  # fmt: skip
    columns = ["tokens", "keys", "group", "density", "error", "dense ms", "of peak", "times our dense"]
    return make_table("Prefill attention", columns, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("attention", str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", help="tokens; default 2k to 32k")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--isa", help="hold us and torch to a level: avx2 (restarts)")
    options = parser.parse_args(arguments)
    restart_for_isa(options.isa)
    started = Run.start("attention", options)
    with torch_threads(threads_of(options)) as threads, torch.no_grad():
        peak = (
            None if options.isa else peak_gigaflops(options.dtype, threads)
        )  # of all that the processor has
        rows = list(run(options, peak))
    protocol = {
        "heads": HEADS, "key_heads": KEY_HEADS, "head_dim": DIM, "dtype": options.dtype, "isa": backend.isa(),
        "threads": threads,
        "rounds": options.rounds, "peak_gigaflop_per_second": peak, "data": "synthetic, seeded by the length",
        "theta": RULE.theta,
    }  # fmt: skip
    path = started.save(protocol, rows)
    show(table(rows), path=path)


if __name__ == "__main__":
    main()
