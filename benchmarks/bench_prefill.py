"""One linear layer, 64 to 4096 tokens: every way to compute it, and the one that the layer chooses."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import shapes
import torch
from harness import MIN_CLEAN, WAIT_LIMIT, Call, Run, Timing, command_line, show, threads_of, time_calls
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from pysparse import ops, sparsify_
from pysparse.formats import BitmapTensor, ColumnPairs, TiledBitmap
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.measure.twins import zero_rows_at_random_
from pysparse.nn import SparseLinear

TORCH, OPENBLAS, CHOSEN = "torch", "OpenBLAS", "chosen"
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}  # of the largest output
TOKENS = (64, 256)
LONG = ("4096x4096", 0.7, (1024, 4096))  # a long prompt or a batch of them: one shape and sparsity
SHAPES = shapes.DECODE_SHAPES
DECODE_LIMIT = 64  # tokens beyond which the decode kernel is not worth timing
# Of the pair kernel over torch, at 50, 60, 70, 80 and 90 % zeros: (dtype, tokens, columns above 4096) -> speed-ups.
TARGETS = {
    ("bf16", 16, False): (2.6, 2.6, 2.8, 3.4, 4.5),
    ("bf16", 16, True): (2.6, 2.6, 2.8, 3.4, 4.5),
    ("bf16", 64, False): (1.2, 1.5, 2.0, 2.8, 4.5),
    ("bf16", 64, True): (1.2, 1.5, 2.0, 2.8, 4.5),
    ("bf16", 256, False): (1.0, 1.05, 1.6, 2.1, 3.5),  # 1.0: the dense product is chosen
    ("bf16", 256, True): (1.0, 1.0, 1.35, 1.7, 2.8),
    ("fp32", 256, False): (2.8, 3.3, 4.2, 6.0, 8.0),
    ("fp32", 256, True): (2.8, 3.3, 4.2, 6.0, 8.0),
}


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight in every form that a way of computing reads."""

    dense: Tensor
    tiled: TiledBitmap
    pairs: ColumnPairs
    layer: nn.Module  # as sparsify_(optimize="speed") makes it

    @classmethod
    def make(cls, shape: str, dtype: str, sparsity: float) -> Weight:
        generator = torch.Generator().manual_seed(0)
        dense = (torch.randn(*shapes.LINEAR[shape], generator=generator) * 0.02).to(shapes.DTYPES[dtype])
        zero_rows_at_random_(dense, sparsity, generator)
        linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(dense, requires_grad=False)
        tiled = TiledBitmap.from_bitmap(BitmapTensor.from_dense(dense))
        model = nn.Sequential(linear)
        sparsify_(model, optimize="speed")
        return cls(dense, tiled, ColumnPairs.from_tiled(tiled), model[0])

    def calls(self, x: Tensor) -> dict[str, Call]:
        calls = {
            TORCH: Call(lambda: functional.linear(x, self.dense)),
            "bitmap": Call(lambda: ops.bitmap_linear_chunks(x, self.tiled)),
            "pairs": Call(lambda: ops.pairs_linear(x, self.pairs)),
            CHOSEN: Call(lambda: self.layer(x)),
        }
        if len(x) > DECODE_LIMIT:
            del calls["bitmap"]
        if (
            x.dtype == torch.float32
        ):  # numpy's: on some processors much faster than the library that torch calls
            entry, transposed = x.numpy(), self.dense.numpy().T
            calls[OPENBLAS] = Call(lambda: torch.from_numpy(entry @ transposed))
        return calls

    def way(self, tokens: int) -> str:
        layer = self.layer
        return layer.choice(tokens).way if isinstance(layer, SparseLinear) else "kept dense"


def check(name: str, call: Call, weight: Tensor, x: Tensor) -> float:
    """The largest error over the largest output; RuntimeError when a wrong answer would be timed."""
    expected = x[-8:].double() @ weight.double().T
    error = float((call.function()[-8:].double() - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE[weight.dtype]:
        raise RuntimeError(f"{name} is wrong by {error:.3g} of the largest output")
    return error


def measure(
    shape: str, dtype: str, sparsity: float, tokens: int, weight: Weight, rounds: int
) -> dict[str, Any]:
    """Check and time every way of one case; a JSON-ready row."""
    x = torch.randn(tokens, weight.dense.shape[1], generator=torch.Generator().manual_seed(1))
    x = x.to(weight.dense.dtype)
    calls = weight.calls(x)
    errors = {name: check(name, call, weight.dense, x) for name, call in calls.items()}
    timings = time_calls(calls, rounds)
    return {
        "shape": shape, "dtype": dtype, "sparsity": sparsity, "tokens": tokens, "way": weight.way(tokens),
        "target": target(dtype, tokens, weight.dense.shape[1], sparsity),
        "layer_bytes": getattr(weight.layer, "nbytes", weight.dense.nbytes),
        "dense_bytes": weight.dense.nbytes, "pairs_bytes": weight.pairs.nbytes,
        "ways": {name: _figures(timing, weight, tokens, errors[name]) for name, timing in timings.items()},
        "speedup_over_torch": {
            name: to_jsonable(timing.speedup_over(timings[TORCH]))
            for name, timing in timings.items()
            if name != TORCH
        },
    }  # fmt: skip


def target(dtype: str, tokens: int, cols: int, sparsity: float) -> float | None:
    """The speed-up over torch that this case shall show, where one is set."""
    targets = TARGETS.get((dtype, tokens, cols > 4096))
    return targets[shapes.SPARSITIES.index(sparsity)] if targets and sparsity in shapes.SPARSITIES else None


def _figures(timing: Timing, weight: Weight, tokens: int, error: float) -> dict[str, Any]:
    spread = timing.spread()
    useful = 2 * weight.tiled.nnz * tokens  # multiplications and additions that the stored weights ask for
    rate = useful / spread.median / 1e3 if spread else None
    return {**timing.record(), "useful_gigaflop_per_second": rate, "error": error}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shape in options.shape:
        for dtype in options.dtype:
            for sparsity in options.sparsity:
                weight = Weight.make(shape, dtype, sparsity)
                more = LONG[2] if (shape, sparsity) == LONG[:2] and options.long else ()
                for tokens in (*options.tokens, *more):
                    rounds = options.rounds if tokens <= max(TOKENS) else MIN_CLEAN
                    rows.append(measure(shape, dtype, sparsity, tokens, weight, rounds))
    return rows


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """One table per shape, dtype and number of tokens, a line per sparsity."""
    ways = [OPENBLAS, "bitmap", "pairs", CHOSEN]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["dtype"], row["tokens"]), []).append(row)
    for (shape, dtype, tokens), group in groups.items():
        columns = ["zeros", "torch us", *(f"{way} x" for way in ways), "target", "way"]
        lines = []
        for row in group:
            torch_us = row["ways"][TORCH]["microseconds"]
            speedups = [row["speedup_over_torch"].get(way) for way in ways]
            figures = [one and one["median"] for one in speedups]
            head = [f"{row['sparsity']:.0%}", torch_us and torch_us["median"]]
            lines.append([*head, *figures, row["target"], row["way"]])
        yield make_table(
            f"{shape} {dtype}, {tokens} tokens: speed-up over torch's dense product", columns, lines
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("prefill", __doc__ or "")
    parser.add_argument("--shape", nargs="+", choices=shapes.LINEAR, default=SHAPES)
    parser.add_argument("--dtype", nargs="+", choices=shapes.DTYPES, default=list(shapes.DTYPES))
    parser.add_argument("--sparsity", nargs="+", type=float, default=shapes.SPARSITIES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-long", dest="long", action="store_false", help="nothing of more tokens beside")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.sparsity, options.tokens, options.rounds = (
            [shapes.QUICK_SHAPE],
            [0.5, 0.9],
            [20, 70],
            3,
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    this = Run.start("prefill", options)
    with torch_threads(options.threads), torch.no_grad():
        rows = run(options)
        protocol = {
            "threads": threads_of(options),
            "rounds": options.rounds,
            "order": "round robin, turned every round",
            "figure": "microseconds a call: median, p10, p90; speed-ups round by round",
            "chosen": 'the layer of sparsify_(optimize="speed")',
            "OpenBLAS": "numpy's dense fp32 product, the best one here that needs no further package",
            "weights": "one copy; its second packing is made before the timing",
            "dropped": f"samples whose threads waited for a core for more than {WAIT_LIMIT:.0%} of the time",
            "checked": "every way against a float64 product, once, before the timing",
        }
        path = this.save(protocol, rows)
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
