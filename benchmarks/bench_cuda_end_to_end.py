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

import torch
from bench_cuda import random_weight
from rich.console import Console
from torch import nn

from pysparse import backend
from pysparse.measure.comparison import BenchSettings
from pysparse.measure.latency import random_tokens
from pysparse.measure.twins import linear_layers, shared_copy
from pysparse.models.cuda_speed import compare_on_cuda, compile_blocks_
from pysparse.models.named_shapes import RANDOM_WEIGHTS, SHAPES, named_shape, random_model
from pysparse.nn import sparsify_

TOLERANCE = 0.05  # of the norm of the logits: both round to bf16 in other orders, layer after layer


@torch.no_grad()
def sparse_copy(dense: nn.Module, sparsity: float | None, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """Return a packed copy with random zeros (2:4 for None), and its distance to the same zeros kept dense."""
    masked = shared_copy(dense)
    for index, (path, module) in enumerate(linear_layers(masked).items()):
        if not path.endswith("lm_head"):
            keep = random_weight(*module.weight.shape, sparsity, seed + index) != 0
            module.weight = nn.Parameter(module.weight * keep, requires_grad=False)
    tokens = random_tokens(dense, 1, 1, seed).cuda()
    exact = masked(input_ids=tokens).logits.double()
    sparsify_(masked, ignore=("lm_head",), dense_kernels=False)
    error = float((masked(input_ids=tokens).logits.double() - exact).norm() / exact.norm())
    if not error < TOLERANCE:
        raise RuntimeError(f"sparse logits are {error:.3g} off, over the bound {TOLERANCE}")
    return masked, {"relative_difference": error}


def build(options: argparse.Namespace) -> tuple[dict[str, nn.Module], dict[str, dict[str, float]]]:
    dense = random_model(options.shape, options.blocks).cuda()
    models, differences = {"torch dense": dense}, {}
    for sparsity in options.sparsity:
        name = f"sparse {sparsity:.0%}"
        models[name], differences[name] = sparse_copy(dense, sparsity, 1)
    if options.two_of_four:
        models["sparse 2:4"], differences["sparse 2:4"] = sparse_copy(dense, None, 1)
    torch.cuda.empty_cache()
    if options.compile:
        for name in ("torch dense", *[f"sparse {sparsity:.0%}" for sparsity in options.sparsity[-1:]]):
            models[f"{name}, compiled"] = compile_blocks_(shared_copy(models[name]))
    return models, differences


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
    models, differences = build(options)
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
