"""Shapley walks over embedding tables: rates, pairs, threads, dense products, a torch sampler, captum, peak memory."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Call, Run, command_line, show, time_calls
from rich.table import Table
from rivals.peak_probe import peak_gigaflops
from shapley_peers import (
    TorchTotals,
    captum_calls,
    orders_of,
    peak_bytes,
    torch_keys,
    torch_sampler,
    variance_ratio,
)

from pysparse.measure.results import to_jsonable
from pysparse.measure.rounds import Spread, torch_threads
from pysparse.ops import (
    DeepHead,
    EntryDraw,
    EntrySamples,
    EntryTotals,
    Mlp,
    draw_permutations,
    draw_words,
    fm_marginals,
    fm_shapley,
    head_shapley,
)

FIELDS, COLS = 39, 16  # Criteo's fields, the papers' width: 624 players
WIDTH = 400  # of the three hidden layers
TORCH_BATCH, WORD_CALLS = 256, 16
PARTS = ("fm", "limits", "deep", "captum", "memory")
Row = dict[str, Any]


def data(rows_of_field: int, samples: int) -> EntrySamples:
    rng = np.random.default_rng(0)
    table = (0.05 * rng.normal(size=(FIELDS * rows_of_field, COLS))).astype(np.float32)
    values = np.minimum(rng.zipf(1.1, size=(samples, FIELDS)) - 1, rows_of_field - 1)
    ids = (values + np.arange(FIELDS) * rows_of_field).astype(np.int32)
    labels = rng.integers(0, 2, samples).astype(np.float32)
    return EntrySamples(table, np.zeros((FIELDS, COLS), np.float32), ids, labels)


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


def walking(
    source: EntrySamples, totals: EntryTotals, draw: EntryDraw, threads: int = 1
) -> Callable[[], None]:
    def run() -> None:
        with torch_threads(threads):
            fm_shapley(source, draw, totals)

    return run


def torch_rival(source: EntrySamples, pair: bool) -> Callable[[], None]:
    """Return torch's sampler over all samples, 256 at a time (its best), with the sums that ours makes."""
    table, ids, labels = map(torch.from_numpy, (source.table, source.ids.astype(np.int64), source.labels))
    keys = torch_keys(min(TORCH_BATCH, len(ids)), FIELDS, COLS)
    part = source.part(0, len(keys))
    ours = fm_marginals(part, EntryDraw(0, antithetic=pair), orders_of(keys))
    theirs = torch_sampler(table, ids[: len(keys)], labels[: len(keys)], keys, pair).transpose(1, 2)
    torch.testing.assert_close(theirs.flatten(1), torch.from_numpy(ours), atol=1e-5, rtol=0)
    totals = TorchTotals(table)

    def run() -> None:
        with torch_threads(1):
            for start in range(0, len(ids), TORCH_BATCH):
                some = slice(start, start + TORCH_BATCH)
                keys = torch_keys(len(ids[some]), FIELDS, COLS)
                totals.add(ids[some], torch_sampler(table, ids[some], labels[some], keys, pair))

    return run


def factorisation_machine(options: argparse.Namespace, rows_of_field: int, samples: int) -> list[Row]:
    source = data(rows_of_field, samples)
    totals, rows = EntryTotals(*source.table.shape), EntryTotals(len(source.table), 1)
    one, pair = EntryDraw(1, antithetic=False), EntryDraw(1)
    calls = {
        "one": walking(source, totals, one), "pair": walking(source, totals, pair),
        "one, 2 threads": walking(source, totals, one, 2),
        "rows as players, pair": walking(source, rows, EntryDraw(1, players="field")),
        "torch vectorised": torch_rival(source, False), "torch vectorised, pair": torch_rival(source, True),
    }  # fmt: skip
    found = rates(calls, samples, options.rounds, f"FM, table of {len(source.table)} rows")
    by_name = {row["call"]: row["microseconds"] for row in found}
    ours, theirs = by_name["pair"], by_name["torch vectorised, pair"]
    found[1]["at_equal_error"] = None if None in (ours, theirs) else theirs["median"] / ours["median"]
    return found


def limits(options: argparse.Namespace) -> list[Row]:
    """Take memory, then walks, then sharing away: what of a permutation's time is left, and what two cores give.

    "one row a field" has all samples read the same 39 rows, so that table and totals stay in the first caches.
    "orders alone" draws and shuffles and does nothing with it. "two apart" are two threads with samples and totals of
    their own that never meet, "words" the same of Philox words that no memory is needed for; what these two lose to
    one thread alone is the machine's.
    """
    samples = 256 if options.quick else 4096
    source, near = data(1000, samples), data(1, samples)
    one = EntryDraw(1, antithetic=False)

    def orders() -> None:
        with torch_threads(1):
            draw_permutations(1, 0, samples, FIELDS * COLS)

    def words() -> None:
        for _ in range(WORD_CALLS):
            draw_words(1, 0, 4, 4096)

    def totals(of: EntrySamples) -> EntryTotals:
        return EntryTotals(*of.table.shape)

    calls = {
        "one": walking(source, totals(source), one),
        "one, one row a field": walking(near, totals(near), one),
        "orders alone": orders,
        "one, 2 threads": walking(source, totals(source), one, 2),
        "one, one row a field, 2 threads": walking(near, totals(near), one, 2),
    }
    found = rates(calls, samples, options.rounds, "limits")
    apart: dict[str, list[Callable[[], None]]] = {
        "one": [walking(source.part(0, samples), totals(source), one) for _ in range(2)],
        "one row a field": [walking(near.part(0, samples), totals(near), one) for _ in range(2)],
        "words": [words, words],
    }
    with torch_threads(1):
        for name, both in apart.items():
            gains = [
                own_rate(both, 0.02 if options.quick else 0.2)
                / own_rate(both[:1], 0.02 if options.quick else 0.2)
                for _ in range(options.rounds)
            ]
            spread = Spread.of(gains)
            found.append({"what": "limits", "call": f"{name}, two apart over one", "samples": samples,
                          "two_over_one": to_jsonable(spread)})  # fmt: skip
    return found


def own_rate(calls: list[Callable[[], None]], seconds: float) -> float:
    """Calls a second of threads that run at once, by the clocks of their own: waits for a core do not count."""
    found = [0.0] * len(calls)
    start = threading.Barrier(len(calls))

    def work(index: int) -> None:
        torch.set_num_threads(1)  # of this thread
        calls[index]()
        start.wait()
        begin, until, count = time.thread_time(), time.perf_counter() + seconds, 0
        while time.perf_counter() < until:
            calls[index]()
            count += 1
        found[index] = count / (time.thread_time() - begin)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(found)


def beside_captum(options: argparse.Namespace) -> list[Row]:
    """Time captum's sampling of single inputs and of a batch, one permutation each, beside ours.

    At equal standard error our pair counts as often as the variance of its mean is smaller than one order's. captum's
    batch shares one permutation, which its error of a mean over samples would pay for; this is not counted.
    """
    source = data(100 if options.quick else 1000, 256)
    theirs = captum_calls(source)
    if not theirs:
        return [{"what": "captum", "call": "captum is not installed: pip install captum", "samples": 0}]
    totals = EntryTotals(*source.table.shape)

    def ours() -> None:
        with torch_threads(1):
            fm_shapley(source, EntryDraw(1, antithetic=True), totals)

    def alone(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch_threads(1):
                call()

        return run

    calls = {"pair": ours, **{name: alone(call) for name, (call, _) in theirs.items()}}
    rows = rates(calls, len(source.ids), 3, "captum, 1 thread")
    worth = variance_ratio(source, samples=16, draws=8 if options.quick else 64)
    rate = rows[0]["samples_per_second"]
    for row in rows[1:]:
        row["samples"] = theirs[row["call"]][1]
        median = (row["microseconds"] or {}).get("median")
        row["samples_per_second"] = None if median is None else row["samples"] * 1e6 / median
        row["pair_is_faster_by"] = None if None in (rate, median) else rate / row["samples_per_second"]
        row["at_equal_error"] = None if median is None or rate is None else row["pair_is_faster_by"] * worth
        del row["first_is_faster_by"]
    rows[0]["orders_a_pair_is_worth"] = worth
    return rows


def memory(options: argparse.Namespace) -> list[Row]:
    """Measure the peak of processes that make few and many passes over the same samples."""
    few, many = 1, 4 if options.quick else 16
    peaks = [peak_bytes(passes) for passes in (few, many)]
    return [
        {"what": "peak memory", "call": f"{many} passes beside {few}", "samples": 2048, "bytes": peaks,
         "more_bytes": peaks[1] / peaks[0]}
    ]  # fmt: skip


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
    mine, product = (row["gflops"] for row in found)
    found[0]["of_product"] = None if None in (mine, product) else mine / product
    peak = peak_gigaflops("fp32", 1)
    found[0] |= {"peak_gflops": peak, "of_peak": None if None in (mine, peak) else mine / peak}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("shapley", __doc__ or "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(arguments)
    options.rounds = 3 if options.quick else options.rounds
    run = Run.start("shapley", options)
    samples = 256 if options.quick else 4096
    sizes = (100,) if options.quick else (1000, 28_000)
    parts: dict[str, Callable[[], list[Row]]] = {
        "fm": lambda: [row for size in sizes for row in factorisation_machine(options, size, samples)],
        "limits": lambda: limits(options), "deep": lambda: deep(options),
        "captum": lambda: beside_captum(options), "memory": lambda: memory(options),
    }  # fmt: skip
    rows = [row for part in PARTS if part in options.only for row in parts[part]()]
    table = Table(
        "what",
        "call",
        "samples/s",
        "GFLOP/s",
        "x at equal error",
        "x memory",
        "2 over 1",
        title="Shapley walks",
    )
    for row in rows:
        keys = ("samples_per_second", "gflops", "at_equal_error")
        shown = [None if row.get(key) is None else f"{row[key]:,.0f}" for key in keys]
        shown.append(f"{row['more_bytes']:.3f}" if "more_bytes" in row else None)
        gain = row.get("two_over_one")
        table.add_row(row["what"], row["call"], *shown, None if gain is None else f"{gain['median']:.2f}")
    protocol = {
        "players": FIELDS * COLS,
        "rounds": options.rounds,
        "ids": "zipf 1.1",
        "threads": "1, or as named",
    }
    show(table, path=run.save(protocol, rows))


if __name__ == "__main__":
    main()
