"""What stands in the way of a faster kernel: memory, or the instructions that it takes on weights in the cache."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bench_int8_nm
import bench_linear
import shapes
import torch
from harness import (
    COLD_BYTES,
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
from rivals import PYSPARSE_DENSE, PYSPARSE_SPARSE, READ_PROBE, Engine, Storage
from rivals.pysparse_int8 import PYSPARSE_INT8
from rivals.pysparse_nm import nm_engines
from torch import Tensor

from pysparse import ops
from pysparse.formats import BitmapTensor, ColumnPairs, TiledBitmap
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads

SHAPE = "4096x4096"
QUICK_SHAPE = "2048x2048"
CACHED = (
    512,
    2048,
)  # rows and columns of the part that stays in two cores' second-level caches: 1.2 MB at 50 %
GEMM_SIZE = 1024  # of the square product that shows how fast this machine multiplies
REAL_MASKS = ("wanda", "sparsegpt")
CELL_WEIGHTS = 32  # of a 16 x 2 cell of the tiled bitmap
ONE_TO_FOUR = nm_engines(1, 4)[0]


def _pairs(weight: Tensor) -> ColumnPairs:
    return ColumnPairs.from_tiled(TiledBitmap.from_bitmap(BitmapTensor.from_dense(weight)))


PAIRS = Engine(
    "pysparse pairs",
    Storage("pairs", _pairs, lambda packed: packed.nbytes),
    lambda p, x: ops.pairs_linear(x, p),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A kernel at work: what it multiplies of a weight tells how long the dots alone must take."""

    engine: Engine
    zeros: str  # as in bench_int8_nm: "70%" or "1:4"
    tokens: int
    skips_zeros: bool = False
    dtype: str = "bf16"


RANDOM = tuple(f"{round(100 * s)}%" for s in shapes.SPARSITIES)
SUBJECTS = (
    Subject(PYSPARSE_DENSE, "50%", 1),
    *(Subject(PYSPARSE_SPARSE, zeros, tokens) for tokens in (1, 4, 16) for zeros in RANDOM),
    *(Subject(PAIRS, zeros, 16, skips_zeros=True) for zeros in RANDOM),
    *(Subject(PYSPARSE_INT8, zeros, 1) for zeros in RANDOM),
    Subject(ONE_TO_FOUR, "1:4", 1, skips_zeros=True),
    *(Subject(PAIRS, zeros, 256, skips_zeros=True, dtype="fp32") for zeros in RANDOM),
)


def measure(subject: Subject, shape: str, rounds: int, working_set: int) -> dict[str, Any]:
    """Time a kernel on cold and on cached weights, beside a read of memory and a dense product; a JSON-ready row."""
    dtype = shapes.DTYPES[subject.dtype]
    weight = bench_int8_nm.make_weight(bench_int8_nm.Case(shape, subject.zeros, subject.tokens)).to(dtype)
    engine, pack, dense = subject.engine, subject.engine.storage.pack, weight[:GEMM_SIZE, :GEMM_SIZE].clone()
    cold = cold_copies(lambda: pack(weight), engine.storage.nbytes, working_set)
    read = cold_copies(lambda: READ_PROBE.storage.pack(weight), READ_PROBE.storage.nbytes, working_set)
    part, tile = weight[: CACHED[0], : CACHED[1]].clone(), weight[:16, :64].clone()
    cached, one_tile = pack(part), pack(tile)
    x = torch.randn(subject.tokens, weight.shape[1]).to(dtype)
    x_part, x_tile = (x[:, : one.shape[1]].contiguous() for one in (part, tile))
    timings = time_calls(
        {
            "cold": Call(lambda: engine.multiply(cold.take(), x)),
            "cached": Call(lambda: engine.multiply(cached, x_part)),
            "call": Call(lambda: engine.multiply(one_tile, x_tile)),  # what any call costs
            "read": Call(lambda: READ_PROBE.multiply(read.take(), None)),
            "gemm": Call(lambda: dense @ dense),
        },
        rounds,
        sample_seconds=0.004,
    )
    return {
        "shape": shape, "kernel": engine.name, "dtype": subject.dtype, "zeros": subject.zeros, "tokens": subject.tokens,
        **_limits(subject, weight, engine.storage.nbytes(cold.take()), timings),
        "timings": {name: timing.record() for name, timing in timings.items()},
    }  # fmt: skip


def _limits(subject: Subject, weight: Tensor, nbytes: int, timings: dict[str, Timing]) -> dict[str, Any]:
    spreads = {name: timing.spread() for name, timing in timings.items()}
    us = {name: spread.median for name, spread in spreads.items() if spread is not None}
    if len(us) < len(timings):  # too few clean samples of one of them
        return {"bytes": nbytes}
    products = subject.tokens * (int(weight.count_nonzero()) if subject.skips_zeros else weight.numel())
    cached = (us["cached"] - us["call"]) * weight.numel() / (CACHED[0] * CACHED[1])
    figures = {
        "measured_us": us["cold"],
        "memory_us": nbytes * us["read"] / weight.nbytes,
        "instructions_us": cached,
        "dots_us": us["gemm"] * products / GEMM_SIZE**3,
    }
    return {
        "bytes": nbytes,
        **figures,
        "read_gigabytes_per_second": weight.nbytes / us["read"] / 1e3,
        "gemm_gigaflop_per_second": 2e-3 * GEMM_SIZE**3 / us["gemm"],
        "thread_ns_per_cell": 1e3 * cached * torch.get_num_threads() * CELL_WEIGHTS / weight.numel(),
        "limit": max(("memory", "instructions"), key=lambda name: figures[f"{name}_us"]),
        "reached": max(figures["memory_us"], cached, figures["dots_us"]) / us["cold"],
    }


def compare_masks(sparsity: float, rounds: int, working_set: int) -> dict[str, Any]:
    """Time one token on uniform zeros and on two methods' in turn: what uneven rows and columns cost the kernel."""
    copies: dict[str, Rotation[Any]] = {}
    for mask in ("random", *REAL_MASKS):
        weight = bench_linear.make_weight(bench_linear.Case(SHAPE, "bf16", sparsity, mask, 1))
        storage = PYSPARSE_SPARSE.storage
        copies[mask] = cold_copies(lambda w=weight, s=storage: s.pack(w), storage.nbytes, working_set)
    dense = cold_copies(
        lambda: PYSPARSE_DENSE.storage.pack(weight), PYSPARSE_DENSE.storage.nbytes, working_set
    )
    x = torch.randn(1, weight.shape[1]).bfloat16()
    calls = {
        mask: Call(lambda r=rotation: PYSPARSE_SPARSE.multiply(r.take(), x))
        for mask, rotation in copies.items()
    }
    calls["dense"] = Call(lambda: PYSPARSE_DENSE.multiply(dense.take(), x))
    timings = time_calls(calls, rounds)
    return {
        "shape": SHAPE, "kernel": PYSPARSE_SPARSE.name, "sparsity": sparsity, "tokens": 1,
        "over_random": {
            mask: to_jsonable(timings[mask].speedup_over(timings["random"])) for mask in REAL_MASKS
        },
        "over_dense": {mask: to_jsonable(timings[mask].speedup_over(timings["dense"])) for mask in copies},
        "timings": {name: timing.record() for name, timing in timings.items()},
    }  # fmt: skip


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    names = (
        "measured_us",
        "memory_us",
        "instructions_us",
        "dots_us",
        "limit",
        "reached",
        "thread_ns_per_cell",
    )
    lines = [
        [f"{row['kernel']}, {row['dtype']}", row["zeros"], row["tokens"], *(row.get(name) for name in names)]
        for row in rows
        if "zeros" in row
    ]
    columns = [
        "kernel",
        "zeros",
        "tokens",
        "us",
        "memory us",
        "cached us",
        "dots us",
        "limit",
        "reached",
        "ns a cell",
    ]
    yield make_table(
        f"{rows[0]['shape']}: measured time beside what memory, instructions and dots alone take",
        columns,
        lines,
    )
    masks = []
    for row in (row for row in rows if "sparsity" in row):
        ratios = (*row["over_random"].values(), *row["over_dense"].values())
        masks.append([f"{row['sparsity']:.0%}", *(one and one["median"] for one in ratios)])
    columns = ["zeros", *(f"{mask} x random zeros" for mask in REAL_MASKS)]
    columns += [f"{mask} x dense" for mask in ("random", *REAL_MASKS)]
    yield make_table("one token, zeros where methods put them", columns, masks)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("limits", __doc__ or "")
    parser.add_argument(
        "--mask-sparsity", nargs="*", type=float, default=[0.5, 0.7, 0.9], help="of the real masks"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", choices=shapes.DTYPES, default=["bf16", "fp32"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    this = Run.start("limits", options)
    working_set = 0 if options.quick else COLD_BYTES
    subjects = [s for s in SUBJECTS if s.dtype in options.dtypes]
    subjects = [s for s in subjects if s.zeros in ("70%", "1:4") or not options.quick]
    rounds, shape = (3, QUICK_SHAPE) if options.quick else (options.rounds, SHAPE)
    with torch_threads(options.threads), torch.no_grad():
        rows = [measure(subject, shape, rounds, working_set) for subject in subjects]
        rows += [
            compare_masks(s, rounds, working_set) for s in ([] if options.quick else options.mask_sparsity)
        ]
        protocol = {
            "threads": threads_of(options),
            "rounds": rounds,
            "order": "round robin, turned every round",
            "weights": f"measured_us: cold, copies of over {COLD_BYTES / 1e6:.0f} MB in turn",
            "memory_us": "bytes at the speed of the read probe, torch's sum of 64-bit integers over cold dense weights",
            "instructions_us": f"{CACHED[0]} x {CACHED[1]} cached weights, less a call on one tile, scaled to all",
            "dots_us": f"products at the rate of torch's {GEMM_SIZE}^3 product of that dtype; zeros too unless skipped",
        }
        path = this.save(protocol, rows)
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
