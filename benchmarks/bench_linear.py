"""One linear layer, a few tokens, cold weights: our sparse kernel beside every dense and sparse rival."""

from __future__ import annotations

import argparse
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
    restart_for_isa,
    show,
    threads_of,
    time_calls,
)
from real_masks import tiled_mask
from rich.table import Table
from rivals import ENGINES, PYSPARSE_DENSE, PYSPARSE_SPARSE, READ_PROBE, TORCH, TORCH_TUNED, Engine, Storage
from torch import Tensor

from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.measure.twins import zero_rows_at_random_

TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}  # of the largest output; ours and all rivals'
Copies = dict[Storage, Rotation[Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """One weight and number of tokens."""

    shape: str  # a key of shapes.LINEAR
    dtype: str  # a key of shapes.DTYPES
    sparsity: float
    mask: str  # "random" | "wanda" | "sparsegpt"
    tokens: int


def make_weight(case: Case, seed: int = 0) -> Tensor:
    """A random weight [out, in] with the case's zeros."""
    rows, cols = shapes.LINEAR[case.shape]
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, cols, generator=generator) * 0.02).to(shapes.DTYPES[case.dtype])
    if case.mask == "random":
        zero_rows_at_random_(weight, case.sparsity, generator)
        return weight
    return weight.mul_(tiled_mask(case.shape, (rows, cols), case.sparsity, case.mask))


def make_copies(weight: Tensor, working_set: int) -> Copies:
    """Every storage's rotation of cold copies of ``weight``."""
    return {
        storage: cold_copies(lambda s=storage: s.pack(weight), storage.nbytes, working_set)
        for storage in dict.fromkeys(engine.storage for engine in ENGINES.values())
    }


def make_call(engine: Engine, copies: Rotation[Any], x: Tensor) -> Call:
    prepared, multiply, take = engine.prepare(x), engine.multiply, copies.take
    return Call(lambda: multiply(take(), prepared), engine.setting)


def check(engine: Engine, call: Call, weight: Tensor, x: Tensor) -> float | None:
    """The engine's largest error over the largest output; RuntimeError when a wrong answer would be timed."""
    if engine.finish is None:
        return None
    expected = x.double() @ weight.double().T
    with engine.setting():
        actual = engine.finish(call.function()).double()
    error, bound = float((actual - expected).abs().max() / expected.abs().max()), TOLERANCE[weight.dtype]
    if not error <= bound:
        raise RuntimeError(f"{engine.name} is wrong by {error:.3g} of the largest output, over {bound}")
    return error


def measure(case: Case, weight: Tensor, copies: Copies, options: argparse.Namespace) -> dict[str, Any]:
    """Check and time every engine on one case; a JSON-ready row."""
    x = torch.randn(case.tokens, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    calls = {name: make_call(engine, copies[engine.storage], x) for name, engine in ENGINES.items()}
    errors = {name: check(ENGINES[name], call, weight, x) for name, call in calls.items()}
    timings = time_calls(calls, options.rounds, options.sample_seconds)
    ours = timings[PYSPARSE_SPARSE.name]
    dense = timings[PYSPARSE_DENSE.name]
    engines = {name: _figures(ENGINES[name], copies, one, errors[name]) for name, one in timings.items()}
    return {
        **asdict(case),
        "zeros": 1.0 - int(torch.count_nonzero(weight)) / weight.numel(),
        "byte_limit": engines[PYSPARSE_DENSE.name]["bytes"] / engines[PYSPARSE_SPARSE.name]["bytes"],
        "engines": engines,
        "sparse_speedup_over": {
            name: to_jsonable(ours.speedup_over(one)) for name, one in timings.items() if one is not ours
        },
        "dense_kernel_speedup_over": {  # of the read probe: the share of the memory's speed that it reaches
            name: to_jsonable(dense.speedup_over(timings[name]))
            for name in (TORCH.name, TORCH_TUNED.name, READ_PROBE.name)
        },
    }


def _figures(engine: Engine, copies: Copies, timing: Timing, error: float | None) -> dict[str, Any]:
    rotation = copies[engine.storage]
    nbytes, spread = engine.storage.nbytes(rotation.take()), timing.spread()
    return {
        **timing.record(),
        "bytes": nbytes,  # of the weight; activations are a thousandth of it
        "copies": len(rotation),
        "gigabytes_per_second": nbytes / spread.median / 1e3 if spread else None,
        "error": error,
    }


def cases(options: argparse.Namespace) -> Iterator[tuple[Case, bool]]:
    """Every case, and whether its weight is another than the one before."""
    for shape in options.shape:
        for dtype in options.dtype:
            for sparsity in options.sparsity:
                for index, tokens in enumerate(options.tokens):
                    yield Case(shape, dtype, sparsity, options.mask, tokens), index == 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    working_set = 0 if options.hot or options.quick else COLD_BYTES
    for case, is_new in cases(options):
        if is_new:
            copies: Copies = {}  # frees the last weight's before the next are made
            weight = make_weight(case)
            copies = make_copies(weight, working_set)
        rows.append(measure(case, weight, copies, options))
    return rows


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """One table per shape, dtype and number of tokens, a line per sparsity."""
    groups: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["dtype"], row["tokens"], row["mask"]), []).append(row)
    rivals = [name for name in ENGINES if name not in (PYSPARSE_SPARSE.name, READ_PROBE.name)]
    speedups = [f"x {name}" for name in rivals]
    columns = ["zeros", "sparse us", "p10..p90", "GB/s", *speedups, "byte limit", "read GB/s"]
    for (shape, dtype, tokens, mask), group in groups.items():
        title = f"{shape} {dtype}, tokens: {tokens}, {mask} zeros; the sparse kernel and its speed-ups"
        yield make_table(title, columns, [_line(row, rivals) for row in group])


def _line(row: dict[str, Any], rivals: list[str]) -> list[Any]:
    ours, spread = row["engines"][PYSPARSE_SPARSE.name], row["engines"][PYSPARSE_SPARSE.name]["microseconds"]
    speedups = [row["sparse_speedup_over"][name] for name in rivals]
    return [
        f"{row['sparsity']:.0%}",
        spread and spread["median"],
        spread and f"{spread['p10']:.0f}..{spread['p90']:.0f}",
        ours["gigabytes_per_second"],
        *(one and one["median"] for one in speedups),
        row["byte_limit"],
        row["engines"][READ_PROBE.name]["gigabytes_per_second"],
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("linear", __doc__ or "")
    parser.add_argument("--shape", nargs="+", choices=shapes.LINEAR, default=shapes.DECODE_SHAPES)
    parser.add_argument("--dtype", nargs="+", choices=shapes.DTYPES, default=list(shapes.DTYPES))
    parser.add_argument("--sparsity", nargs="+", type=float, default=shapes.SPARSITIES)
    parser.add_argument("--tokens", nargs="+", type=int, default=shapes.TOKENS)
    parser.add_argument(
        "--mask", choices=("random", "wanda", "sparsegpt"), default="random", help="where the zeros are"
    )
    parser.add_argument("--hot", action="store_true", help="one copy a weight: cached where it fits")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sample-seconds", type=float, default=0.008, help="calls of one sample fill this")
    parser.add_argument(
        "--isa", choices=("avx2",), help="force this level on our kernels, torch and oneDNN alike"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.sparsity = [shapes.QUICK_SHAPE], [0.5, 0.9]
        options.tokens, options.rounds, options.sample_seconds = [1, 4], 3, 0.0003
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    restart_for_isa(options.isa)
    this = Run.start("linear", options)
    with torch_threads(options.threads), torch.no_grad():
        rows = run(options)
        cold = f"cold: copies of over {COLD_BYTES / 1e6:.0f} MB in turn"
        protocol = {
            "threads": threads_of(options),
            "isa": options.isa or "as the machine has",
            "rounds": options.rounds,
            "sample_seconds": options.sample_seconds,
            "order": "round robin, turned every round",
            "figure": "microseconds a call: median, p10, p90 over samples of some calls; speed-ups round by round",
            "weights": "hot: one copy" if options.hot else cold,
            "dropped": f"samples whose threads waited for a core for more than {WAIT_LIMIT:.0%} of the time",
            "checked": "every engine against a float64 product, once, before the timing",
        }
        path = this.save(protocol, rows)
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
