"""A published architecture on a GPU, all blocks, one token at a time: dense beside sparse, both as CUDA graphs.

    python benchmarks/bench_cuda_end_to_end.py --out benchmarks/results/cuda_end_to_end_h200.json

Weights and zeros are random: for speed only. Engines are timed as transformers runs them; dense and the last
sparsity also with their blocks under torch.compile, which is the fair baseline. The file is written after the build,
after decoding and after prefill: a run that is cut off leaves what it has measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cuda_run import Run
from rich.console import Console

from pysparse.measure.comparison import BenchSettings
from pysparse.models.cuda_engines import Engines, engines_on_cuda
from pysparse.models.cuda_speed import compare_on_cuda
from pysparse.models.named_shapes import RANDOM_WEIGHTS, SHAPES, named_shape


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
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
    return parser.parse_args()


def build(options: argparse.Namespace, report: dict[str, Any]) -> Engines:
    """Return the engines, and note what they differ by."""
    built = engines_on_cuda(
        options.shape,
        options.blocks,
        options.sparsity,
        two_of_four=options.two_of_four,
        compiled=options.compile,
    )
    report["difference"] = built[1]
    return built


def compare(options: argparse.Namespace, engines: Engines, run: Run) -> str:
    """Time the engines, note all figures and print them; what has been measured is saved before the next begins."""

    def measured(what: str, figures: Mapping[str, Any]) -> None:
        run.report[what] = figures
        run.save(f"after {what}")

    settings = BenchSettings(options.prompt, options.new_tokens, rounds=options.rounds)
    blocks = options.blocks or named_shape(options.shape).blocks
    models, differences = engines
    result = compare_on_cuda(
        models, settings, title=f"{options.shape}: {blocks} blocks, bf16, RANDOM WEIGHTS (speed only)",
        weights=RANDOM_WEIGHTS, difference=differences, on_measured=measured,
    )  # fmt: skip
    run.report.update(result.to_dict() | {"machine": run.report["machine"]})
    Console(width=200).print(result.table())
    return f"{len(models)} engines"


def main() -> int:
    """Build, time, print and write the report; 1 when a part failed."""
    options = arguments()
    run = Run.start(options.out)
    engines: list[Engines] = []  # a part's result goes into the file; models do not

    def building() -> str:
        engines.append(build(options, run.report))
        return ", ".join(engines[0][0])

    if run.part("build", building):
        run.part("compare", lambda: compare(options, engines[0], run))
    return run.close()


if __name__ == "__main__":
    raise SystemExit(main())
