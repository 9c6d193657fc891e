"""What one call from Python costs beyond the kernel: a layer so small that the kernel takes no time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import shapes
import torch
from harness import MIN_CLEAN, Call, Run, Timing, command_line, show, threads_of, time_calls
from rich.table import Table
from torch import Tensor, nn

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, TiledBitmap
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import Spread, torch_threads
from pysparse.nn import DenseLinear, SparseLinear

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad mode": torch.enable_grad,  # nothing here requires a gradient, but the calls must find that out
}
SIZE = 64  # rows and columns: under a microsecond of arithmetic, and too little to wake a second thread
SPARSE_KERNEL, DENSE_KERNEL = "sparse kernel alone", "dense kernel alone"
BASELINES = {  # call -> the bare call of the compiled core that it comes down to
    "ops.bitmap_linear": SPARSE_KERNEL,
    "SparseLinear": SPARSE_KERNEL,
    "torch.ops.pysparse.bitmap_linear": SPARSE_KERNEL,
    "ops.dense_linear": DENSE_KERNEL,
    "DenseLinear": DENSE_KERNEL,
    "nn.Linear": DENSE_KERNEL,  # torch runs a kernel of its own; ours stands in for what it would take
}


def make_calls(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Every way to multiply one token by a 64 x 64 weight, half of it zeros; all are checked to agree."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    weight = (weight * (torch.rand(SIZE, SIZE, generator=generator) < 0.5)).to(dtype)
    x = torch.randn(1, SIZE, generator=generator).to(dtype)
    linear = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(weight)
    tiled = TiledBitmap.from_bitmap(BitmapTensor.from_dense(weight))
    sparse, dense = SparseLinear.from_dense(linear), DenseLinear.from_linear(linear)
    dispatched = torch.ops.pysparse.bitmap_linear.default
    calls = {
        SPARSE_KERNEL: _bare_sparse(x, tiled),
        "ops.bitmap_linear": lambda: ops.bitmap_linear(x, tiled),
        "SparseLinear": lambda: sparse(x),
        "torch.ops.pysparse.bitmap_linear": lambda: dispatched(
            x, tiled.values, tiled.masks, tiled.tile_offsets, None, SIZE
        ),
        DENSE_KERNEL: _bare_dense(x, weight),
        "ops.dense_linear": lambda: ops.dense_linear(x, weight),
        "DenseLinear": lambda: dense(x),
        "nn.Linear": lambda: linear(x),
    }
    for name, call in calls.items():
        torch.testing.assert_close(call(), linear(x), msg=lambda text, name=name: f"{name} is wrong: {text}")
    return calls


def _bare_sparse(x: Tensor, tiled: TiledBitmap) -> Callable[[], Tensor]:
    y = torch.empty(1, SIZE, dtype=x.dtype)
    function = backend.core().bitmap_linear
    arguments = (
        ops.linear._DTYPE_CODES[x.dtype], x.data_ptr(), 1, SIZE, tiled.values.data_ptr(), tiled.values.numel(),
        tiled.masks.data_ptr(), tiled.masks.numel(), tiled.tile_offsets.data_ptr(), tiled.tile_offsets.numel(), 0,
        y.data_ptr(), SIZE,
    )  # fmt: skip

    def call() -> Tensor:
        function(*arguments)
        return y

    return call


def _bare_dense(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    y = torch.empty(1, SIZE, dtype=x.dtype)
    function = backend.core().dense_linear
    arguments = (
        ops.linear._DTYPE_CODES[x.dtype], x.data_ptr(), 1, SIZE, weight.data_ptr(), 0, y.data_ptr(), SIZE
    )  # fmt: skip

    def call() -> Tensor:
        function(*arguments)
        return y

    return call


def beyond(timing: Timing, kernel: Timing) -> Spread | None:
    """Microseconds a call beyond the bare kernel, round by round where both samples are clean."""
    extra = [
        1e6 * (whole - bare)
        for whole, bare in zip(timing.seconds, kernel.seconds, strict=True)
        if whole is not None and bare is not None
    ]
    return Spread.of(extra) if len(extra) >= MIN_CLEAN else None


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dtype_name, dtype in shapes.DTYPES.items():
        with torch.no_grad():
            functions = make_calls(dtype)
        for mode, setting in MODES.items():
            calls = {name: Call(function, setting) for name, function in functions.items()}
            timings = time_calls(calls, options.rounds, options.sample_seconds)
            for name, timing in timings.items():
                extra = beyond(timing, timings[BASELINES[name]]) if name in BASELINES else None
                yield {
                    "dtype": dtype_name, "mode": mode, "call": name, **timing.record(),
                    "microseconds_beyond_kernel": to_jsonable(extra),
                }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    settings = list(dict.fromkeys((row["dtype"], row["mode"]) for row in rows))
    cells = {(row["call"], row["dtype"], row["mode"]): row for row in rows}
    lines = [
        [call, *(_cell(cells[call, *setting]) for setting in settings)]
        for call in dict.fromkeys(row["call"] for row in rows)
    ]
    columns = [f"{SIZE} x {SIZE}, one token", *(f"{dtype} {mode}" for dtype, mode in settings)]
    return make_table("microseconds a call (beyond the kernel)", columns, lines)


def _cell(row: dict[str, Any]) -> str:
    whole, extra = row["microseconds"], row["microseconds_beyond_kernel"]
    if whole is None:
        return "-"
    return f"{whole['median']:.2f}" + (f" (+{extra['median']:.2f})" if extra else "")


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("overhead", __doc__ or "")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--sample-seconds", type=float, default=0.02)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.sample_seconds = 3, 0.001
    this = Run.start("overhead", options)
    with torch_threads(options.threads):
        rows = list(run(options))
        protocol = {
            "threads": threads_of(options),
            "rounds": options.rounds,
            "layer": f"{SIZE} x {SIZE}, half zeros, one token, no bias, in the caches",
            "kernel": "the compiled core called with ready addresses and a ready output",
            "figure": "microseconds a call, mean of some thousand calls a sample, median over rounds",
        }
        path = this.save(protocol, rows)
    show(table(rows), path=path)


if __name__ == "__main__":
    main()
