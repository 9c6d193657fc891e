"""One linear layer beside everything else that computes it on a CPU: dense, quantised and sparse, cached and cold."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import shapes
import torch
from harness import (
    COLD_BYTES,
    WAIT_LIMIT,
    Call,
    Run,
    Timing,
    cold_copies,
    command_line,
    show,
    threads_of,
    time_calls,
)
from rich.table import Table
from rivals import ENGINES, PYSPARSE_SPARSE, READ_PROBE, Engine
from rivals.isolated import IsolatedEngine, Remote, isolated_engines
from rivals.peak_probe import peak_gigaflops
from rivals.pysparse_int8 import PYSPARSE_INT8
from rivals.torch_int4 import TORCH_INT4
from rivals.torch_int8_dynamic import TORCH_INT8
from torch import Tensor

from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.measure.twins import zero_rows_at_random_

OURS = (PYSPARSE_SPARSE, PYSPARSE_INT8)
IN_PROCESS = (*ENGINES.values(), PYSPARSE_INT8, TORCH_INT8, TORCH_INT4)
# Norm of the error over that of the exact product. int4 has no exact zero: the sparser, the more of them move.
ERROR_BOUND = {TORCH_INT4.name: 0.3, TORCH_INT8.name: 0.05, PYSPARSE_INT8.name: 0.025}
ERROR_BOUND_FLOATS = 0.01


@dataclass(frozen=True, slots=True)
class Case:
    """One bf16 weight, number of tokens, and whether the weight is still in the caches when it is read again."""

    shape: str  # a key of shapes.LINEAR
    sparsity: float
    tokens: int
    cached: bool


@dataclass(frozen=True, slots=True)
class Entrant:
    """An engine ready to be timed, with what it holds."""

    call: Call
    nbytes: int
    copies: int
    error: float | None


def make_weight(shape: str, sparsity: float) -> Tensor:
    """Random numbers that bf16 can hold, zeros at random: every engine gets the same ones."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(*shapes.LINEAR[shape], generator=generator) * 0.02).bfloat16()
    zero_rows_at_random_(weight, sparsity, generator)
    return weight


def relative_error(name: str, actual: Tensor, weight: Tensor, x: Tensor, bound: float) -> float:
    """Norm of the error over that of the exact product; RuntimeError when a wrong answer would be timed."""
    expected = x.double() @ weight.double().T
    error = float((actual.double() - expected).norm() / expected.norm())
    if not error <= bound:
        raise RuntimeError(f"{name} is wrong by {error:.3g} of the product, over {bound}")
    return error


def enter_ours(engine: Engine, weight: Tensor, x: Tensor, working_set: int) -> Entrant:
    """An engine of this process, its copies made and its answer checked."""
    storage = engine.storage
    copies = cold_copies(lambda: storage.pack(weight), storage.nbytes, working_set)
    prepared = engine.prepare(x)
    call = Call(lambda: engine.multiply(copies.take(), prepared), engine.setting)
    error = None
    if engine.finish is not None:
        with engine.setting():
            answer = engine.finish(call.function())
        error = relative_error(
            engine.name, answer, weight, x, ERROR_BOUND.get(engine.name, ERROR_BOUND_FLOATS)
        )
    return Entrant(call, storage.nbytes(copies.take()), len(copies), error)


def enter_remote(engine: IsolatedEngine, remote: Remote, weight: Tensor, x: Tensor) -> Entrant:
    error = relative_error(engine.name, remote.answer, weight, x, engine.error_bound)
    return Entrant(Call(int, remote=remote.sample), remote.nbytes, remote.copies, error)


def measure(
    case: Case, weight: Tensor, present: list[IsolatedEngine], options: argparse.Namespace
) -> dict[str, Any]:
    """Check every engine, then time all of them in the same rounds; a JSON-ready row."""
    x = torch.randn(case.tokens, weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    working_set, threads = (0 if case.cached else COLD_BYTES), threads_of(options)
    with ExitStack() as workers:
        entrants = {engine.name: enter_ours(engine, weight, x, working_set) for engine in IN_PROCESS}
        for engine in present:
            remote = workers.enter_context(engine.start(weight, x, threads, working_set))
            entrants[engine.name] = enter_remote(engine, remote, weight, x)
        calls = {name: entrant.call for name, entrant in entrants.items()}
        timings = time_calls(calls, options.rounds, options.sample_seconds)
    nnz = int(torch.count_nonzero(weight))
    return {
        **asdict(case),
        "zeros": 1.0 - nnz / weight.numel(),
        "engines": {
            name: figures(entrants[name], one, nnz * case.tokens) for name, one in timings.items()
        },
        "speedup_of": {
            ours.name: {name: to_jsonable(timings[ours.name].speedup_over(one)) for name, one in timings.items()}
            for ours in OURS
        },
    }  # fmt: skip


def figures(entrant: Entrant, timing: Timing, pairs: int) -> dict[str, Any]:
    """What one engine took, moved and computed; ``pairs`` counts the multiplications that the kept weights ask for."""
    spread = timing.spread()
    rate = entrant.nbytes / spread.median / 1e3 if spread else None
    return {
        **timing.record(),
        "bytes": entrant.nbytes,  # of the weight; activations are a thousandth of it
        "copies": entrant.copies,
        "gigabytes_per_second": rate,
        "useful_gigaflop_per_second": 2 * pairs / spread.median / 1e3 if spread else None,
        "error": entrant.error,
    }


def computed(row: dict[str, Any], missing: dict[str, str], engines: list[IsolatedEngine]) -> dict[str, Any]:
    """Times of engines that are not installed but whose layout is public: its bytes at the read probe's speed.

    No engine can read its weight faster, so such a time flatters the engine.
    """
    rate = row["engines"][READ_PROBE.name]["gigabytes_per_second"]
    found = {}
    for engine in engines:
        nbytes = engine.bytes_of(*shapes.LINEAR[row["shape"]])
        if engine.name in missing and nbytes and rate:
            found[engine.name] = {"bytes": nbytes, "microseconds": nbytes / rate / 1e3}
    return found


def run(
    options: argparse.Namespace, engines: list[IsolatedEngine], missing: dict[str, str]
) -> list[dict[str, Any]]:
    rows = []
    present = [engine for engine in engines if engine.name not in missing]
    for shape in options.shape:
        for sparsity in options.sparsity:
            weight = make_weight(shape, sparsity)
            for tokens in options.tokens:
                for state in options.caches:
                    row = measure(Case(shape, sparsity, tokens, state == "cached"), weight, present, options)
                    rows.append({**row, "computed": computed(row, missing, engines)})
    return rows


def tables(
    rows: list[dict[str, Any]], missing: dict[str, str], peak: dict[str, float | None]
) -> Iterator[Table]:
    """One table a case: a line an engine, those that are missing with the reason."""
    columns = ["engine", "us", "p10..p90", "MB", "GB/s", "of read", "useful GFLOP/s", "error",
               *(f"x {ours.name}" for ours in OURS)]  # fmt: skip
    limits = ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in peak.items() if value)
    reasons = [f"{name}: {reason}" for name, reason in missing.items()]
    caption = "\n".join([f"measured peak: {limits or 'no C++ compiler'}", *reasons])
    for row in rows:
        read = row["engines"][READ_PROBE.name]["gigabytes_per_second"]
        lines = [_line(row, name, read) for name in row["engines"]]
        for name in missing:
            guess = row["computed"].get(name)
            time = f"{guess['microseconds']:.0f} computed" if guess else "not there"
            lines.append([name, time, *[None] * (len(columns) - 2)])
        state = "cached" if row["cached"] else "cold"
        title = f"{row['shape']}, {row['sparsity']:.0%} zeros, tokens: {row['tokens']}, {state}"
        yield make_table(title, columns, lines, caption=caption)


def _line(row: dict[str, Any], name: str, read: float | None) -> list[Any]:
    one = row["engines"][name]
    spread, rate = one["microseconds"], one["gigabytes_per_second"]
    speedups = [row["speedup_of"][ours.name][name] for ours in OURS]
    return [
        name,
        spread and spread["median"],
        spread and f"{spread['p10']:.0f}..{spread['p90']:.0f}",
        one["bytes"] / 1e6,
        rate,
        rate and read and f"{rate / read:.0%}",
        one["useful_gigaflop_per_second"],
        None if one["error"] is None else f"{one['error']:.1e}",
        *(speedup and speedup["median"] for speedup in speedups),
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("rivals", __doc__ or "")
    parser.add_argument("--shape", nargs="+", choices=shapes.LINEAR, default=("4096x4096", "11008x4096"))
    parser.add_argument("--sparsity", nargs="+", type=float, default=(0.5, 0.7, 0.9))
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 16))
    parser.add_argument("--caches", nargs="+", choices=("cold", "cached"), default=("cold", "cached"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sample-seconds", type=float, default=0.008, help="calls of one sample fill this")
    parser.add_argument("--without", nargs="+", default=(), help="names of rivals to leave out")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.sparsity, options.tokens, options.rounds = ["2048x2048"], [0.7], [1], 3
        options.caches, options.sample_seconds = ["cached"], 0.0003
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    this = Run.start("rivals", options)
    engines = isolated_engines()
    probes = {engine.name: engine.probe() for engine in engines if engine.name not in options.without}
    missing = {engine.name: probes.get(engine.name, ("left out", {}))[0] for engine in engines}
    missing = {name: why for name, why in missing.items() if why}
    with torch_threads(options.threads), torch.no_grad():
        peak = {dtype: peak_gigaflops(dtype, threads_of(options)) for dtype in ("fp32", "bf16")}
        rows = run(options, engines, missing)
        protocol = {
            "threads": threads_of(options),
            "rounds": options.rounds,
            "order": "round robin, turned every round; some engines in processes of their own that wait for their turn",
            "figure": "microseconds a call: median, p10, p90 over samples of some calls; speed-ups round by round",
            "weights": f"random bf16; cold: copies of over {COLD_BYTES / 1e6:.0f} MB in turn; cached: one copy",
            "dropped": f"samples whose threads waited for a core for more than {WAIT_LIMIT:.0%} of the time",
            "checked": "every engine against a float64 product, once, before the timing",
            "missing": missing,
            "computed": "bytes of a missing engine's layout at the read probe's speed",
            "peak_gigaflop_per_second": peak,
            "versions": {name: versions for name, (_, versions) in probes.items() if versions},
        }
        path = this.save(protocol, rows)
    show(*tables(rows, missing, peak), path=path)


if __name__ == "__main__":
    main()
