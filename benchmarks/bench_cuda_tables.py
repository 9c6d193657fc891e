"""Embedding, Shapley and pruning kernels on a GPU beside torch's own operations: checked, then timed; one JSON out.

    PYSPARSE_EXPERIMENTAL=1 python benchmarks/bench_cuda_tables.py --out OUT/cuda_tables.json [--groups pruning]

Medians over interleaved rounds of CUDA graphs where nothing waits for the host, of plain calls elsewhere (said by
"graph"). Each kernel is first checked against the CPU's; a wrong result is written down and makes the exit code 1.
Tables are larger than the second-level cache, ids follow a Zipf law; random weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cuda import capture
from cuda_run import Run
from torch import Tensor
from torch.nn import functional

from pysparse import ops
from pysparse.methods.obs import sweep
from pysparse.nn.embedding import SparseEmbedding, SparseEmbeddingBag
from pysparse.pruning import Unstructured

ROUNDS = 11
Call = Callable[[], object]
Report = dict[str, Any]


def medians(calls: dict[str, Call], graph: bool) -> dict[str, float]:
    """Return the median microseconds of each call; they take turns."""
    ready: dict[str, Call] = {}
    for name, call in calls.items():
        ready[name] = capture([call]).replay if graph else call  # type: ignore[list-item]
        ready[name]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in ready.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(1e3 * start.elapsed_time(end))
    return {name: statistics.median(seen) for name, seen in times.items()}


def note(
    report: Report, case: dict[str, Any], calls: dict[str, Call], ours: str, graph: bool = True, **figures: Any
) -> None:  # fmt: skip
    """Time the calls and write a row for each; the ratio is over the fastest of the others."""
    times = medians(calls, graph)
    others = [time for name, time in times.items() if name != ours]
    for name, time in times.items():
        row = case | {"kernel": name, "microseconds": round(time, 2), "graph": graph}
        if name == ours:
            row |= figures | ({"over_best_rival": round(min(others) / time, 3)} if others else {})
        report["rows"].append(row)
        print(f"  {case} {name:24s} {time:12.1f} us {row.get('over_best_rival', '')}", flush=True)


def check(report: Report, name: str, right: bool) -> None:
    """Write down a wrong result."""
    if not right:
        report["wrong"].append(name)


def zipf_ids(rows: int, count: int) -> Tensor:
    """Return ids of which the r-th most frequent one appears in proportion to 1 / r, spread over the table."""
    ranks = np.minimum(np.random.default_rng(0).zipf(1.05, count), rows) - 1
    return torch.from_numpy(ranks * 2654435761 % rows)


def lookups(report: Report, weight: Tensor, ids: Tensor, sparsity: float) -> None:
    """Check and time lookups and bags of 20 in one table."""
    rows, dims = weight.shape
    keep = torch.rand(rows, dims) >= sparsity
    layer, bags = (kind.from_dense(weight, keep) for kind in (SparseEmbedding, SparseEmbeddingBag))
    expected, expected_bags = layer(ids[:999]), bags(ids[:1000].view(50, 20))
    layer, bags, dense, on_gpu = layer.cuda(), bags.cuda(), weight.cuda(), ids.cuda()
    grouped = on_gpu[:65520].view(-1, 20)
    check(report, f"lookup {dims}", torch.equal(layer(on_gpu[:999]).cpu(), expected))
    check(report, f"bag {dims}", torch.equal(bags(on_gpu[:1000].view(50, 20)).cpu(), expected_bags))
    case = {"group": "embedding", "rows": rows, "dims": dims, "sparsity": sparsity, "ids": len(ids)}
    share = round(layer.nbytes / dense.nbytes, 4)
    calls: dict[str, Call] = {
        "sparse lookup": lambda: layer(on_gpu),
        "torch lookup": lambda: functional.embedding(on_gpu, dense),
    }
    note(report, case, calls, "sparse lookup", memory_share=share)
    calls = {
        "sparse bag": lambda: bags(grouped),
        "torch bag": lambda: functional.embedding_bag(grouped, dense, mode="mean"),
    }
    note(report, case, calls, "sparse bag", memory_share=share)


def embedding(report: Report) -> str:
    """Tables at 80 and 90 % zeros beside dense ones."""
    for rows, dims in ((4_000_000, 16), (1_000_000, 64)):
        weight, ids = torch.randn(rows, dims).bfloat16(), zipf_ids(rows, 65536)
        for sparsity in (0.8, 0.9):
            lookups(report, weight, ids, sparsity)
    return "2 tables"


def game(samples: int, rows: int, fields: int = 39, cols: int = 16) -> ops.EntrySamples:
    """Return random samples of a table, each field with rows of its own."""
    random = np.random.default_rng(1)
    table = (random.standard_normal((rows, cols)) * 0.1).astype(np.float32)
    each = rows // fields
    ids = (random.zipf(1.05, (samples, fields)) % each + np.arange(fields) * each).astype(np.int32)
    labels = random.integers(0, 2, samples).astype(np.float32)
    return ops.EntrySamples(table, np.zeros((fields, cols), np.float32), ids, labels)


def shapley(report: Report) -> str:
    """Walks of a factorisation machine with 624 players, orders alone, and the whole call with its copies."""
    from pysparse.ops import shapley_cuda

    samples, draw = game(1 << 15, 1_000_000), ops.EntryDraw(3, antithetic=True)
    few = samples.part(0, 64)
    found, expected = ops.fm_marginals_cuda(few, draw), ops.fm_marginals(few, draw)
    check(report, "walk", np.allclose(found, expected, rtol=1e-3, atol=1e-5))
    mine, theirs = (ops.EntryTotals(*samples.table.shape) for _ in range(2))
    ops.fm_shapley_cuda(few, draw, mine)
    ops.fm_shapley(few, draw, theirs)
    # 2^-36 is the unit of a sum; each marginal may round the other way once.
    near = np.abs(mine.mean(64) - theirs.mean(64)).max() < 1e-5
    check(report, "sums", bool(near))
    same = bool(np.array_equal(mine.sums, theirs.sums))
    held = shapley_cuda._Device(
        samples, torch.from_numpy(samples.table).cuda(), torch.from_numpy(samples.ids).cuda()
    )
    count = len(samples.ids)
    for antithetic in (True, False):
        case = {"group": "shapley", "players": 624, "samples": count, "antithetic": antithetic}
        how = ops.EntryDraw(3, antithetic=antithetic)
        walk: dict[str, Call] = {"walk": lambda how=how: held.walk(how, 0, count)}
        note(report, case, walk, "walk", graph=False, bits_of_this_cpu=same)
        row = report["rows"][-1]
        row["walks_per_second"] = round(count * (2 if antithetic else 1) / row["microseconds"] * 1e6)
    orders: dict[str, Call] = {"orders": lambda: ops.draw_permutations_cuda(3, 0, count, 624)}
    note(report, {"group": "shapley", "players": 624, "rows": count}, orders, "orders")
    whole: dict[str, Call] = {"whole call": lambda: ops.fm_shapley_cuda(samples, draw, mine)}
    note(report, {"group": "shapley", "players": 624, "samples": count}, whole, "whole call", graph=False)
    return f"{count} samples"


def selection(report: Report) -> None:
    """Half of each row, and two of four, beside torch's sorting and selecting."""
    for rows, cols in ((4096, 4096), (11008, 4096), (4096, 11008)):
        for dtype in (torch.bfloat16, torch.float32):
            weight, scale = torch.randn(rows, cols, device="cuda").to(dtype), torch.rand(cols, device="cuda")
            few = slice(0, 64)
            for name, pattern in (("rows", {"count": cols // 2}), ("2:4", {"n": 2, "m": 4})):
                function = ops.select_rows if name == "rows" else ops.select_nm
                keep, pruned = function(weight, scale, *pattern.values())
                wanted, expected = function(weight[few].cpu(), scale.cpu(), *pattern.values())
                check(
                    report,
                    name,
                    torch.equal(keep[few].cpu(), wanted) and torch.equal(pruned[few].cpu(), expected),
                )
            case = {
                "group": "pruning",
                "rows": rows,
                "cols": cols,
                "dtype": str(dtype).removeprefix("torch."),
            }
            score = lambda weight=weight, scale=scale: weight.abs().float() * scale  # noqa: E731
            calls: dict[str, Call] = {
                "select rows": lambda w=weight, s=scale: ops.select_rows(w, s, w.shape[1] // 2),
                "torch sort": lambda score=score: score().sort(dim=1, stable=True),
                "torch topk": lambda score=score: score().topk(score().shape[1] // 2, dim=1, largest=False),
                "torch kthvalue": lambda score=score: score().kthvalue(score().shape[1] // 2, dim=1),
            }
            note(report, case | {"what": "half of each row"}, calls, "select rows")
            calls = {
                "select 2:4": lambda w=weight, s=scale: ops.select_nm(w, s, 2, 4),
                "torch topk": lambda score=score: score().view(-1, 4).topk(2, dim=1),
            }
            note(report, case | {"what": "two of four"}, calls, "select 2:4")


def pruning(report: Report) -> str:
    """Selections, the sweep beside the one in torch, and the Gram matrix that torch makes."""
    selection(report)
    rows, cols = 4096, 4096
    weight = torch.randn(rows, cols, device="cuda")
    x = torch.randn(4 * cols, cols, device="cuda")
    gram = x.T @ x / len(x) + 0.01 * torch.eye(cols, device="cuda")
    upper = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True).float().contiguous()
    scale = (1 / upper.diagonal()).contiguous()
    pattern = ops.SweepPattern(128, (64,) * (cols // 128))
    few = slice(0, 128)
    found, keep = ops.obs_sweep(weight, upper, scale, pattern)
    expected, wanted = ops.obs_sweep(weight[few].cpu(), upper.cpu(), scale.cpu(), pattern)
    check(report, "sweep mask", torch.equal(keep[few].cpu(), wanted))
    check(report, "sweep", torch.allclose(found[few].cpu(), expected, rtol=1e-3, atol=1e-4))
    score = lambda part, columns: part.abs() * scale[columns]  # noqa: E731
    calls: dict[str, Call] = {
        "sweep": lambda: ops.obs_sweep(weight, upper, scale, pattern),
        "torch sweep": lambda: sweep(weight.clone(), upper, score, Unstructured(), 0.5, 128),
    }
    same = bool(torch.equal(found[few].cpu(), expected))
    note(
        report,
        {"group": "pruning", "rows": rows, "cols": cols},
        calls,
        "sweep",
        graph=False,
        bits_of_this_cpu=same,
    )
    tokens = torch.randn(16384, cols, device="cuda").bfloat16()
    note(report, {"group": "pruning", "cols": cols}, {"torch gram": lambda: tokens.T @ tokens}, "torch gram")
    report["rows"][-1]["teraflops"] = round(
        2 * len(tokens) * cols**2 / report["rows"][-1]["microseconds"] / 1e6, 1
    )
    return f"{rows} x {cols}"


GROUPS: dict[str, Callable[[Report], str]] = {"embedding": embedding, "shapley": shapley, "pruning": pruning}


def main() -> int:
    """Measure, print and write the report after each group; 1 when a result was wrong or a group failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    run = Run.start(options.out)
    for name in options.groups:
        before = len(run.report["wrong"])
        ended = run.part(name, lambda name=name: GROUPS[name](run.report))
        torch.cuda.empty_cache()
        if ended and len(run.report["wrong"]) == before:  # vouches for what ran to its end
            run.vouch_for(name)
    return run.close()


if __name__ == "__main__":
    with torch.no_grad():
        raise SystemExit(main())
