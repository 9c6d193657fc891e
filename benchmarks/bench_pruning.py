"""The cost of pruning: selection, SparseGPT's factor and sweep, and a whole block, beside plain and tuned torch."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import shapes
import torch
from harness import Call, Run, Timing, command_line, show, threads_of, time_calls
from rich.table import Table
from rivals import torch_pruning
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pysparse import ops
from pysparse.calib import load_calibration
from pysparse.measure.memory import peak_resident_bytes
from pysparse.measure.results import make_table, megabytes, to_jsonable
from pysparse.measure.rounds import round_robin, torch_threads
from pysparse.methods import METHODS
from pysparse.methods.obs import inverse_factor
from pysparse.models.discover import discover
from pysparse.pruning import NM, Unstructured, run

BYTES, CACHED = (
    "the same bytes, no work",
    "pysparse, rows in the cache",
)  # what memory and what work alone take
CACHED_ROWS = 64  # 1 MB of float32
OURS, PLAIN, TUNED = "pysparse", "torch as published", "torch tuned"
LONG_WAIT_LIMIT = (
    0.1  # of a sample of seconds, over all threads: hardly one passes without a wait of a few ms
)
OBJECTIVE_TOLERANCE = 0.02  # of the plain sweep's output error: masks differ where scores nearly tie
Row = dict[str, Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def speedups(timings: Mapping[str, Timing]) -> Row:
    """How many times faster ours is than each other engine."""
    ours = timings[OURS]
    return {name: to_jsonable(ours.speedup_over(one)) for name, one in timings.items() if name != OURS}


def row_of(what: str, shape: str, detail: str, timings: Mapping[str, Timing], **more: Any) -> Row:
    engines = {name: one.record() for name, one in timings.items()}
    return {
        "what": what,
        "shape": shape,
        "detail": detail,
        "engines": engines,
        "speedup_over": speedups(timings),
        **more,
    }


def time_long(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time calls of seconds, one a sample, interleaved; disturbed samples are dropped and counted."""

    def sampler(function: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start

        return sample

    result = round_robin({name: sampler(one) for name, one in functions.items()}, rounds, warmup=1)
    return {
        name: Timing(
            tuple(
                second if waited <= LONG_WAIT_LIMIT * second else None
                for second, waited in zip(seconds, result.waits[name], strict=True)
            ),
            1,
        )
        for name, seconds in result.results.items()
    }


def selection(options: argparse.Namespace) -> list[Row]:
    """Wanda's score and mask, per row and 2:4; every mask of ours is bit-equal to the stable sort.

    Two more figures say what limits ours: a comparison that reads the weights and writes a new byte each, and our
    kernel on a few rows again and again, which never leave the cache.
    """
    rows, cols = shapes.LINEAR[options.shape]
    norms, found = normal(cols, seed=1).abs() + 0.1, []

    def select_row(weight: Tensor) -> Tensor:
        return ops.row_mask(weight, cols // 2, norms)

    def select_group(weight: Tensor) -> Tensor:
        return ops.nm_mask(weight, 2, 4, norms)

    for name, dtype in shapes.DTYPES.items():
        weight = normal(rows, cols).to(dtype)
        by_row: dict[str, Callable[[], Any]] = {OURS: lambda w=weight: select_row(w)}
        by_row |= {
            key: lambda f=mask, w=weight: f(w, norms, cols // 2)
            for key, mask in torch_pruning.ROW_MASKS.items()
        }
        grouped: dict[str, Callable[[], Any]] = {OURS: lambda w=weight: select_group(w)}
        grouped |= {
            key: lambda f=mask, w=weight: f(w, norms, 2, 4) for key, mask in torch_pruning.NM_MASKS.items()
        }
        for what, calls, oracle, select in (
            ("row selection", by_row, "torch stable sort", select_row),
            ("2:4 selection", grouped, "torch comparisons", select_group),
        ):
            if not torch.equal(calls[OURS](), calls[oracle]()):
                raise RuntimeError(f"{what}, {name}: the mask is not that of {oracle}")
            calls[BYTES] = lambda w=weight: torch.ne(w, 0)
            calls[CACHED] = lambda w=weight[:CACHED_ROWS], s=select: [
                s(w) for _ in range(max(1, rows // CACHED_ROWS))
            ]
            timed = time_calls({key: Call(call) for key, call in calls.items()}, options.rounds, warmup=1)
            found.append(row_of(what, options.shape, name, timed, microseconds_per="matrix"))
    return found


def statistics_of(cols: int, tokens: int) -> Tensor:
    """A Hessian of correlated inputs."""
    x = normal(tokens, cols, seed=2)
    x[:, 1:] += 0.5 * x[:, :-1]
    return x.T @ x


def check_objective(weight: Tensor, gram: Tensor, ours: Tensor, plain: Tensor, what: str) -> float:
    """Return our output error over the plain sweep's; RuntimeError when it is larger than rounding explains."""
    errors = []
    for pruned in (ours, plain):
        lost = weight - pruned
        errors.append(float(((lost @ gram) * lost).sum()))
    if not errors[0] <= (1 + OBJECTIVE_TOLERANCE) * errors[1]:
        raise RuntimeError(f"{what}: output error {errors[0]:.6g}, the plain sweep's is {errors[1]:.6g}")
    return errors[0] / errors[1]


def sweeps(options: argparse.Namespace) -> list[Row]:
    """The sweep alone, and factor and sweep of one layer and of three that share their inputs."""
    rows, cols = shapes.LINEAR[options.shape]
    weight, gram, found = normal(rows, cols) * 0.02, statistics_of(cols, 2 * cols), []
    upper, scale = inverse_factor(gram, torch_pruning.DAMPING).upper, None
    scale = 1 / upper.diagonal()
    patterns = {"50 %": (None, Unstructured("matrix")), "2:4": ((2, 4), NM(2, 4))}
    for name, (pattern, structure) in patterns.items():
        sweep = structure.sweep_pattern((rows, cols), 0.5, torch_pruning.BLOCK)
        calls = {
            OURS: lambda s=sweep: ops.obs_sweep(weight, upper, scale, s)[0],
            PLAIN: lambda p=pattern: torch_pruning.plain_sweep(weight, upper, p),
            TUNED: lambda p=pattern: torch_pruning.tuned_sweep(weight, upper, p),
        }
        ratio = check_objective(weight, gram, calls[OURS](), calls[PLAIN](), name)
        timed = time_long(calls, options.long_rounds)
        found.append(row_of("sweep", options.shape, name, timed, error_over_plain=ratio))
        for layers in (1, 3):
            timed = time_long(_with_factor(weight, gram, pattern, sweep, layers), options.long_rounds)
            found.append(
                row_of(f"factor and sweep, layers sharing inputs: {layers}", options.shape, name, timed)
            )
    return found


def _with_factor(
    weight: Tensor, gram: Tensor, pattern: torch_pruning.Pattern, sweep: ops.SweepPattern, layers: int
) -> dict[str, Callable[[], Any]]:
    """The published code factors for every layer; ours and the tuned form once for all that share inputs."""

    def ours() -> None:
        factor = inverse_factor(gram.clone(), torch_pruning.DAMPING)
        for _ in range(layers):
            ops.obs_sweep(weight, factor.upper, factor.scale, sweep)

    def plain() -> None:
        for _ in range(layers):
            torch_pruning.plain_sweep(weight, torch_pruning.plain_factor(gram), pattern)

    def tuned() -> None:
        upper = torch_pruning.tuned_factor(gram)
        for _ in range(layers):
            torch_pruning.tuned_sweep(weight, upper, pattern)

    return {OURS: ours, PLAIN: plain, TUNED: tuned}


# --- a whole block -----------------------------------------------------------------------------------------


def block_model(quick: bool) -> nn.Module:
    """One block of Llama-2-7B's shapes, bf16, random weights; a small vocabulary, which is not pruned."""
    size, inner, heads = (64, 96, 4) if quick else (4096, 11008, 32)
    config = LlamaConfig(
        vocab_size=256, hidden_size=size, intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0, 0.02)
        elif "weight" in dict(module.named_parameters(recurse=False)):
            module.weight.data.fill_(1.0)
    model.model.rotary_emb.__init__(config)
    return model.eval()


@torch.no_grad()
def plain_block(model: nn.Module, rows: Tensor, method: str) -> None:
    """The published loop for one block: hooks on every layer, then layer by layer, then the block once more."""
    layers = [layer for layer in discover(model).layers]
    sums: dict[str, Tensor] = {}

    def add(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            seen = x.T @ x if method == "sparsegpt" else x.square().sum(dim=0)
            sums[path] = sums[path] + seen if path in sums else seen

        return hook

    handles = [layer.module.register_forward_pre_hook(add(layer.path)) for layer in layers]
    for row in rows:
        model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    for layer in layers:
        weight, value = layer.weight, sums.pop(layer.path)
        if method == "sparsegpt":
            upper = torch_pruning.plain_factor(value)
            layer.write(torch_pruning.plain_sweep(weight.float(), upper, None))
        else:
            keep = torch_pruning.stable_sort_mask(weight, value.sqrt(), weight.shape[1] // 2)
            layer.write(weight.masked_fill(~keep, 0))


def work(engine: str, method: str, options: argparse.Namespace) -> Row:
    """Prune one block in this process; its seconds and the process's peak memory."""
    model, length = block_model(options.quick), 16 if options.quick else options.length
    rows = torch.randint(3, 256, (options.sequences, length), generator=torch.Generator().manual_seed(0))
    before, start = peak_resident_bytes(), time.perf_counter()
    seconds: Mapping[str, float] = {}
    if engine == OURS:
        seconds = run(discover(model), METHODS[method], 0.5, load_calibration(rows, batch_size=1)).seconds
    else:
        plain_block(model, rows, method)
    return {
        "seconds": time.perf_counter() - start,
        "phases": dict(seconds),
        "peak_bytes": peak_resident_bytes(),
        "before_bytes": before,
    }


def block(options: argparse.Namespace) -> list[Row]:
    """A Llama-2-7B-shaped block, each engine in a process of its own, for the peak of its memory."""
    found = []
    for method in ("wanda", "sparsegpt"):
        engines = {}
        for engine in (OURS, PLAIN):
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", engine, method]
            command += ["--threads", str(options.threads), "--sequences", str(options.sequences)]
            command += ["--length", str(options.length), *(["--quick"] if options.quick else [])]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            engines[engine] = json.loads(output.splitlines()[-1])
        ratio = engines[PLAIN]["seconds"] / engines[OURS]["seconds"]
        found.append(
            {
                "what": "block",
                "shape": "tiny" if options.quick else "llama-2-7b",
                "detail": method,
                "tokens": options.sequences * (16 if options.quick else options.length),
                "engines": engines,
                "speedup_over": {PLAIN: {"median": ratio, "samples": 1}},
            }
        )
    return found


def tables(rows: list[Row]) -> list[Table]:
    columns = ["what", "shape", "", "engine", "time", "ours is faster by (p10..p90)", "peak memory"]
    lines = []
    for row in rows:
        for name, engine in row["engines"].items():
            spread = engine.get("microseconds")
            seconds = engine.get("seconds") or (spread["median"] / 1e6 if spread else None)
            faster = row["speedup_over"].get(name)
            text = f"{faster['median']:.2f}x" if faster else None
            if faster and "p10" in faster:
                text = f"{text} ({faster['p10']:.2f}..{faster['p90']:.2f})"
            peak = megabytes(engine["peak_bytes"]) if "peak_bytes" in engine else None
            time_text = (
                None if seconds is None else f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
            )
            lines.append([row["what"], row["shape"], row["detail"], name, time_text, text, peak])
    return [make_table("pruning", columns, lines)]


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("pruning", __doc__ or "")
    parser.add_argument("--only", nargs="+", choices=("selection", "sweeps", "block"))
    parser.add_argument("--shape", choices=shapes.LINEAR, default="4096x4096")
    parser.add_argument("--rounds", type=int, default=9, help="of short calls; half as many of long ones")
    parser.add_argument("--sequences", type=int, default=4, help="of calibration, for the block")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence, for the block")
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rounds = 3 if options.quick else options.rounds
    options.long_rounds = max(3, (options.rounds + 1) // 2)
    options.shape = shapes.QUICK_SHAPE if options.quick else options.shape
    with torch_threads(threads_of(options)) as threads:
        options.threads = threads
        if options.worker:
            print(json.dumps(work(*options.worker, options)))
            return
        result = Run.start("pruning", options)
        parts = {"selection": selection, "sweeps": sweeps, "block": block}
        rows = [row for name in options.only or parts for row in parts[name](options)]
    protocol = {
        "wait_limit_of_long_samples": LONG_WAIT_LIMIT,
        "threads": threads, "rounds": options.rounds, "long_rounds": options.long_rounds,
        "block": torch_pruning.BLOCK, "damping": torch_pruning.DAMPING, "weights": "random",
        "block_calibration": [options.sequences, options.length],
    }  # fmt: skip
    show(*tables(rows), path=result.save(protocol, rows))


if __name__ == "__main__":
    main()
