"""Sparse products of others beside cuBLAS and ours on a GPU: checked, then timed on cold weights; one JSON out.

    PYSPARSE_EXPERIMENTAL=1 python benchmarks/bench_cuda_peers.py --out OUT/cuda_peers.json \\
        [--flash-llm LIBRARY] [--spinfer LIBRARY]

float16, which all of them take. The libraries are those that ``nvcc -shared`` makes of each project's SpMM_API.cu;
MACKO is used where its package is installed, cuSPARSELt where torch has it. Who is not there is listed with the reason.
Each call walks through copies of its weight that exceed the second-level cache four times, in a CUDA graph where the
peer's calls can be captured (said by "graph"); of Flash-LLM's and SpInfer's numbers of parts the fastest counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_cuda import REPLAYS, capture, copies_of, error_of, random_weight
from cuda_run import Run
from rivals.cuda_peers import PEERS, Missing, Packed
from torch import Tensor
from torch.nn import functional

from pysparse import ops
from pysparse.formats import PACKINGS, BitmapTensor
from pysparse.ops.cuda import arrays, sizes

SHAPES = ["11008x4096", "4096x11008", "8192x28672"]
SPARSITIES: list[float | None] = [0.5, 0.7, 0.9, None]  # None: two of four
TOKENS = [1, 8, 16]
MOST_ERROR = 1e-2  # of float16 sums: peers that round partial sums to 16 bits pass too
Calls = list[Callable[[Tensor], Tensor]]


def ours(name: str, weight: Tensor) -> Packed:
    """Hold ``weight`` as one of our packings."""
    packed = PACKINGS[name].from_bitmap(BitmapTensor.from_dense(weight))
    held, constants, shape = arrays(packed), sizes(packed), packed.shape
    return Packed(packed.nbytes, {1: lambda x: ops.call_arrays(name, x, held, None, shape, constants)})


def cublas(weight: Tensor) -> Packed:
    """Hold ``weight`` densely."""
    held = weight.clone()
    return Packed(held.nbytes, {1: lambda x: functional.linear(x, held)})


def makers(sparsity: float | None, libraries: dict[str, str | None]) -> dict[str, Callable[[Tensor], Packed]]:
    """Return who takes part at ``sparsity``: packings for two of four only where there are two of four."""
    names = ("pair",) if sparsity is None else ("delta", "fragment")
    found: dict[str, Callable[[Tensor], Packed]] = {"cublas": cublas}
    found |= {f"pysparse-{name}": lambda w, name=name: ours(name, w) for name in names}
    peers = [name for name in PEERS if (name == "cusparselt") == (sparsity is None)]
    return found | {name: lambda w, name=name: PEERS[name](w, libraries.get(name)) for name in peers}


def one_by_one(calls: list[Callable[[], Tensor]]) -> None:
    """Make the calls, one after the other."""
    for call in calls:
        call()


def timed(calls: Calls, x: Tensor) -> tuple[float, bool]:
    """Return the median microseconds of a call, and whether it was captured in a graph."""
    every = [lambda call=call: call(x) for call in calls]
    every[0]()
    torch.cuda.synchronize()
    try:
        replay, captured = capture(every).replay, True
    except RuntimeError:  # a peer that allocates or waits cannot be captured
        torch.cuda.synchronize()
        replay, captured = (lambda: one_by_one(every)), False
    replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(every))
    return sorted(times)[len(times) // 2], captured


def one(name: str, maker: Callable[[Tensor], Packed], weight: Tensor, tokens: int) -> dict[str, Any]:
    """Check and time one participant."""
    x = torch.randn(tokens, weight.shape[1], device="cuda").half()
    first = maker(weight)
    copies = [first, *(maker(weight) for _ in range(copies_of(first.nbytes) - 1))]
    error = max(error_of(call(x), x, weight) for call in first.calls.values())
    best = min((*timed([copy.calls[parts] for copy in copies], x), parts) for parts in first.calls)
    return {
        "kernel": name, "tokens": tokens, "microseconds": round(best[0], 3), "graph": best[1], "parts": best[2],
        "bytes": first.nbytes, "gigabytes_per_second": round(first.nbytes / best[0] / 1000, 1), "error": error,
    }  # fmt: skip


def case(text: str, sparsity: float | None, libraries: dict[str, str | None], report: dict[str, Any]) -> str:
    """Add the rows of all participants on one weight, ratios over cuBLAS, and who is missing."""
    rows, cols = (int(n) for n in text.split("x"))
    weight = random_weight(rows, cols, sparsity, 5).half()
    missed = 0
    for tokens in TOKENS:
        dense = 0.0
        for name, maker in makers(sparsity, libraries).items():
            place = {"rows": rows, "cols": cols, "sparsity": sparsity or "2:4"}
            try:
                row = one(name, maker, weight, tokens)
            except Missing as missing:
                report["rows"].append(place | {"kernel": name, "tokens": tokens, "missing": str(missing)})
                missed += 1
                continue
            dense = dense or row["microseconds"]
            report["rows"].append(place | row | {"ratio": round(dense / row["microseconds"], 3)})
            if not row["error"] < MOST_ERROR:
                print(f"WRONG: {report['rows'][-1]}")
                if name.startswith("pysparse"):
                    report["wrong"].append(f"{name} {text} {sparsity or '2:4'} {tokens}")
        torch.cuda.empty_cache()
    return f"{missed} not here"


def main() -> int:
    """Measure and write the report; 1 when one of ours was wrong or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flash-llm")
    parser.add_argument("--spinfer")
    parser.add_argument("--quick", action="store_true", help="one shape, 70 %% and 2:4")
    options = parser.parse_args()
    libraries = {"flash-llm": options.flash_llm, "spinfer": options.spinfer}
    run = Run.start(options.out)
    for text in SHAPES[:1] if options.quick else SHAPES:
        for sparsity in [0.7, None] if options.quick else SPARSITIES:
            part = lambda text=text, sparsity=sparsity: case(text, sparsity, libraries, run.report)  # noqa: E731
            run.part(f"{text}_{sparsity or '2:4'}", part)
    return run.close()


if __name__ == "__main__":
    raise SystemExit(main())
