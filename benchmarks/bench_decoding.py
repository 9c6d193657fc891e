"""What a model computes beside its linear layers, piece by piece: torch's operations beside one call of the core."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import shapes
import torch
from harness import Call, Run, Timing, command_line, show, threads_of, time_calls
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from pysparse import ops
from pysparse.attention.exact import one_row_attention
from pysparse.huggingface.cache import RoomyLayer
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.nn import fuse_norms_

EAGER, PRODUCTS, OURS = "torch", "two batched products of torch", "pysparse"
HEADS = {"llama-2-7b": (32, 32), "llama-3-8b": (32, 8)}  # of queries, of keys
HEAD_DIM = 128
TOKENS, CONTEXTS = (1, 16, 512), (32, 512, 4096)
APPENDED = 256  # tokens that a cache takes before it starts again from its prompt

Function = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Case:
    part: str
    shape: str
    dtype: torch.dtype
    size: int  # tokens of the call, or keys that it attends to

    def draw(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=torch.Generator().manual_seed(len(sizes))).to(self.dtype)

    def states(self, heads: int, rows: int) -> Tensor:
        """[1, heads, rows, dim], laid out as a projection leaves it."""
        return self.draw(1, rows, heads, HEAD_DIM).transpose(1, 2)


def norm_calls(case: Case) -> dict[str, Function]:
    width = HEADS[case.shape][0] * HEAD_DIM
    x, modules = case.draw(1, case.size, width), {}
    for name in (EAGER, OURS):
        modules[name] = LlamaRMSNorm(width).to(case.dtype)
    if not fuse_norms_(modules[OURS]):
        raise RuntimeError("the norm was not taken for one: is there a compiled core?")
    return {name: partial(module, x) for name, module in modules.items()}


def rotary_calls(case: Case) -> dict[str, Function]:
    heads, key_heads = HEADS[case.shape]
    angles = case.draw(1, case.size, HEAD_DIM)
    parts = case.states(heads, case.size), case.states(key_heads, case.size), angles.cos(), angles.sin()

    def ours() -> tuple[Tensor, Tensor]:
        assert ops.can_rotate(*parts)
        return ops.call_rotary(*parts)

    return {EAGER: lambda: apply_rotary_pos_emb(*parts), OURS: ours}


def attention_calls(case: Case) -> dict[str, Function]:
    heads, key_heads = HEADS[case.shape]
    query, key, value = (case.draw(1, n, m, HEAD_DIM) for n, m in
                         ((heads, 1), (key_heads, case.size), (key_heads, case.size)))  # fmt: skip
    scale = HEAD_DIM**-0.5

    def ours() -> Tensor:
        assert ops.can_row_attend(query, key, value)
        return ops.call_row_attention(query, key, value, scale)

    return {
        EAGER: lambda: functional.scaled_dot_product_attention(
            query, key, value, scale=scale, enable_gqa=heads != key_heads
        ).transpose(1, 2),
        PRODUCTS: lambda: one_row_attention(query, key, value, scale),
        OURS: ours,
    }


def cache_calls(case: Case) -> dict[str, Function]:
    key_heads = HEADS[case.shape][1]
    prompt, token = case.draw(1, key_heads, case.size, HEAD_DIM), case.draw(1, key_heads, 1, HEAD_DIM)
    return {
        name: _appender(kind, prompt, token) for name, kind in ((EAGER, DynamicLayer), (OURS, RoomyLayer))
    }


def _appender(kind: type[DynamicLayer], prompt: Tensor, token: Tensor) -> Function:
    layer, limit = kind(), prompt.shape[2] + APPENDED

    def append() -> tuple[Tensor, Tensor]:
        if layer.get_seq_length() in (0, limit):
            layer.reset()
            layer.update(prompt, prompt)
        return layer.update(token, token)

    return append


PARTS: dict[str, tuple[Callable[[Case], dict[str, Function]], tuple[int, ...]]] = {
    "norm": (norm_calls, TOKENS),
    "rotary": (rotary_calls, TOKENS),
    "attention": (attention_calls, CONTEXTS),
    "cache": (cache_calls, CONTEXTS),
}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for part, (_, sizes) in PARTS.items():
        for dtype in ("bf16",) if options.quick else shapes.DTYPES:
            for shape in HEADS:
                if part == "norm" and shape != "llama-2-7b":
                    continue  # the same width
                for size in sizes[:1] if options.quick else sizes:
                    yield Case(part, shape, shapes.DTYPES[dtype], size)


def check(case: Case, calls: dict[str, Function]) -> None:
    """RuntimeError when two ways differ by more than their roundings: a wrong answer is not timed."""
    answers = {name: call() for name, call in calls.items()}
    expected = answers.pop(EAGER)
    # sums over so many keys, by whatever order
    bound = 8 * torch.finfo(case.dtype).eps * (case.size**0.5 if case.part == "attention" else 1)
    for name, answer in answers.items():
        pairs = zip(answer, expected, strict=True) if isinstance(answer, tuple) else [(answer, expected)]
        for one, other in pairs:
            worst = float((one.float() - other.float()).abs().max() / other.float().abs().max())
            if not worst <= bound:
                raise RuntimeError(f"{case}: {name} differs from torch by {worst:.3g} of the largest value")


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in cases(options):
        with torch.no_grad():
            calls = PARTS[case.part][0](case)
            check(case, calls)
        timings = time_calls(
            {name: Call(call, torch.no_grad) for name, call in calls.items()}, options.rounds,
            options.sample_seconds,
        )  # fmt: skip
        yield record(case, timings)


def record(case: Case, timings: dict[str, Timing]) -> dict[str, Any]:
    dtype = str(case.dtype).removeprefix("torch.")
    return {
        "part": case.part, "shape": case.shape, "dtype": dtype, "size": case.size,
        **{name: timing.record() for name, timing in timings.items()},
        "speedup_over_torch": to_jsonable(timings[OURS].speedup_over(timings[EAGER])),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    def median(spread: dict[str, Any] | None, figure: str = "median") -> float | None:
        return None if spread is None else float(spread[figure])

    lines = [
        [
            row["part"], row["shape"], row["dtype"], row["size"],
            *(median(row.get(name, {}).get("microseconds")) for name in (EAGER, PRODUCTS, OURS)),
            *(median(row["speedup_over_torch"], figure) for figure in ("median", "p10", "p90")),
        ]
        for row in rows
    ]  # fmt: skip
    columns = [
        "part",
        "shape",
        "dtype",
        "tokens or keys",
        "torch us",
        "products us",
        "ours us",
        "x torch",
        "p10",
        "p90",
    ]
    return make_table("beside the linear layers, one layer, batch 1, in the caches", columns, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("decoding", __doc__ or "")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sample-seconds", type=float, default=0.008)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.sample_seconds = 3, 0.001
    this = Run.start("decoding", options)
    with torch_threads(options.threads):
        rows = list(run(options))
        protocol = {
            "threads": threads_of(options), "rounds": options.rounds,
            "torch": "transformers' module or function; attention: scaled_dot_product_attention",
            "size": "norm, rotary: tokens of the call; attention: keys; cache: tokens held at first, up to 256 more",
            "figure": "microseconds a call from Python, without gradients, in the caches",
        }  # fmt: skip
        path = this.save(protocol, rows)
    show(table(rows), path=path)


if __name__ == "__main__":
    main()
