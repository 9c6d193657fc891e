"""Never slower: random layers, the way that is chosen beside the better of dense and sparse."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import shapes
import torch
from harness import MIN_CLEAN, Run, command_line, show, threads_of
from torch import nn
from torch.nn import functional

from pysparse import ops
from pysparse.formats import ColumnPairs
from pysparse.measure.results import make_table
from pysparse.measure.rounds import round_robin, torch_threads
from pysparse.measure.twins import zero_rows_at_random_
from pysparse.nn import DenseLinear, SparseLinear
from pysparse.nn.convert import MIN_SPARSITY

SIDES = (768, 1024, 2048, 3072, 4096, 5632, 8192, 11008)  # of published models' layers
TOKENS = (1, 512)  # from, to; as likely below as above their geometric mean
MOST_ZEROS = 0.95
WORK = 2**33  # weights times tokens, at most: bounds a case to some tenths of a second
SAMPLE_SECONDS = 0.002  # short: the more samples, the likelier that one had the cores for itself
WITHIN = 1.03  # of the better of dense and sparse
CHOSEN, TORCH, KERNEL = "chosen", "torch dense", "dense kernel"


@dataclass(frozen=True, slots=True)
class Case:
    """A random layer and number of tokens."""

    out_features: int
    in_features: int
    tokens: int
    sparsity: float
    dtype: str


def draw(count: int, dtypes: list[str], sides: tuple[int, ...], seed: int) -> list[Case]:
    """The same cases for the same seed."""
    generator, cases = random.Random(seed), []
    while len(cases) < count:
        low, high = TOKENS
        tokens = round(low * (high / low) ** generator.random())
        rows, cols = generator.choice(sides), generator.choice(sides)
        case = Case(rows, cols, tokens, generator.uniform(0, MOST_ZEROS), generator.choice(dtypes))
        if rows * cols * tokens <= WORK:
            cases.append(case)
    return cases


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time the layer as :func:`sparsify_` would make it, and each way by itself."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(case.out_features, case.in_features, generator=generator) * 0.02).to(
        shapes.DTYPES[case.dtype]
    )
    zero_rows_at_random_(weight, case.sparsity, generator)
    x = torch.randn(case.tokens, case.in_features, generator=generator).to(weight.dtype)
    linear = nn.Linear(case.in_features, case.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    sparse = SparseLinear.from_dense(linear)
    stays_dense = case.sparsity < MIN_SPARSITY
    chosen = DenseLinear.from_linear(linear) if stays_dense else sparse
    tiled = sparse._tiled()
    pairs = ColumnPairs.from_tiled(tiled)
    calls = {
        CHOSEN: lambda: chosen(x),
        TORCH: lambda: functional.linear(x, weight),
        KERNEL: lambda: ops.dense_linear(x, weight),
        "bitmap": lambda: ops.bitmap_linear_chunks(x, tiled),
        "unpack": lambda: ops.unpacked_linear(x, tiled),
        "pairs": lambda: ops.pairs_linear(x, pairs),
    }
    if case.tokens > ops.DENSE_TOKENS:
        del calls[KERNEL]  # is torch's product there
    fastest = time_fastest(calls, rounds)
    best = min((name for name in fastest if name != CHOSEN), key=fastest.__getitem__)
    way = "kept dense" if stays_dense else sparse.choice(case.tokens).way
    alone = fastest.get(way, fastest.get(KERNEL, fastest[TORCH]))  # dense, copied or kept
    return {
        **asdict(case),
        "way": way,  # kept dense: under MIN_SPARSITY
        "best": best,
        "microseconds": {name: 1e6 * seconds for name, seconds in fastest.items()},
        "chosen_over_best": fastest[CHOSEN] / fastest[best],  # 1.03: the choice takes 3 % longer
        "way_over_best": alone / fastest[best],  # the same without the layer, so without what two timings differ by
    }  # fmt: skip


def time_fastest(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of a call, the fastest of interleaved rounds.

    Two ways within 3 % of each other cannot be told apart by medians while anything else runs; other programs
    only ever add to a time, so the fastest of enough rounds can.
    """
    counts = {name: calls_for(call) for name, call in calls.items()}

    def sample(name: str) -> float:
        call, count = calls[name], counts[name]
        call()  # untimed: the way before may have left this one's weight in the caches, or not
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    run = round_robin({name: partial(sample, name) for name in calls}, rounds, warmup=1)
    return {name: min(seconds) for name, seconds in run.results.items()}


def calls_for(call: Callable[[], object]) -> int:
    """As many calls as fill a sample."""
    call()
    start = time.perf_counter()
    call()
    return max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the choice was within 3 % of the best."""
    ratios = sorted(row["chosen_over_best"] for row in rows)
    good = sum(ratio <= WITHIN for ratio in ratios)
    against_dense = [row["microseconds"][TORCH] / row["microseconds"][CHOSEN] for row in rows]
    return {
        "cases": len(rows),
        "within_3_percent": good,
        "way_within_3_percent": sum(row["way_over_best"] <= WITHIN for row in rows),
        "fraction": good / len(ratios) if ratios else None,
        "worst": ratios[-1] if ratios else None,
        "slower_than_torch_by_3_percent": sum(ratio < 1 / WITHIN for ratio in against_dense),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("dispatch", __doc__ or "")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument(
        "--skip", type=int, default=0, help="cases of the same draw that another run measured"
    )
    parser.add_argument("--dtype", nargs="+", choices=shapes.DTYPES, default=list(shapes.DTYPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    options = parser.parse_args(arguments)
    if options.quick:
        options.cases, options.rounds = 3, MIN_CLEAN
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    this = Run.start("dispatch", options)
    sides = (64, 96) if options.quick else SIDES
    start, rows = time.monotonic(), []
    with torch_threads(options.threads), torch.no_grad():
        for case in draw(options.cases, options.dtype, sides, options.seed)[options.skip :]:
            if time.monotonic() - start > options.seconds:
                break
            rows.append(measure(case, options.rounds))
        protocol = {
            "threads": threads_of(options),
            "rounds": options.rounds,
            "seed": options.seed,
            "first_case": options.skip,
            "sample": f"sides {sides}, tokens {TOKENS} log-uniform, sparsity 0 to {MOST_ZEROS} uniform",
            "best": "the least of torch's dense product, our dense kernel, decode kernel and pair kernel",
            "weights": "one copy",
            "figure": "microseconds a call: the fastest of interleaved rounds",
            "summary": summary(rows),
        }
        path = this.save(protocol, rows)
    totals = summary(rows)
    show(
        make_table("the chosen way beside the best", ["what", "figure"], [[k, v] for k, v in totals.items()]),
        path=path,
    )


if __name__ == "__main__":
    main()
