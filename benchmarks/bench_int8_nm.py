"""int8 values and n:m patterns, a few tokens, cold weights: beside torch's bf16, int8 and int4 and our dense kernel."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import shapes
import torch
from harness import (
    COLD_BYTES,
    WAIT_LIMIT,
    Call,
    Rotation,
    Run,
    Timing,
    cold_copies,
    command_line,
    show,
    threads_of,
    time_calls,
)
from rich.table import Table
from rivals import PYSPARSE_DENSE, PYSPARSE_SPARSE, TORCH, TORCH_TUNED, Engine
from rivals.pysparse_int8 import PYSPARSE_INT8, PYSPARSE_INT8_A16, PYSPARSE_INT8_G128
from rivals.pysparse_nm import nm_engines
from rivals.torch_int4 import TORCH_INT4
from rivals.torch_int8_dynamic import TORCH_INT8
from torch import Tensor

from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.measure.twins import zero_rows_at_random_

PATTERNS = ("2:4", "4:8", "1:4", "2:8", "1:8", "2:16")
BASELINES = (TORCH, TORCH_TUNED, PYSPARSE_DENSE, TORCH_INT8, TORCH_INT4)
OURS = (PYSPARSE_SPARSE, PYSPARSE_INT8, PYSPARSE_INT8_A16, PYSPARSE_INT8_G128)
# Norm of the error over that of the exact product; int8 rounds little, bf16 hardly. int4 has no exact zero, so
# the sparser the weight, the more of its error are zeros that it moves.
ERROR_BOUND = {TORCH_INT4.name: 0.3, TORCH_INT8.name: 0.05}
ERROR_BOUND_OURS = 0.025


@dataclass(frozen=True, slots=True)
class Case:
    """One weight and number of tokens."""

    shape: str  # a key of shapes.LINEAR
    zeros: str  # "70%" at random, or "2:4"
    tokens: int


def make_weight(case: Case) -> Tensor:
    """A random bf16 weight [out, in] with the case's zeros."""
    rows, cols = shapes.LINEAR[case.shape]
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(rows, cols, generator=generator) * 0.02).bfloat16()
    if case.zeros.endswith("%"):
        zero_rows_at_random_(weight, float(case.zeros[:-1]) / 100, generator)
        return weight
    n, m = map(int, case.zeros.split(":"))
    scores = torch.rand(rows, cols // m, m, generator=generator)
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(2, scores.topk(n, dim=2).indices, False)
    weight.unflatten(1, (-1, m)).masked_fill_(dropped, 0)
    return weight


def engines_of(case: Case) -> list[Engine]:
    if case.zeros.endswith("%"):
        return [*BASELINES, *OURS]
    return [*BASELINES, *OURS, *nm_engines(*map(int, case.zeros.split(":")))]


def make_copies(engines: list[Engine], weight: Tensor, working_set: int) -> dict[str, Rotation[Any]]:
    storages = {engine.storage.name: engine.storage for engine in engines}
    return {
        name: cold_copies(lambda s=storage: s.pack(weight), storage.nbytes, working_set)
        for name, storage in storages.items()
    }


def make_call(engine: Engine, copies: Rotation[Any], x: Tensor) -> Call:
    prepared, multiply, take = engine.prepare(x), engine.multiply, copies.take
    return Call(lambda: multiply(take(), prepared), engine.setting)


def error_of(engine: Engine, call: Call, weight: Tensor, x: Tensor) -> float:
    """Norm of the error over that of the exact product; RuntimeError when a wrong answer would be timed."""
    expected = x.double() @ weight.double().T
    with engine.setting():
        actual = call.function().double()
    error = float((actual - expected).norm() / expected.norm())
    bound = ERROR_BOUND.get(engine.name, ERROR_BOUND_OURS)
    if not error <= bound:
        raise RuntimeError(f"{engine.name} is wrong by {error:.3g} of the product, over {bound}")
    return error


def measure(case: Case, weight: Tensor, copies: dict[str, Rotation[Any]], rounds: int) -> dict[str, Any]:
    """Check and time every engine on one case; a JSON-ready row."""
    x = torch.randn(case.tokens, weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    engines = {engine.name: engine for engine in engines_of(case)}
    calls = {name: make_call(one, copies[one.storage.name], x) for name, one in engines.items()}
    errors = {name: error_of(engines[name], call, weight, x) for name, call in calls.items()}
    timings = time_calls(calls, rounds, sample_seconds=0.004)
    baselines = [engine.name for engine in BASELINES]
    return {
        **asdict(case),
        "engines": {
            name: _figures(one, copies[one.storage.name], timings[name], errors[name])
            for name, one in engines.items()
        },
        "speedup": {
            name: {base: to_jsonable(timings[name].speedup_over(timings[base])) for base in baselines}
            for name in engines
            if name not in baselines
        },
    }


def _figures(engine: Engine, copies: Rotation[Any], timing: Timing, error: float) -> dict[str, Any]:
    nbytes, spread = engine.storage.nbytes(copies.take()), timing.spread()
    return {
        **timing.record(),
        "bytes": nbytes,
        "copies": len(copies),
        "gigabytes_per_second": nbytes / spread.median / 1e3 if spread else None,
        "error": error,
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for shape in options.shape:
        for zeros in options.zeros:
            copies: dict[str, Rotation[Any]] = {}  # frees the last weight's before the next are made
            weight = make_weight(Case(shape, zeros, 1))
            engines = engines_of(Case(shape, zeros, 1))
            copies = make_copies(engines, weight, 0 if options.quick else COLD_BYTES)
            rows += [measure(Case(shape, zeros, t), weight, copies, options.rounds) for t in options.tokens]
    return rows


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """One table per shape and number of tokens: a line per kind of zeros and engine of ours."""
    columns = ["zeros", "engine", "us", "GB/s", "error", *(f"x {engine.name}" for engine in BASELINES)]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["tokens"]), []).append(row)
    for (shape, tokens), group in groups.items():
        lines = [_line(row, name) for row in group for name in row["speedup"]]
        yield make_table(f"{shape}, tokens: {tokens}; ours and their speed-ups", columns, lines)


def _line(row: dict[str, Any], name: str) -> list[Any]:
    one, speedups = row["engines"][name], row["speedup"][name]
    spread = one["microseconds"]
    ratios = (speedups[engine.name] for engine in BASELINES)
    return [
        row["zeros"], name, spread and spread["median"], one["gigabytes_per_second"], one["error"],
        *(ratio and ratio["median"] for ratio in ratios),
    ]  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("int8_nm", __doc__ or "")
    every = [f"{round(100 * s)}%" for s in shapes.SPARSITIES] + list(PATTERNS)
    parser.add_argument("--shape", nargs="+", choices=shapes.LINEAR, default=shapes.DECODE_SHAPES)
    parser.add_argument("--zeros", nargs="+", choices=every, default=every)
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 16))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.zeros, options.rounds = ["2048x2048"], ["50%", "2:4"], 3
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    this = Run.start("int8_nm", options)
    with torch_threads(options.threads), torch.no_grad():
        rows = run(options)
        protocol = {
            "threads": threads_of(options),
            "threads_bound": os.environ.get("OMP_PROC_BIND", "no"),
            "rounds": options.rounds,
            "order": "round robin, turned every round",
            "figure": "microseconds a call: median, p10, p90 over samples of some calls; speed-ups round by round",
            "weights": f"cold: copies of over {COLD_BYTES / 1e6:.0f} MB in turn",
            "dropped": f"samples whose threads waited for a core for more than {WAIT_LIMIT:.0%} of the time",
            "checked": "every engine against a float64 product of the pruned weight, once, before the timing",
        }
        path = this.save(protocol, rows)
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
