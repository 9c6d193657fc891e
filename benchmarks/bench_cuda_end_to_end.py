"""A published architecture on a GPU, all blocks, one token at a time: dense beside sparse, both as CUDA graphs.

    python benchmarks/bench_cuda_end_to_end.py --out benchmarks/results/cuda_end_to_end_h200.json

Weights and zeros are random: for speed only. Engines are timed as transformers runs them; dense and the last
sparsity also with their blocks under torch.compile, which is the fair baseline.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from pysparse import backend
from pysparse.measure.comparison import BenchSettings
from pysparse.models.cuda_engines import engines_on_cuda
from pysparse.models.cuda_speed import compare_on_cuda
from pysparse.models.named_shapes import RANDOM_WEIGHTS, SHAPES, named_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--blocks", type=int, help="default: all")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.6, 0.7])
    parser.add_argument("--two-of-four", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    start = time.perf_counter()
    models, differences = engines_on_cuda(
        options.shape,
        options.blocks,
        options.sparsity,
        two_of_four=options.two_of_four,
        compiled=options.compile,
    )
    print(f"built in {time.perf_counter() - start:.1f} s", flush=True)
    settings = BenchSettings(options.prompt, options.new_tokens, rounds=options.rounds)
    blocks = options.blocks or named_shape(options.shape).blocks
    result = compare_on_cuda(
        models, settings, title=f"{options.shape}: {blocks} blocks, bf16, RANDOM WEIGHTS (speed only)",
        weights=RANDOM_WEIGHTS, difference=differences,
    )  # fmt: skip
    report: dict[str, Any] = {
        **result.to_dict(),
        "source_hashes": backend.cuda().SOURCE_HASHES,
        "seconds": round(time.perf_counter() - start, 1),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=200).print(result.table())
    print(f"wrote {options.out} after {report['seconds']} s")


if __name__ == "__main__":
    main()
