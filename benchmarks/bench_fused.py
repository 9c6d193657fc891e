"""Layers that share an input: one call for query, key and value, or gate and up, beside a call for each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import (
    COLD_BYTES,
    Call,
    Rotation,
    Run,
    Timing,
    cold_copies,
    command_line,
    show,
    threads_of,
    time_calls,
)
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.measure.twins import zero_at_random_
from pysparse.nn import fuse_, sparsify_

SEPARATE, FUSED = "separate", "fused"
SPARSITY = 0.7
# (in, out of each) of layers with one input
GROUPS = {
    "llama-2-7b q/k/v": (4096, (4096, 4096, 4096)),
    "llama-2-7b gate/up": (4096, (11008, 11008)),
    "mistral-7b q/k/v": (4096, (4096, 1024, 1024)),
    "hidden 2048 q/k/v": (2048, (2048, 256, 256)),
    "hidden 2048 gate/up": (2048, (5632, 5632)),
    "hidden 1024 q/k/v": (1024, (1024, 512, 512)),
    "hidden 1024 gate/up": (1024, (2816, 2816)),
    "hidden 512 q/k/v": (512, (512, 512, 512)),
    "hidden 512 gate/up": (512, (1408, 1408)),
}
QUICK_GROUPS = ("hidden 512 q/k/v", "hidden 512 gate/up")
MODEL = "llama, hidden 512, 8 blocks"
# What the weights are kept as; float32 is there for one token alone, which is what is fused for.
DTYPES = {"bf16": torch.bfloat16, "int8": torch.bfloat16, "fp32": torch.float32}
TOKENS = {"bf16": (1, 16), "int8": (1, 16), "fp32": (1,)}
SPACES = {"cold": COLD_BYTES, "in cache": 0}
# Of the largest output: separate activations round in bfloat16, so do fused ones, on either side of a boundary.
TOLERANCE = {"bf16": 2.0**-7, "int8": 2.0**-7, "fp32": 1e-5}


class Attention(nn.Module):
    """What q/k/v are called by."""

    def __init__(self, cols: int, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(cols, n, bias=False) for n in rows)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class MLP(nn.Module):
    """What gate and up are called by; the layer after them costs nothing here."""

    def __init__(self, cols: int, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(cols, n, bias=False) for n in rows)
        self.down_proj = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True, slots=True)
class Case:
    """One group of layers, or a whole small model."""

    group: str  # of GROUPS, or MODEL
    dtype: str  # of DTYPES
    tokens: int
    weights: str  # "cold" | "in cache"


def make_module(case: Case) -> nn.Module:
    """The case's layers, packed, each computed by a call of its own."""
    torch.manual_seed(0)
    if case.group == MODEL:
        config = LlamaConfig(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            vocab_size=4096,
        )
        module: nn.Module = LlamaForCausalLM(config)
    else:
        cols, rows = GROUPS[case.group]
        module = (Attention if len(rows) == 3 else MLP)(cols, rows)
    module = module.to(DTYPES[case.dtype]).eval().requires_grad_(False)
    zero_at_random_(module, SPARSITY)
    sparsify_(module, fuse=False, values="int8" if case.dtype == "int8" else None)
    return module


def make_input(case: Case) -> dict[str, Any]:
    if case.group == MODEL:
        return {"input_ids": torch.arange(case.tokens)[None], "use_cache": False}
    cols, _ = GROUPS[case.group]
    return {"x": torch.randn(case.tokens, cols).to(DTYPES[case.dtype])}


def nbytes(module: nn.Module) -> int:
    return sum(b.nbytes for b in module.buffers()) + sum(p.nbytes for p in module.parameters())


def make_calls(case: Case) -> dict[str, Call]:
    """Both ways, each over weights of its own; their answers are compared first."""
    rotations: dict[str, Rotation[nn.Module]] = {
        name: cold_copies(partial(make_module, case), nbytes, SPACES[case.weights])
        for name in (SEPARATE, FUSED)
    }
    arguments = make_input(case)
    for name, rotation in rotations.items():
        for _ in range(len(rotation)):
            module = rotation.take()
            if name == FUSED:
                fuse_(module)
            # Siblings are watched before they are computed together, and a layer makes the second packing that it
            # wants for many tokens at its first call: neither is timed.
            module(**arguments)
            module(**arguments)
    _check(case, rotations, arguments)
    return {
        name: Call(_caller(rotation.take, arguments), torch.no_grad) for name, rotation in rotations.items()
    }


def _caller(take: Callable[[], nn.Module], arguments: dict[str, Any]) -> Callable[[], Any]:
    return lambda: take()(**arguments)


def _check(case: Case, rotations: dict[str, Rotation[nn.Module]], arguments: dict[str, Any]) -> None:
    """RuntimeError when the two ways differ by more than a rounding: a wrong answer is not timed."""
    answers = {name: _tensors(rotation.take()(**arguments)) for name, rotation in rotations.items()}
    for separate, fused in zip(answers[SEPARATE], answers[FUSED], strict=True):
        bound = TOLERANCE[case.dtype] * (4 if case.group == MODEL else 1)
        worst = float((separate - fused).abs().max() / separate.abs().max())
        if not worst <= bound:
            raise RuntimeError(
                f"{case}: fused and separate calls differ by {worst:.3g} of the largest, over {bound:.3g}"
            )


def _tensors(answer: Any) -> tuple[Tensor, ...]:
    if isinstance(answer, Tensor):
        return (answer,)
    return answer if isinstance(answer, tuple) else (answer.logits,)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    groups = QUICK_GROUPS if options.quick else tuple(GROUPS)
    for dtype in ("bf16", "int8") if options.quick else tuple(DTYPES):
        for group in groups:
            for tokens in (1,) if options.quick else TOKENS[dtype]:
                for weights in ("in cache",) if options.quick else tuple(SPACES):
                    yield Case(group, dtype, tokens, weights)
        yield Case(MODEL, dtype, 1, "in cache")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in cases(options):
        if options.only and options.only not in case.group:
            continue
        with torch.no_grad():
            calls = make_calls(case)
        timings = time_calls(calls, options.rounds, options.sample_seconds)
        yield _record(case, timings)


def _record(case: Case, timings: dict[str, Timing]) -> dict[str, Any]:
    saved = timings[FUSED].speedup_over(timings[SEPARATE])
    return {
        "group": case.group, "dtype": case.dtype, "tokens": case.tokens, "weights": case.weights,
        "sparsity": SPARSITY, **{name: timing.record() for name, timing in timings.items()},
        "fused_speedup_over_separate": to_jsonable(saved),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    lines = [
        [
            row["group"], row["dtype"], row["tokens"], row["weights"], *(_median(row[n]["microseconds"]) for n in
            (SEPARATE, FUSED)), _median(row["fused_speedup_over_separate"], "median"),
            _median(row["fused_speedup_over_separate"], "p10"), _median(row["fused_speedup_over_separate"], "p90"),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["layers", "dtype", "tokens", "weights", "separate us", "fused us", "speed-up", "p10", "p90"]
    return make_table(f"one call instead of several, {SPARSITY:.0%} zeros", columns, lines)


def _median(spread: dict[str, Any] | None, figure: str = "median") -> float | None:
    return None if spread is None else float(spread[figure])


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("fused", __doc__ or "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sample-seconds", type=float, default=0.008)
    parser.add_argument("--only", help="groups whose name holds this text")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.sample_seconds = 3, 0.001
    this = Run.start("fused", options)
    with torch_threads(options.threads):
        rows = list(run(options))
        protocol = {
            "threads": threads_of(options),
            "rounds": options.rounds,
            "separate": "a call for each layer; for gate/up torch's silu and product",
            "dtype": "of weights and activations; int8: int8 values under bf16 activations",
            "fused": "the same modules after fuse_",
            "figure": "microseconds for the whole group, from Python, without gradients",
        }
        path = this.save(protocol, rows)
    show(table(rows), path=path)


if __name__ == "__main__":
    main()
