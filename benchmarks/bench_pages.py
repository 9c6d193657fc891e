"""Whether packed weights on huge pages (madvise) are read faster than on pages of 4 KB."""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import mmap
from pathlib import Path
from typing import Any

import bench_linear
import torch
from harness import COLD_BYTES, Call, Run, cold_copies, command_line, show, threads_of, time_calls
from rivals import PYSPARSE_DENSE, PYSPARSE_SPARSE, Engine
from rivals.pysparse_int8 import PYSPARSE_INT8
from torch import Tensor

from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = 1 << 21
ENGINES = (PYSPARSE_DENSE, PYSPARSE_SPARSE, PYSPARSE_INT8)


def on_huge_pages(tensor: Tensor) -> Tensor:
    """A copy in memory that was advised before it was written; the edges may stay on small pages."""
    target = torch.empty_like(tensor)
    libc = ctypes.CDLL(None, use_errno=True)
    first = -(-target.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (target.data_ptr() + target.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE):
        raise OSError(ctypes.get_errno(), "madvise(MADV_HUGEPAGE)")
    return target.copy_(tensor)


def moved(packed: Any) -> Any:
    """``packed`` with every array of over a huge page moved."""
    if isinstance(packed, Tensor):
        return on_huge_pages(packed)
    arrays = {
        field.name: on_huge_pages(value)
        for field in dataclasses.fields(packed)
        if isinstance(value := getattr(packed, field.name), Tensor) and value.nbytes >= HUGE
    }
    return dataclasses.replace(packed, **arrays)


def huge_bytes() -> int:
    """Bytes of this process that lie on huge pages."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


def measure(engine: Engine, case: bench_linear.Case, rounds: int, working_set: int) -> dict[str, Any]:
    weight = bench_linear.make_weight(case)
    pack, nbytes = engine.storage.pack, engine.storage.nbytes
    packed = pack(weight)
    small = cold_copies(lambda: copy.deepcopy(packed), nbytes, working_set)
    before = huge_bytes()
    huge = cold_copies(lambda: moved(packed), nbytes, working_set)
    found = huge_bytes() - before
    x = torch.randn(1, weight.shape[1]).bfloat16()
    timings = time_calls(
        {
            "4 KB": Call(lambda: engine.multiply(small.take(), x)),
            "huge": Call(lambda: engine.multiply(huge.take(), x)),
        },
        rounds,
    )
    return {
        "engine": engine.name, "shape": case.shape, "sparsity": case.sparsity, "bytes": nbytes(packed),
        "share_on_huge_pages": found / (len(huge) * nbytes(packed)),
        "huge_over_small": to_jsonable(timings["huge"].speedup_over(timings["4 KB"])),
        "timings": {name: timing.record() for name, timing in timings.items()},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("pages", __doc__ or "")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=40)
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.rounds = ["2048x2048"], 3
    this = Run.start("pages", options)
    with torch_threads(options.threads), torch.no_grad():
        rows = [
            measure(
                engine,
                bench_linear.Case(shape, "bf16", options.sparsity, "random", 1),
                options.rounds,
                0 if options.quick else COLD_BYTES,
            )
            for shape in options.shapes
            for engine in ENGINES
        ]
        protocol = {
            "what": "one token on cold weights; copies on huge pages were advised before their first write",
            "threads": threads_of(options),
            "rounds": options.rounds,
            "transparent_hugepage": SETTING.read_text().strip(),
        }
        path = this.save(protocol, rows)
    columns = ["engine", "shape", "4 KB us", "huge us", "huge x 4 KB", "share on huge pages"]
    cells = []
    for row in rows:
        us = [(one["microseconds"] or {}).get("median") for one in row["timings"].values()]
        ratio = (row["huge_over_small"] or {}).get("median")
        cells.append([row["engine"], row["shape"], *us, ratio, row["share_on_huge_pages"]])
    show(make_table("one token, cold weights, by the size of their pages", columns, cells), path=path)


if __name__ == "__main__":
    main()
