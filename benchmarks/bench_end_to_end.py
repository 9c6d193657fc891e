"""Whole blocks of a published architecture through transformers' generate(): dense beside sparse."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import shapes
import torch
from harness import Run, command_line, show, threads_of
from rich.table import Table
from rivals.torch_decode import tuned_twin
from torch import nn

from pysparse import prepare_decoding_
from pysparse.measure.comparison import (
    KERNEL_DENSE,
    TORCH_DENSE,
    BenchResult,
    BenchSettings,
    compare_speed,
    logit_difference,
)
from pysparse.measure.latency import decode_benchmark
from pysparse.measure.memory import available_bytes, model_bytes
from pysparse.measure.progress import progress_on_stderr
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import percentile, torch_threads
from pysparse.measure.twins import dense_kernel_twin, shared_copy, sparse_twin, zero_at_random_
from pysparse.models.named_shapes import (
    RANDOM_WEIGHTS,
    SHAPES,
    named_shape,
    plan_blocks,
    random_model,
    repeat_block_,
)
from pysparse.nn import sparsify_, unfuse_rotary_

TORCH_TUNED = "torch dense, best setting per phase"
TOLERANCE = {torch.bfloat16: 0.08, torch.float32: 1e-4}  # of the largest logit
INT8_TOLERANCE = 0.15  # weights and tokens are rounded to 8 bits in every layer
Q4_0_BYTES, Q6_K_BYTES = 18 / 32, 210 / 256  # a weight: a half-precision scale for 32, and llama.cpp's head
PROBE_BYTES = 1 << 29


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
    name = f"sparse {max(options.sparsity):.0%}, int8 values"
    models[name] = int8_twin(dense)
    difference |= logit_difference({TORCH_DENSE: dense, name: models[name]}, settings)
    bound = TOLERANCE[shapes.DTYPES[options.dtype]]
    bounds = {name: INT8_TOLERANCE if "int8" in name else bound for name in difference}
    wrong = {n: d for n, d in difference.items() if not d["max_difference"] <= bounds[n] * d["max_value"]}
    if wrong:
        raise RuntimeError(f"engines disagree with torch by more than {bounds} of the largest logit: {wrong}")
    return models, difference


def int8_twin(dense: nn.Module) -> nn.Module:
    """``dense`` with int8 values under a bitmap in every layer that holds zeros."""
    twin = shared_copy(dense)
    sparsify_(twin, values="int8")
    return twin


def computed_q4_0(options: argparse.Namespace) -> dict[str, Any]:
    """What llama.cpp's Q4_0 of the same shape would reach if it read its bytes at the speed of memory: no run."""
    model = random_model(options.shape, 1, torch.bfloat16)
    head = model.get_output_embeddings().weight.numel()
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) - head
    nbytes = options.blocks * linears * Q4_0_BYTES + head * Q6_K_BYTES
    data, seconds = torch.ones(PROBE_BYTES // 8, dtype=torch.int64), []
    for _ in range(9):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    speed = PROBE_BYTES / percentile(seconds, 50)
    return {
        "what": "computed, not run: bytes of llama.cpp Q4_0 (head Q6_K) at the measured read bandwidth",
        "bytes": nbytes,
        "read_gigabytes_per_second": speed / 1e9,
        "tokens_per_second": speed / nbytes,
    }


def packed_blocks(options: argparse.Namespace, pack: Callable[[nn.Module], object]) -> nn.Module:
    """A model of packed blocks that never was dense as a whole: one is packed, the others are its copies."""
    model = random_model(options.shape, 1, shapes.DTYPES[options.dtype])
    zero_at_random_(model, max(options.sparsity))
    pack(model)
    repeat_block_(model, options.blocks)
    return model


def prepared(model: nn.Module) -> nn.Module:
    """Return ``model`` with what lies beside its layers on the compiled kernels as well."""
    prepare_decoding_(model)
    return model


def one_after_other(options: argparse.Namespace) -> dict[str, Any]:
    """Build, time and free one engine after the other, for models that do not fit in memory together."""
    dtype, level = shapes.DTYPES[options.dtype], f"{max(options.sparsity):.0%}"
    builders: dict[str, Callable[[], nn.Module]] = {
        TORCH_DENSE: lambda: random_model(options.shape, options.blocks, dtype),
        f"sparse {level}": lambda: packed_blocks(options, sparsify_),
        f"sparse {level}, int8 values": lambda: packed_blocks(
            options, lambda model: sparsify_(model, values="int8")
        ),
        f"sparse {level}, prepared": lambda: prepared(packed_blocks(options, sparsify_)),
        f"sparse {level}, int8 values, prepared": lambda: prepared(
            packed_blocks(options, lambda model: sparsify_(model, values="int8"))
        ),
    }
    engines: dict[str, Any] = {}
    for name, build_model in builders.items():
        start = time.perf_counter()
        model = build_model()
        built = time.perf_counter() - start
        timings = decode_benchmark(
            {name: model}, options.prompt, options.new_tokens, rounds=options.rounds, threads=options.threads
        )
        engines[name] = {
            **to_jsonable(timings[name]),
            "build_seconds": built,
            "bytes": model_bytes(model).total,
        }
        unfuse_rotary_(model)  # it holds for all models of a family, also the next ones here
        del model, timings
        gc.collect()
    base = engines[TORCH_DENSE]["milliseconds_p50"]
    for one in engines.values():
        one["speedup"] = base / one["milliseconds_p50"]  # of medians: the engines did not take turns
    return engines


def show_engines(options: argparse.Namespace, engines: dict[str, Any], computed: dict[str, Any]) -> Table:
    columns = ("engine", "tokens/s", "ms p50", "x torch", "GB in memory", "s to build")
    rows: list[list[Any]] = []
    for name, one in engines.items():
        figures = [one[key] for key in ("tokens_per_second", "milliseconds_p50", "speedup")]
        rows.append([name, *figures, one["bytes"] / 1e9, one["build_seconds"]])
    rows.append(["llama.cpp Q4_0, computed", computed["tokens_per_second"], *[None] * 4])
    title = (
        f"{options.shape}: {options.blocks} blocks, one engine after the other, RANDOM WEIGHTS (speed only)"
    )
    return make_table(title, columns, rows, caption=f"Q4_0: {computed['what']}")


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
    parser.add_argument(
        "--one-after-other", action="store_true",
        help="torch dense, the highest sparsity and its int8 values by turns of their own, all blocks by default",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.sparsity = "qwen2.5-0.5b", [0.7]
        options.blocks = 2 if options.one_after_other else 1
        options.prompt, options.new_tokens, options.rounds = 4, 3, 1
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    this = Run.start("end_to_end", options)
    if options.one_after_other:
        options.blocks = options.blocks or named_shape(options.shape).blocks
        with torch_threads(options.threads):
            engines, computed = one_after_other(options), computed_q4_0(options)
        protocol = {
            "what": "generate(), greedy, KV cache",
            "order": "one engine after the other, each freed before the next is built",
            "blocks": options.blocks, "weights": RANDOM_WEIGHTS, "prompt": options.prompt,
            "new_tokens": options.new_tokens, "rounds": options.rounds, "threads": threads_of(options),
        }  # fmt: skip
        row = {
            "shape": options.shape,
            "blocks": options.blocks,
            "engines": engines,
            "computed_q4_0": computed,
        }
        show(show_engines(options, engines, computed), path=this.save(protocol, [row]))
        return
    result = measure(options)
    with torch_threads(options.threads):
        computed = computed_q4_0(options)
    details = result.to_dict()
    details["machine"] = None  # the run has it
    protocol = {"what": "generate(), greedy, KV cache", "blocks": options.blocks, **details.pop("settings")}
    path = this.save(
        protocol, [{"shape": options.shape, "blocks": options.blocks, **details, "computed_q4_0": computed}]
    )
    show(result.table(), path=path)


if __name__ == "__main__":
    main()
