"""Lookups in a pruned embedding table beside nn.Embedding, with ids as Zipf draws them; memory and file size.

A table of 1,000,000 x 16 and batches of 4,096 samples of 26 ids, another batch each call, interleaved. Uniform ids
beside those of Zipf's law (exponent 1.1, frequent rows spread over the table): the worst case for any cache. Ids of 64
rows stay in the first cache: what a lookup and a sum take when no memory is waited for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Call, Run, Timing, command_line, show, threads_of, time_calls
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.nn import SparseEmbedding, SparseEmbeddingBag

ROWS, DIMS = 1_000_000, 16
SAMPLES, IDS, BATCHES = 4096, 26, 16
SPARSITIES = (0.5, 0.8, 0.95)
IDS_BY = {
    "zipf 1.1": (1.1, None),
    "uniform": (0.0, None),
    "of 64 rows": (0.0, 64),
}  # exponent, rows of the table
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def zipf_ids(rows: int, count: int, exponent: float, seed: int) -> Tensor:
    """Return ``count`` ids whose r-th most frequent row has probability ~ r^-exponent; 0 is uniform."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, rows + 1, dtype=torch.float64).pow(-exponent)
    edges = weights.cumsum(0) / weights.sum()
    ranks = torch.searchsorted(edges, torch.rand(count, generator=generator, dtype=torch.float64)).clamp(
        max=rows - 1
    )
    return torch.randperm(rows, generator=torch.Generator().manual_seed(1))[ranks]


def file_bytes(save: Callable[[Path], Any]) -> int:
    """Return the size of the file that ``save`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        save(path)
        return path.stat().st_size


def make_tables(rows: int, dtype: torch.dtype, sparsity: float) -> tuple[nn.Embedding, SparseEmbedding]:
    """Return a dense table whose pruned entries are the codebook's, and the same packed."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(rows, DIMS, generator=generator) >= sparsity
    weight = torch.randn(rows, DIMS, generator=generator).to(dtype)
    codebook = weight.float().mean(0, keepdim=True).to(dtype)
    dense = nn.Embedding.from_pretrained(torch.where(keep, weight, codebook))
    return dense, SparseEmbedding.from_dense(weight, keep, codebook=codebook)


def taking_turns(module: nn.Module, batches: list[Tensor]) -> Callable[[], Tensor]:
    """Return a call that looks up another batch each time."""
    turn = -1

    def call() -> Tensor:
        nonlocal turn
        turn = (turn + 1) % len(batches)
        result: Tensor = module(batches[turn])
        return result

    return call


def run(options: Any) -> Iterator[dict[str, Any]]:
    rows, count = (20_000, 4) if options.quick else (ROWS, BATCHES)
    for dtype_name, dtype in DTYPES.items():
        for sparsity in options.sparsity:
            dense, sparse = make_tables(rows, dtype, sparsity)
            modules = {
                "nn.Embedding": dense,
                "SparseEmbedding": sparse,
                "nn.EmbeddingBag": nn.EmbeddingBag.from_pretrained(dense.weight, mode="sum"),
                "SparseEmbeddingBag": SparseEmbeddingBag(sparse.table, mode="sum"),
            }
            sizes = {
                "memory_over_dense": sparse.nbytes / dense.weight.nbytes,
                "file_over_dense": file_bytes(sparse.save)
                / file_bytes(lambda path, dense=dense: save_file({"weight": dense.weight}, path)),
            }
            for ids_by, (exponent, among) in IDS_BY.items():
                batches = [
                    zipf_ids(among or rows, SAMPLES * IDS, exponent, seed).view(SAMPLES, IDS)
                    for seed in range(count)
                ]
                assert torch.equal(dense(batches[0]), sparse(batches[0]))
                calls = {name: Call(taking_turns(module, batches)) for name, module in modules.items()}
                with torch.inference_mode():
                    timings = time_calls(calls, options.rounds, options.sample_seconds)
                yield {
                    "rows": rows, "dims": DIMS, "dtype": dtype_name, "sparsity": sparsity, "ids": ids_by,
                    "calls": {name: timing.record() for name, timing in timings.items()},
                    "speedup": to_jsonable(speedups(timings)), **sizes,
                }  # fmt: skip


def speedups(timings: dict[str, Timing]) -> dict[str, Any]:
    """Return how many times faster than torch's module each of ours is, round by round."""
    return {
        name: timings[f"Sparse{name}"].speedup_over(timings[f"nn.{name}"])
        for name in ("Embedding", "EmbeddingBag")
    }


def table(rows: list[dict[str, Any]]) -> Table:
    lines = []
    for row in rows:
        times = [row["calls"][name]["microseconds"] for name in row["calls"]]
        cells = ["-" if spread is None else f"{spread['median'] / 1e3:.2f}" for spread in times]
        ratios = ["-" if spread is None else f"{spread['median']:.2f}x" for spread in row["speedup"].values()]
        sizes = [f"{row['memory_over_dense']:.3f}", f"{row['file_over_dense']:.3f}"]
        lines.append([row["dtype"], f"{row['sparsity']:.0%}", row["ids"], *cells, *ratios, *sizes])
    columns = ["values", "sparsity", "ids", "dense ms", "sparse ms", "dense bag ms", "sparse bag ms"]
    columns += ["speed", "bag speed", "memory", "file"]
    return make_table(f"{SAMPLES} x {IDS} ids", columns, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("embedding", __doc__ or "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--sample-seconds", type=float, default=0.02)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.sample_seconds = 3, 0.002
    threads = threads_of(options)
    this = Run.start("embedding", options)
    with torch_threads(threads):
        rows = list(run(options))
    protocol = {"threads": threads, "rounds": options.rounds, "batches": BATCHES}
    show(table(rows), path=this.save(protocol, rows))


if __name__ == "__main__":
    main()
