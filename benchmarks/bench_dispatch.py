"""Never slower: random layers as ``sparsify_`` makes them, beside every dense and sparse way by itself."""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import shapes
import torch
from harness import MIN_CLEAN, Rotation, Run, cold_copies, command_line, show, threads_of
from torch import Tensor, nn
from torch.nn import functional

from pysparse import ops, sparsify_
from pysparse.formats import BitmapTensor, TiledBitmap
from pysparse.measure.machine import last_level_cache_bytes
from pysparse.measure.results import make_table
from pysparse.measure.rounds import round_robin, torch_threads
from pysparse.measure.twins import zero_rows_at_random_
from pysparse.nn import SparseLinear
from pysparse.nn.dispatch import Dispatch
from pysparse.ops import cost_cache
from pysparse.ops.ways import BITMAP, SECOND, WAYS

SIDES = (768, 1024, 2048, 3072, 4096, 5632, 8192, 11008)  # of published models' layers
TOKENS = (1, 4096)  # from, to; as likely below as above their geometric mean
MOST_ZEROS = 0.95
WORK = 2**33  # weights times tokens, at most: bounds a case to some tenths of a second
COLD = (
    2 * last_level_cache_bytes()
)  # bytes of an engine's copies; those of the other engines come between too
MOST_COPIES = 64
SAMPLE_SECONDS = 0.002  # short: the more samples, the likelier that one had the cores for itself
HOPELESS = 1.6  # times the fastest after two rounds: not timed further, it cannot be the best
WITHIN = 1.03  # of the better of dense and sparse
SERIES = 3  # of rounds, at most: a case beyond WITHIN is timed longer before it counts as such
CHOSEN, DEFAULT, LINEAR = "chosen", "default", "nn.Linear"


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


def make_linear(case: Case) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(case.out_features, case.in_features, dtype=shapes.DTYPES[case.dtype])
    weight.normal_(0.0, 0.02, generator=generator)
    zero_rows_at_random_(weight, case.sparsity, generator)
    linear = nn.Linear(case.in_features, case.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def converted(linear: nn.Linear, optimize: str, x: Tensor) -> tuple[nn.Module, str]:
    """The layer that ``sparsify_`` makes, with what a first call adds to it, and the way it takes."""
    model = nn.Sequential(linear)
    sparsify_(model, optimize=optimize)
    layer: Any = model[0]
    layer(x)
    if hasattr(layer, "choice"):
        return layer, layer.choice(len(x)).way
    return layer, f"kept dense: {'kernel' if len(x) in layer.kernel_tokens() else 'torch'}"


def engines(case: Case, x: Tensor) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What is timed, each over cold copies of its weight, and the ways of the two layers.

    A way by itself runs on the copies of the layer that takes it: where memory lies makes several percent.
    """
    linear = make_linear(case)
    tiled = TiledBitmap.from_bitmap(BitmapTensor.from_dense(linear.weight))
    copies, calls, ways = {}, {}, {}
    for name, optimize in ((CHOSEN, "speed"), (DEFAULT, "balanced")):
        layer, ways[name] = converted(linear, optimize, x)
        if ways[name] not in copies:
            copies[ways[name]] = cold(layer, read_by(ways[name], layer))
        calls[name] = caller(copies[ways[name]], lambda layer: layer(x))
    for way in (name for name, one in WAYS.items() if one.packing in (BITMAP, *SECOND)):
        name = LINEAR if way == "torch" else way
        own = copies.get(way, copies.get(f"kept dense: {way}"))
        if own is not None:
            calls[name] = caller(own, partial(alone, way, x))
        elif way == "torch":
            calls[name] = caller(cold(linear, linear.weight.nbytes), lambda layer: layer(x))
        elif WAYS[way].takes(len(x)):
            held = Alone(way, Dispatch(), tiled)
            held(x)  # makes the packing
            calls[name] = caller(cold(held, held.dispatch.nbytes or tiled.nbytes), lambda held: held(x))
    return calls, ways


def alone(way: str, x: Tensor, layer: Any) -> Tensor:
    """Compute by ``way`` on what a layer holds, without the layer."""
    if isinstance(layer, SparseLinear):
        return layer._dispatch.run(way, x, layer._tiled(), None)
    return (functional.linear if way == "torch" else ops.dense_linear)(x, layer.weight)


@dataclass
class Alone:
    """One way of computing, without a layer around it."""

    way: str
    dispatch: Dispatch
    weight: TiledBitmap

    def __call__(self, x: Tensor) -> Tensor:
        return self.dispatch.run(self.way, x, self.weight, None)


def read_by(way: str, layer: Any) -> int:
    """Bytes of the weight that a call of a layer reads."""
    if not hasattr(layer, "second_packing_nbytes"):
        return int(layer.weight.nbytes)
    second = int(layer.second_packing_nbytes)
    return layer.nbytes - second if way in ("bitmap", "unpack") else second


def cold(engine: Any, nbytes: int) -> Rotation[Any]:
    """Copies that take turns, so that no weight lies in the cache from the last call."""
    least = min(COLD, nbytes * MOST_COPIES)
    return cold_copies(lambda: copy.deepcopy(engine), lambda _: nbytes, least)


def caller(copies: Rotation[Any], run: Callable[[Any], object]) -> Callable[[], object]:
    return lambda: run(copies.take())


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time the two layers and each way by itself; a JSON-ready row."""
    x = torch.randn(case.tokens, case.in_features, generator=torch.Generator().manual_seed(1))
    x = x.to(shapes.DTYPES[case.dtype])
    calls, ways = engines(case, x)
    fastest = dict.fromkeys(calls, float("inf"))
    lower(fastest, calls, 2)
    limit = HOPELESS * min(fastest.values())
    hopeful = {name: call for name, call in calls.items() if fastest[name] <= limit or name == CHOSEN}
    series = 0
    while series < SERIES:
        lower(fastest, hopeful, rounds)
        series += 1
        best = min((name for name in fastest if name not in (CHOSEN, DEFAULT)), key=fastest.__getitem__)
        if fastest[CHOSEN] <= WITHIN * fastest[best]:
            break
    return {
        **asdict(case),
        "way": ways[CHOSEN],
        "default_way": ways[DEFAULT],
        "best": best,
        "series": series,
        "microseconds": {name: 1e6 * seconds for name, seconds in fastest.items()},
        "chosen_over_best": fastest[CHOSEN] / fastest[best],  # 1.03: the choice takes 3 % longer
        "default_over_dense": fastest[DEFAULT] / min(fastest[LINEAR], fastest.get("kernel", float("inf"))),
    }


def lower(fastest: dict[str, float], calls: dict[str, Callable[[], object]], rounds: int) -> None:
    """Lower ``fastest`` (seconds a call) to the fastest of interleaved rounds.

    Two ways within 3 % of each other cannot be told apart by medians while anything else runs; other programs
    only ever add to a time, so the fastest of enough rounds can.
    """

    def sampler(name: str, call: Callable[[], object]) -> Callable[[], float]:
        count = max(1, round(SAMPLE_SECONDS / fastest[name])) if fastest[name] < 1 else 1

        def sample() -> float:
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) / count

        return sample

    run = round_robin({name: sampler(name, call) for name, call in calls.items()}, rounds, warmup=0)
    for name, seconds in run.results.items():
        fastest[name] = min(fastest[name], *seconds)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the choice was within 3 % of the best."""
    ratios = sorted(row["chosen_over_best"] for row in rows)
    good = sum(ratio <= WITHIN for ratio in ratios)
    times = [row["microseconds"] for row in rows]
    dense = [min(one[LINEAR], one.get("kernel", float("inf"))) for one in times]
    return {
        "cases": len(rows),
        "within_3_percent": good,
        "fraction": good / len(ratios) if ratios else None,
        "within_6_percent": sum(ratio <= 1.06 for ratio in ratios),
        "worst": ratios[-1] if ratios else None,
        "slower_than_dense_by_3_percent": sum(
            one[CHOSEN] > WITHIN * other for one, other in zip(times, dense, strict=True)
        ),
        "default_slower_than_dense_by_3_percent": sum(row["default_over_dense"] > WITHIN for row in rows),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("dispatch", __doc__ or "")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument(
        "--skip", type=int, default=0, help="cases of the same draw that another run measured"
    )
    parser.add_argument("--dtype", nargs="+", choices=shapes.DTYPES, default=list(shapes.DTYPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=8, help="in a series; a case has up to three")
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
        for dtype in () if options.quick else options.dtype:
            cost_cache.costs_for(shapes.DTYPES[dtype])  # measured now, if ever, and not within a case
        for case in draw(options.cases, options.dtype, sides, options.seed)[options.skip :]:
            if time.monotonic() - start > options.seconds:
                break
            rows.append(measure(case, options.rounds))
        path = this.save(protocol(options, sides, rows), rows)
    totals = summary(rows)
    show(
        make_table(
            'the way that sparsify_(optimize="speed") takes beside the best',
            ["what", "figure"],
            [[k, v] for k, v in totals.items()],
            caption='default_...: sparsify_() as it comes, optimize="balanced"',
        ),
        path=path,
    )


def protocol(
    options: argparse.Namespace, sides: tuple[int, ...], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "threads": threads_of(options),
        "rounds": options.rounds,
        "series": f"up to {SERIES} where the chosen way is beyond 3 % of the best, all engines again",
        "seed": options.seed,
        "first_case": options.skip,
        "sample": f"sides {sides}, tokens {TOKENS} log-uniform, sparsity 0 to {MOST_ZEROS} uniform, "
        f"rows x columns x tokens up to {WORK}",
        "chosen": 'the layer of sparsify_(optimize="speed")',
        "default": "the layer of sparsify_()",
        "best": "the least of nn.Linear, our dense kernel, decode kernel, unpacking and pair kernel",
        "weights": f"cold: copies of {COLD / 1e6:.0f} MB together, at most {MOST_COPIES}, for each engine; "
        "a layer and its way by itself share theirs",
        "figure": "microseconds a call: the fastest of interleaved rounds",
        "summary": summary(rows),
    }


if __name__ == "__main__":
    main()
