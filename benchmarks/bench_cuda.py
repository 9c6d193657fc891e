"""CUDA kernels against cuBLAS: checked, then timed in one interleaved run, cold weights, medians; one JSON out.

    PYSPARSE_EXPERIMENTAL=1 python benchmarks/bench_cuda.py --out benchmarks/results/cuda_h200.json

Every figure is the median over replays of a CUDA graph that walks through so many copies of the weight that they
are four times the second-level cache; dense and sparse graphs of one shape and token count take turns.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_run import MOST_ERROR, Run
from torch import Tensor
from torch.nn import functional

from pysparse import ops
from pysparse.formats import PACKINGS, BitmapTensor
from pysparse.formats.device import keeps_pairs
from pysparse.models.cuda_engines import random_keep
from pysparse.ops.cuda import Packing, arrays, sizes

SHAPES = [(1024, 4096), (4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (8192, 28672)]
SPARSITIES = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
TOKENS = [1, 2, 4, 8, 16, 32, 64]
PATTERNS = ["1:4", "2:8", "4:8", "1:16"]
PATTERN_SHAPES = [(11008, 4096), (4096, 11008), (8192, 28672)]
PATTERN_TOKENS = 8  # beyond, the kernel that they are measured for does not go
REPLAYS = 15
CACHES = 4  # the copies of a weight exceed the second-level cache so many times
SHORTEST_US = 150  # of a graph, so that the two events around it do not count


@dataclass
class Row:
    """One kernel on one shape: time, bandwidth, ratio to cuBLAS, distance to float64."""

    kernel: str
    rows: int
    cols: int
    sparsity: float
    pattern: str  # "n:m" of weights drawn for the nm kernel, whichever kernel runs on them; else ""
    tokens: int
    microseconds: float
    p10: float
    p90: float
    bytes: int
    gigabytes_per_second: float
    ratio: float  # dense microseconds / these
    error: float  # norm of the difference to float64 over its norm
    read_share: float = 0.0  # of the rate at which this GPU reads memory


def random_weight(rows: int, cols: int, sparsity: float | None, seed: int) -> Tensor:
    """Return a normal bf16 weight; unstructured zeros, or 2:4 for sparsity None."""
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(rows, cols, device="cuda", generator=generator) * 0.02
    keep = random_keep(rows, cols, sparsity, seed + (1 << 20), weight.device)
    return (weight * keep).bfloat16()


def pattern_weight(rows: int, cols: int, n: int, m: int, seed: int) -> Tensor:
    """Return a normal bf16 weight that keeps ``n`` of every ``m`` columns."""
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(rows, cols // m, m, device="cuda", generator=generator) * 0.02
    order = torch.rand(rows, cols // m, m, device="cuda", generator=generator).argsort(dim=2)
    return weight.scatter_(2, order[..., n:], 0).view(rows, cols).bfloat16()


def copies_of(size: int) -> int:
    """Return how many copies of ``size`` bytes exceed the cache ``CACHES`` times."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-CACHES * cache // size) + 1)


def error_of(result: Tensor, x: Tensor, weight: Tensor) -> float:
    """Return the relative distance to the float64 product."""
    exact = x.double() @ weight.double().T
    return float((result.double() - exact).norm() / exact.norm())


def capture(calls: list[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph:
    """Return a graph that makes the calls one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


@dataclass
class Candidate:
    """A kernel with enough copies of its weight, ready to be timed."""

    kernel: str
    sparsity: float
    size: int
    calls: list[Callable[[Tensor], Tensor]]
    weight: Tensor  # dense, for the check
    pattern: str = ""


def dense_candidate(weight: Tensor) -> Candidate:
    """Return torch's own product (cuBLAS)."""
    size = weight.numel() * 2
    copies = [weight.clone() for _ in range(copies_of(size))]
    calls = [lambda x, w=w: functional.linear(x, w) for w in copies]
    return Candidate("cublas", 0.0, size, calls, weight)


def packed_candidate(
    name: str, weight: Tensor, bitmap: BitmapTensor, sparsity: float, pattern: str = ""
) -> Candidate:
    """Return one of our kernels on ``weight``."""
    packing: Packing = PACKINGS[name].from_bitmap(bitmap)
    base, constants = arrays(packing), sizes(packing)
    copies = [tuple(t.clone() for t in base) for _ in range(copies_of(packing.nbytes))]
    shape = packing.shape
    calls = [lambda x, a=a: ops.call_arrays(name, x, a, None, shape, constants) for a in copies]
    return Candidate(name, sparsity, packing.nbytes, calls, weight, pattern)


def candidates(
    shape: tuple[int, int], sparsities: list[float], patterns: list[str], seed: int
) -> Iterator[Candidate]:
    """Yield cuBLAS first, then each kernel at each sparsity, then those that can hold each pattern n:m."""
    yield dense_candidate(random_weight(*shape, 0.0, seed))
    for sparsity in sparsities:
        weight = random_weight(*shape, sparsity, seed + 1)
        bitmap = host(BitmapTensor.from_dense(weight))
        for name in ("delta", "fragment"):
            yield packed_candidate(name, weight, on_device(bitmap), sparsity)
    weight = random_weight(*shape, None, seed + 2)
    yield packed_candidate("pair", weight, BitmapTensor.from_dense(weight), 0.5)
    for i, pattern in enumerate(patterns if shape in PATTERN_SHAPES else []):
        n, m = (int(number) for number in pattern.split(":"))
        weight = pattern_weight(*shape, n, m, seed + 3 + i)
        bitmap = host(BitmapTensor.from_dense(weight))
        for name in ("nm", "delta", *(("pair",) if keeps_pairs(bitmap) else ())):
            yield packed_candidate(name, weight, on_device(bitmap), 1 - n / m, pattern)


def host(bitmap: BitmapTensor) -> BitmapTensor:
    """Return the bitmap on the CPU, where the packers run."""
    return BitmapTensor(bitmap.values.cpu(), bitmap.bitmask.cpu(), bitmap.row_offsets.cpu(), bitmap.shape)


def on_device(bitmap: BitmapTensor) -> BitmapTensor:
    """Return the bitmap on the GPU, so that its packing ends there."""
    arrays = (t.cuda() for t in (bitmap.values, bitmap.bitmask, bitmap.row_offsets))
    return BitmapTensor(*arrays, bitmap.shape)


def time_interleaved(graphs: list[torch.cuda.CUDAGraph], calls: list[int]) -> list[list[float]]:
    """Return microseconds per call of each graph: REPLAYS rounds, each graph once a round."""
    times: list[list[float]] = [[] for _ in graphs]
    for graph in graphs:
        graph.replay()
    for _ in range(REPLAYS):
        marks = []
        for graph in graphs:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        for i, (start, end) in enumerate(marks):
            times[i].append(start.elapsed_time(end) * 1000 / calls[i])
    return [sorted(t) for t in times]


def measure(shape: tuple[int, int], ready: list[Candidate], tokens: int) -> list[Row]:
    """Check and time all kernels that take ``tokens`` on one shape."""
    rows, cols = shape
    x = torch.randn(tokens, cols, device="cuda").bfloat16()
    fitting = [c for c in ready if c.kernel == "cublas" or tokens <= ops.max_tokens(c.kernel, cols)]
    fitting = [c for c in fitting if not c.pattern or tokens <= PATTERN_TOKENS]
    graphs, counts, errors = [], [], []
    for candidate in fitting:
        errors.append(error_of(candidate.calls[-1](x), x, candidate.weight))
        # A call moves its bytes at 5 TB/s at the very best: enough calls for SHORTEST_US.
        rounds = max(1, int(SHORTEST_US / (len(candidate.calls) * (candidate.size / 5e6 + 1.5))))
        calls = [lambda call=call: call(x) for call in candidate.calls * rounds]
        graphs.append(capture(calls))
        counts.append(len(calls))
    result = []
    for candidate, times, error in zip(fitting, time_interleaved(graphs, counts), errors, strict=True):
        median = times[len(times) // 2]
        result.append(
            Row(
                candidate.kernel, rows, cols, candidate.sparsity, candidate.pattern, tokens, round(median, 3),
                round(times[len(times) // 10], 3), round(times[-1 - len(times) // 10], 3), candidate.size,
                round(candidate.size / median / 1000, 1), 0.0, error,
            )
        )  # fmt: skip
    for row in result:
        row.ratio = round(result[0].microseconds / row.microseconds, 3)
    return result


def set_shares(rows: list[Row], ceilings: dict[str, float]) -> None:
    """Write each row's share of the rate at which this GPU reads memory, where that was measured."""
    rate = ceilings.get("read_gigabytes_per_second")
    for row in rows if rate else ():
        row.read_share = round(row.gigabytes_per_second / rate, 3)


def prefill(shape: tuple[int, int], sparsity: float | None, tokens: int) -> dict[str, Any]:
    """Time the product for more tokens: unpacked and multiplied by torch, or by the kernel."""
    weight = random_weight(*shape, sparsity, 7)
    bitmap = BitmapTensor.from_dense(weight)
    x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
    result: dict[str, Any] = {
        "rows": shape[0],
        "cols": shape[1],
        "sparsity": sparsity or "2:4",
        "tokens": tokens,
    }
    calls: dict[str, Callable[[], Tensor]] = {"cublas": lambda: functional.linear(x, weight)}
    for name in ("delta", "fragment") if sparsity else ("pair", "nm"):
        packing = PACKINGS[name].from_bitmap(bitmap)
        calls[name] = lambda packing=packing: ops.packed_linear(x, packing)
        calls[name + "_unpack"] = lambda packing=packing: ops.packed_unpack(packing)
        calls[name + "_unpacked"] = lambda packing=packing: functional.linear(x, ops.packed_unpack(packing))
    graphs = [capture([call] * 4) for call in calls.values()]
    for name, times in zip(calls, time_interleaved(graphs, [4] * len(graphs)), strict=True):
        result[name] = round(times[len(times) // 2], 2)
    return result


def prefills() -> list[dict[str, Any]]:
    """Time few shapes at few numbers of tokens, unstructured and 2:4."""
    cases = [((4096, 4096), 0.7, n) for n in (8, 32, 512, 2048, 8192)]
    cases += [((11008, 4096), 0.5, n) for n in (8, 32, 512)]
    return [prefill(*case) for case in [*cases, *(((11008, 4096), None, n) for n in (8, 32, 512))]]


def csr_copies(weight: Tensor) -> list[Tensor]:
    """Return copies of ``weight`` as torch's CSR with int32 indices, enough to exceed the cache ``CACHES`` times."""
    csr = weight.to_sparse_csr()
    held = (csr.crow_indices().int(), csr.col_indices().int(), csr.values())
    count = copies_of(sum(part.nbytes for part in held))
    return [
        torch.sparse_csr_tensor(*(part.clone() for part in held), size=weight.shape, check_invariants=False)
        for _ in range(count)
    ]


def in_turn(copies: list[Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Return the product with the next copy at each call: one comes again when all the others have been used."""
    following = itertools.cycle(copies)
    return lambda: next(following) @ x


def cusparse(shapes: list[str], sparsities: list[float]) -> list[dict[str, Any]]:
    """Time torch's CSR product (cuSPARSE, int32 indices) beside cuBLAS: plain calls, for it may allocate."""
    result = []
    for text in shapes[:3]:
        rows, cols = (int(n) for n in text.split("x"))
        for sparsity in sparsities[::2]:
            weight = random_weight(rows, cols, sparsity, 5)
            held = {
                "cusparse": csr_copies(weight),
                "cublas": [weight.clone() for _ in range(copies_of(weight.nbytes))],
            }
            for tokens in (1, 8):
                x = torch.randn(cols, tokens, device="cuda").bfloat16()
                error = error_of((held["cusparse"][0] @ x).T, x.T, weight)
                times = plain_medians({name: in_turn(copies, x) for name, copies in held.items()})
                ratio = round(times["cublas"] / times["cusparse"], 3)
                case = {"rows": rows, "cols": cols, "sparsity": sparsity, "tokens": tokens, "cold": True}
                result.append(case | times | {"ratio": ratio, "error": error})
    return result


def plain_medians(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Return the median microseconds of each call, ten back to back, over REPLAYS rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPLAYS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 100)
    return {name: round(sorted(taken)[len(taken) // 2], 2) for name, taken in times.items()}


def ceilings() -> dict[str, float]:
    """Return what memory and the matrix units reach at best, and the cost of an empty-sized product in a graph.

    Copies are counted read and written; the faster of the copy engine's and a kernel's counts. A weight is only read,
    so its share is that of a plain sum's rate.
    """
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    words, written = source.view(torch.int64), target.view(torch.int64)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    tiny = PACKINGS["fragment"].from_bitmap(
        BitmapTensor.from_dense(torch.ones(16, 64, device="cuda").bfloat16())
    )
    x = torch.ones(1, 64, device="cuda").bfloat16()
    graphs = [
        capture([lambda: target.copy_(source)]),
        capture([lambda: torch.bitwise_not(words, out=written)]),
        capture([words.sum]),
        capture([lambda: a @ b] * 4),
        capture([lambda: ops.packed_linear(x, tiny)] * 100),
    ]
    times = time_interleaved(graphs, [1, 1, 1, 4, 100])
    engine, kernel, read, product, launch = (t[len(t) // 2] for t in times)
    return {
        "copy_gigabytes_per_second": round(2 * source.numel() / min(engine, kernel) / 1000, 1),
        "read_gigabytes_per_second": round(source.numel() / read / 1000, 1),
        "bf16_teraflops": round(2 * 8192**3 / product / 1e6, 1),
        "smallest_call_microseconds": round(launch, 3),
    }


def call_overhead() -> dict[str, float]:
    """Return microseconds of host time per eager call, of our op and of torch's own product."""
    weight = random_weight(1024, 1024, 0.7, 3)
    packing = PACKINGS["delta"].from_bitmap(BitmapTensor.from_dense(weight))
    x = torch.randn(1, 1024, device="cuda").bfloat16()
    calls = {"delta": lambda: ops.packed_linear(x, packing), "torch": lambda: functional.linear(x, weight)}
    result = {}
    for name, call in calls.items():
        for _ in range(100):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            call()
        result[name] = round((time.perf_counter() - start) / 500 * 1e6, 2)
        torch.cuda.synchronize()
    return result


def blocks(sparsities: list[float], count: int = 4) -> list[dict[str, Any]]:
    """Time one token through Llama-2-7B-shaped decoder blocks (random weights) in a graph: dense, then sparse."""
    from pysparse.models import named_shapes
    from pysparse.nn import sparsify_

    result = []
    graphs: list[torch.cuda.CUDAGraph] = []
    keep_alive = []
    x = torch.randn(1, 1, 4096, device="cuda").bfloat16() * 0.02
    for sparsity in [0.0, *sparsities]:
        model = named_shapes.random_model("llama-2-7b", blocks=count).cuda()
        if sparsity:
            for module in model.model.layers.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data *= torch.rand_like(module.weight, dtype=torch.float32) >= sparsity
            sparsify_(model, ignore=("lm_head",), dense_kernels=False)
        keep_alive.append(model)
        with torch.no_grad():
            graphs.append(capture([lambda model=model: model.model(inputs_embeds=x, use_cache=False)[0]]))
        result.append({"sparsity": sparsity, "blocks": count, "kernels": sorted({
            module.kernel.split(" ")[0] for module in model.modules() if hasattr(module, "kernel")
        })})  # fmt: skip
    for row, times in zip(result, time_interleaved(graphs, [1] * len(graphs)), strict=True):
        row["microseconds_per_block"] = round(times[len(times) // 2] / count, 2)
        row["ratio"] = round(result[0]["microseconds_per_block"] / row["microseconds_per_block"], 3)
    return result


def print_table(rows: list[Row]) -> None:
    """Print one line per kernel and token count of a shape: microseconds and ratio by sparsity."""
    first = rows[0]
    print(f"\n{first.rows} x {first.cols}, {first.tokens} tokens: cuBLAS {first.microseconds:.2f} us "
          f"({first.gigabytes_per_second:.0f} GB/s)")  # fmt: skip
    for kernel in ("delta", "fragment", "pair", "nm"):
        line = [
            f"{r.pattern or f'{r.sparsity:.0%}'} {r.microseconds:.2f} us {r.gigabytes_per_second:.0f} GB/s "
            f"{r.ratio:.2f}x" + ("" if r.error < MOST_ERROR else f" WRONG {r.error:.1e}")
            for r in rows
            if r.kernel == kernel
        ]
        if line:
            print(f"  {kernel:9s}", " | ".join(line), flush=True)


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200, help="no new shape is started after so long")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument(
        "--sparsity", type=float, nargs="*", default=SPARSITIES, help="of unstructured weights"
    )
    parser.add_argument(
        "--patterns", nargs="*", default=PATTERNS, help="n:m, on the shapes of PATTERN_SHAPES"
    )
    parser.add_argument("--shapes", nargs="+", default=[f"{m}x{k}" for m, k in SHAPES])
    return parser.parse_args()


def one_shape(text: str, options: argparse.Namespace, report: dict[str, Any]) -> str:
    """Check and time all kernels on one shape, ROWSxCOLS; add the rows and the wrong results to the report."""
    begin = time.perf_counter()
    rows, cols = (int(n) for n in text.split("x"))
    ready = list(candidates((rows, cols), options.sparsity, options.patterns, seed=rows + cols))
    packed = time.perf_counter() - begin
    for tokens in options.tokens:
        timed = measure((rows, cols), ready, tokens)
        report["wrong"] += [
            f"{r.kernel} {text} {r.sparsity} {r.tokens}" for r in timed if not r.error < MOST_ERROR
        ]
        set_shares(timed, report.get("ceilings", {}))
        report["rows"] += [asdict(r) for r in timed]
        print_table(timed)
    return f"{packed:.1f} s to make the weights, {time.perf_counter() - begin - packed:.1f} s to time them"


def main() -> int:
    """Measure, print and write the report; 1 when a kernel was wrong, a part failed or a shape was left out."""
    options, start = arguments(), time.perf_counter()
    run = Run.start(options.out)
    run.part("ceilings", ceilings)
    run.part("call_overhead_microseconds", call_overhead)
    done = []
    for text in options.shapes:
        if time.perf_counter() - start > options.seconds:
            run.report.setdefault("skipped", []).append(text)
            continue
        done.append(run.part(f"shape_{text}", lambda text=text: one_shape(text, options, run.report)))
        torch.cuda.empty_cache()
    if done.count(True) == len(options.shapes):
        run.vouch_for(*PACKINGS)
    run.part("prefill", prefills)
    run.part("cusparse", lambda: cusparse(options.shapes, options.sparsity))
    run.part("llama_2_7b_blocks", lambda: blocks([0.5, 0.7, 0.9]))
    return run.close()


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    raise SystemExit(main())
