"""Shapley walks over embedding tables: rates, pairs, threads, the dense products, and a vectorised torch sampler."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Call, Run, command_line, show, time_calls
from rich.table import Table
from torch import Tensor

from pysparse.measure.results import to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.ops import (
    DeepHead,
    EntryDraw,
    EntrySamples,
    EntryTotals,
    Mlp,
    fm_marginals,
    fm_shapley,
    head_shapley,
)

FIELDS, COLS = 39, 16  # Criteo's fields, the papers' width: 624 players
WIDTH = 400  # of the three hidden layers
Row = dict[str, Any]


def data(rows_of_field: int, samples: int) -> EntrySamples:
    rng = np.random.default_rng(0)
    table = (0.05 * rng.normal(size=(FIELDS * rows_of_field, COLS))).astype(np.float32)
    values = np.minimum(rng.zipf(1.1, size=(samples, FIELDS)) - 1, rows_of_field - 1)
    ids = (values + np.arange(FIELDS) * rows_of_field).astype(np.int32)
    labels = rng.integers(0, 2, samples).astype(np.float32)
    return EntrySamples(table, np.zeros((FIELDS, COLS), np.float32), ids, labels)


def torch_sampler(table: Tensor, ids: Tensor, labels: Tensor, orders: Tensor) -> Tensor:
    """One permutation a sample without a loop over steps: base zero; ``orders`` int64 [B, n]; marginals [B, n]."""
    e = table[ids]  # [B, m, d]
    when = torch.empty_like(orders).scatter_(1, orders, torch.arange(orders.shape[1]).expand_as(orders))
    turn = when.view(e.shape).argsort(dim=1)  # within each column
    gone = torch.gather(e, 1, turn)
    before = e.sum(1, keepdim=True) - (gone.cumsum(1) - gone)
    steps = torch.empty_like(e).scatter_(1, turn, -gone * (before - gone)).flatten(1)
    logit = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(1, keepdim=True)
    along = torch.cat([logit, logit + steps.gather(1, orders).cumsum(1)], dim=1)
    loss = torch.nn.functional.softplus(along) - labels[:, None] * along
    return torch.empty_like(steps).scatter_(1, orders, loss.diff(dim=1))


def rates(calls: dict[str, Callable[[], Any]], samples: int, rounds: int, what: str) -> list[Row]:
    """Time calls that each make a walk, or a pair, for every sample."""
    timings = time_calls({name: Call(call) for name, call in calls.items()}, rounds, warmup=1)
    first = next(iter(timings.values()))
    return [
        {
            "what": what, "call": name, "samples": samples, **one.record(),
            "samples_per_second": None if one.spread() is None else samples * 1e6 / one.spread().median,
            "first_is_faster_by": to_jsonable(first.speedup_over(one)),
        }
        for name, one in timings.items()
    ]  # fmt: skip


def factorisation_machine(options: argparse.Namespace, rows_of_field: int, samples: int) -> list[Row]:
    source = data(rows_of_field, samples)
    totals, what = EntryTotals(*source.table.shape), f"FM, table of {len(source.table)} rows"

    def call(threads: int, pair: bool) -> Callable[[], None]:
        def run() -> None:
            with torch_threads(threads):
                fm_shapley(source, EntryDraw(1, antithetic=pair), totals)

        return run

    table, ids, labels = map(torch.from_numpy, (source.table, source.ids.astype(np.int64), source.labels))
    orders = torch.rand(min(256, samples), FIELDS * COLS).argsort(dim=1)
    part = source.part(0, len(orders))
    ours = fm_marginals(part, EntryDraw(0, antithetic=False), orders.numpy().astype(np.int32))
    theirs = torch_sampler(table, ids[: len(orders)], labels[: len(orders)], orders)
    torch.testing.assert_close(theirs, torch.from_numpy(ours), atol=1e-5, rtol=0)

    def rival() -> None:
        with torch_threads(1):
            for start in range(0, samples, 256):
                some = slice(start, start + 256)
                drawn = torch.rand(len(ids[some]), FIELDS * COLS).argsort(dim=1)
                torch_sampler(table, ids[some], labels[some], drawn)

    calls = {
        "one": call(1, False), "pair": call(1, True), "one, 2 threads": call(2, False), "torch vectorised": rival,
    }  # fmt: skip
    return rates(calls, samples, options.rounds, what)


def deep(options: argparse.Namespace) -> list[Row]:
    samples, rng = 4 if options.quick else 24, np.random.default_rng(1)
    source = data(1000, samples)

    def normal(*shape: int) -> Any:
        return (rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)

    inputs = FIELDS * COLS
    weights = (normal(WIDTH, inputs), normal(WIDTH, WIDTH), normal(WIDTH, WIDTH))
    head = DeepHead(Mlp(weights, (normal(WIDTH), normal(WIDTH), normal(WIDTH)), normal(WIDTH)), pairs=True)
    totals, square = EntryTotals(*source.table.shape), torch.randn(2048, 2048)

    def walk() -> None:
        with torch_threads(1):
            head_shapley(source, EntryDraw(1, antithetic=False), head, totals)

    def product() -> None:
        with torch_threads(1):
            square @ square

    found = rates({"DeepFM": walk, "torch fp32 product": product}, samples, options.rounds, "DeepFM, GFLOP/s")
    work = {"DeepFM": samples * (inputs + 1) * 2.0 * 2 * WIDTH**2, "torch fp32 product": 2.0 * 2048**3}
    for row in found:
        median = (row["microseconds"] or {}).get("median")
        row["gflops"] = None if median is None else work[row["call"]] / median / 1e3
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("shapley", __doc__ or "")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    options.rounds = 3 if options.quick else options.rounds
    run = Run.start("shapley", options)
    samples = 256 if options.quick else 4096
    sizes = (100,) if options.quick else (1000, 28_000)
    rows = [row for size in sizes for row in factorisation_machine(options, size, samples)] + deep(options)
    table = Table("what", "call", "samples/s", "GFLOP/s", title="Shapley walks")
    for row in rows:
        shown = [
            None if row.get(key) is None else f"{row[key]:,.0f}" for key in ("samples_per_second", "gflops")
        ]
        table.add_row(row["what"], row["call"], *shown)
    protocol = {
        "players": FIELDS * COLS,
        "rounds": options.rounds,
        "ids": "zipf 1.1",
        "threads": "1, or as named",
    }
    show(table, path=run.save(protocol, rows))


if __name__ == "__main__":
    main()
