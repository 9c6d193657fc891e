"""Whole blocks of a published architecture through transformers' generate(): dense beside sparse."""

from __future__ import annotations

import argparse

import shapes
import torch
from harness import Run, command_line, show
from rivals.torch_decode import tuned_twin
from torch import nn

from pysparse.measure.comparison import (
    KERNEL_DENSE,
    TORCH_DENSE,
    BenchResult,
    BenchSettings,
    compare_speed,
    logit_difference,
)
from pysparse.measure.memory import available_bytes
from pysparse.measure.progress import progress_on_stderr
from pysparse.measure.rounds import torch_threads
from pysparse.measure.twins import dense_kernel_twin, sparse_twin, zero_at_random_
from pysparse.models.named_shapes import RANDOM_WEIGHTS, SHAPES, named_shape, plan_blocks, random_model

TORCH_TUNED = "torch dense, best setting per phase"
TOLERANCE = {torch.bfloat16: 0.08, torch.float32: 1e-4}  # of the largest logit


Differences = dict[str, dict[str, float]]


def build(options: argparse.Namespace, settings: BenchSettings) -> tuple[dict[str, nn.Module], Differences]:
    """Engines that share one dense model's memory, and how far each one's logits are from torch's."""
    dense = random_model(options.shape, options.blocks, shapes.DTYPES[options.dtype], settings.seed)
    models = {TORCH_DENSE: dense, TORCH_TUNED: tuned_twin(dense), KERNEL_DENSE: dense_kernel_twin(dense)}
    difference = logit_difference(models, settings)
    for sparsity in sorted(options.sparsity):
        zero_at_random_(dense, sparsity, settings.seed)  # one seed: these zeros contain the last sparsity's
        name = f"sparse {sparsity:.0%}"
        models[name] = sparse_twin(dense)
        difference |= logit_difference({TORCH_DENSE: dense, name: models[name]}, settings)
    bound = TOLERANCE[shapes.DTYPES[options.dtype]]
    wrong = {name: d for name, d in difference.items() if not d["max_difference"] <= bound * d["max_value"]}
    if wrong:
        raise RuntimeError(f"engines disagree with torch by more than {bound} of the largest logit: {wrong}")
    return models, difference


def measure(options: argparse.Namespace) -> BenchResult:
    settings = BenchSettings(
        options.prompt, options.new_tokens, rounds=options.rounds, threads=options.threads
    )
    known = named_shape(options.shape)
    if options.blocks is None:
        sparsities = sorted(options.sparsity)
        dtype = shapes.DTYPES[options.dtype]
        options.blocks = plan_blocks(known, dtype, sparsities[0], available_bytes(), len(sparsities))
    with torch_threads(options.threads):
        models, difference = build(options, settings)
    title = f"{options.shape}: {options.blocks} of {known.blocks} blocks, {options.dtype}, RANDOM WEIGHTS (speed only)"
    with progress_on_stderr(not options.quick) as advance:
        return compare_speed(
            models, settings, title=title, weights=RANDOM_WEIGHTS, difference=difference, on_round=advance
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("end_to_end", __doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--dtype", choices=shapes.DTYPES, default="bf16")
    parser.add_argument("--blocks", type=int, help="default: as many as memory holds, a quarter left alone")
    parser.add_argument("--sparsity", nargs="+", type=float, default=shapes.END_TO_END_SPARSITIES)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.blocks, options.sparsity = "qwen2.5-0.5b", 1, [0.7]
        options.prompt, options.new_tokens, options.rounds = 4, 3, 1
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    this = Run.start("end_to_end", options)
    result = measure(options)
    details = result.to_dict()
    details["machine"] = None  # the run has it
    protocol = {"what": "generate(), greedy, KV cache", "blocks": options.blocks, **details.pop("settings")}
    path = this.save(protocol, [{"shape": options.shape, "blocks": options.blocks, **details}])
    show(result.table(), path=path)


if __name__ == "__main__":
    main()
