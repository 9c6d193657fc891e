"""What sparse attention loses and gains: recall against density and time, retrieval, time to first token.

    python benchmarks/bench_attention_quality.py [--only curves retrieval first-token] [--model DIR] [--quick]

curves: every planner over a sweep of its knob on synthetic inputs (Hq 8, Hk 2, D 128, bf16): density, recall, error,
time against our exact attention, interleaved; and for recall 0.95 and 0.99 the fastest setting that reaches it.
retrieval: needles and long copies by the model of ``retrieval_model/train.py`` (``--model``), planner by planner.
first-token: a Llama-shaped model of 16 layers, random weights, through ``generate()``.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import Run, command_line, show
from retrieval_model.tasks import Tasks, local_text
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pysparse
from pysparse.attention import AttentionInput, Fused, Planner, attend, dense
from pysparse.attention.quality import curves, plot_curves, plot_head
from pysparse.attention.synthetic import Synthetic
from pysparse.measure.results import make_table
from pysparse.measure.rounds import torch_threads
from pysparse.methods import (
    PLANNERS,
    AnchorAttention,
    FlexPrefill,
    ProxyAttention,
    StreamingAttention,
    VerticalSlash,
    XAttention,
)

Row = dict[str, Any]
TARGETS = (0.95, 0.99)
REACH = {
    "anchor": 1.44
}  # times faster than the FlexPrefill-like planner at equal recall: the published figure


def families(quick: bool) -> dict[str, list[Planner]]:
    """Each planner over its knob; AnchorAttention with small groups too, which cut the part that is always dense."""
    gammas = (0.8, 0.95) if quick else (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    thetas = (2.0, 8.0) if quick else (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
    return {
        "anchor": [AnchorAttention(theta, group) for theta in thetas for group in (512, 1024)],
        "proxy": [ProxyAttention(gamma, minimum=512) for gamma in gammas],
        "flexprefill": [FlexPrefill(gamma) for gamma in gammas],
        "xattention": [XAttention(gamma) for gamma in gammas],
        "vertical-slash": [
            VerticalSlash(n, 2 * n) for n in ((128, 512) if quick else (64, 128, 256, 512, 1024))
        ],
        "streaming": [StreamingAttention(128, n) for n in ((256,) if quick else (256, 1024, 4096))],
    }


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run_planner(given: AttentionInput, planner: Planner) -> Callable[[], Any]:
    return (lambda: planner.attend(given)) if isinstance(planner, Fused) else (lambda: attend(given, planner))


def measure_curves(options: argparse.Namespace) -> list[Row]:
    rows = []
    for length in options.lengths:
        made = Synthetic(length, seed=options.seed).make(torch.bfloat16)
        given = AttentionInput.of(*made)
        measured = curves(given, families(options.quick), rows=64 if options.quick else 256)
        for family, points in measured.items():
            rows += [
                point.to_dict()
                | {"what": "curve", "length": length, "planner": family, "setting": str(point.planner)}
                | timed(given, point.planner, options.rounds)
                for point in points
            ]
        if options.plot is not None:
            plot_curves(options.plot / f"recall_{length}.png", measured, f"synthetic, {length} tokens")
            best = AnchorAttention(6.0, 512)
            plot_head(options.plot / f"head_{length}.png", given, best.plan(given))
    return rows + [row for length in options.lengths for row in at_equal_recall(rows, length)]


def timed(given: AttentionInput, planner: Planner, rounds: int) -> Row:
    """Median milliseconds of planner and exact attention, a call of each a round, and their ratio."""
    call = run_planner(given, planner)
    call()
    pairs = [(seconds_of(call), seconds_of(lambda: dense(given))) for _ in range(rounds)]
    return {
        "ms": 1e3 * statistics.median(ours for ours, _ in pairs),
        "dense_ms": 1e3 * statistics.median(exact for _, exact in pairs),
        "faster_than_dense": statistics.median(exact / ours for ours, exact in pairs),
    }


def at_equal_recall(rows: list[Row], length: int) -> list[Row]:
    """For each target recall the fastest setting of each planner that reaches it, and how it compares."""
    found = []
    for target in TARGETS:
        best: dict[str, Row] = {}
        for row in rows:
            if row["length"] == length and row["recall"] >= target:
                held = best.get(row["planner"])
                if held is None or row["faster_than_dense"] > held["faster_than_dense"]:
                    best[row["planner"]] = row
        other = best.get("flexprefill")
        for family, row in best.items():
            ratio = row["faster_than_dense"] / other["faster_than_dense"] if other else None
            found.append(
                {"what": "equal recall", "length": length, "target": target, "planner": family,
                 "setting": row["setting"],
                 "density": row["density"], "recall": row["recall"],
                 "faster_than_dense": row["faster_than_dense"], "faster_than_flexprefill": ratio,
                 "wanted": REACH.get(family)}
            )  # fmt: skip
    return found


@torch.no_grad()
def measure_retrieval(options: argparse.Namespace) -> list[Row]:
    """Needles at several depths and long copies: share of answer bytes right, teacher-forced, by planner."""
    if options.model is None:
        return [{"what": "retrieval", "skipped": "no --model: make one with retrieval_model/train.py"}]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    planners: dict[str, Planner | None] = {"exact": None, **PLANNERS}  # as people get them
    rows = []
    for length in options.retrieval_lengths:
        for name, planner in planners.items():
            pysparse.use_attention(model, planner, min_length=0, max_density=1.0)
            tasks = Tasks(local_text(), options.seed)  # the same questions for every planner
            depths = [(turn + 0.5) / options.questions for turn in range(options.questions)]
            with pysparse.attention_options(planner, min_length=0, max_density=1.0, sample_rows=64) as log:
                needle = [answered(model, *tasks.needle(length, depth)) for depth in depths]
                copy = [answered(model, *tasks.long_copy(length)) for _ in range(options.questions)]
            total = log.total("dense" if planner is None else "sparse")
            rows.append(
                {"what": "retrieval", "length": length, "planner": name, "setting": str(planner),
                 "needle": statistics.mean(needle), "copy": statistics.mean(copy), "density": total.density,
                 "recall": total.recall}
            )  # fmt: skip
    return rows


def answered(model: torch.nn.Module, prompt: torch.Tensor, answer: torch.Tensor) -> float:
    """Return the share of the answer's bytes that the model puts first, each given the ones before it."""
    tokens = torch.cat([prompt, answer]).unsqueeze(0)
    logits = model(tokens, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return float((logits.argmax(-1) == answer).float().mean())


@contextmanager
def llama(layers: int) -> Iterator[LlamaForCausalLM]:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=128, max_position_embeddings=65536,
        eos_token_id=None,
    )  # fmt: skip
    yield LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def measure_first_token(options: argparse.Namespace) -> list[Row]:
    """Seconds to the first token through generate(); random weights attend evenly, so density is set by the planner."""
    rows = []
    torch.manual_seed(options.seed)
    anchor = AnchorAttention(theta=-1.0, group_size=512)  # of random weights' logits few are near the maximum
    engines: dict[str, tuple[str, Planner | None]] = {
        "sdpa": ("sdpa", None),
        "pysparse_flash": ("pysparse_flash", None),
        "pysparse_anchor": ("pysparse_anchor", anchor),
        "pysparse_proxy": ("pysparse_proxy", ProxyAttention(gamma=0.1, minimum=1024)),
    }
    with llama(2 if options.quick else 16) as model:
        for length in options.prompt_lengths:
            prompt = torch.randint(1024, (1, length))
            for name, (implementation, planner) in engines.items():
                model.set_attn_implementation(implementation)
                with pysparse.attention_options(planner, max_density=1.0) as log:
                    call = lambda: model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)  # noqa: B023, E731
                    seconds = [seconds_of(call) for _ in range(options.prompt_rounds)]
                density = log.total("sparse").density or 1.0
                rows.append(
                    {"what": "first token", "length": length, "long": length > 16384, "planner": name,
                     "setting": str(planner), "seconds": min(seconds), "density": density,
                     "fallbacks": log.fallbacks}
                )  # fmt: skip
            base = {row["planner"]: row["seconds"] for row in rows if row.get("length") == length}
            for row in rows:
                if row.get("length") == length:
                    row["faster_than_sdpa"] = base["sdpa"] / row["seconds"]
                    row["faster_than_flash"] = base["pysparse_flash"] / row["seconds"]
    return rows


def tables(rows: list[Row]) -> list[Table]:
    """One table for each kind of row."""
    shown = {
        "equal recall": ("length", "target", "planner", "setting", "density", "recall", "faster_than_dense",
                         "faster_than_flexprefill"),
        "retrieval": ("length", "planner", "needle", "copy", "density", "recall"),
        "first token": ("length", "planner", "seconds", "density", "faster_than_sdpa", "faster_than_flash"),
    }  # fmt: skip
    found = []
    for what, columns in shown.items():
        lines = [
            tuple(f"{v:.3f}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns))
            for row in rows
            if row["what"] == what
        ]
        if lines:
            found.append(make_table(what, columns, lines))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("attention_quality", __doc__ or "")
    parser.add_argument("--only", nargs="+", choices=("curves", "retrieval", "first-token"))
    parser.add_argument("--model", type=Path, help="folder that retrieval_model/train.py wrote")
    parser.add_argument("--plot", type=Path, help="folder for curves and heat maps")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--retrieval-lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument(
        "--prompt-lengths", type=int, nargs="+", default=[16384], help="32768 takes some minutes"
    )
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.quick:
        options.lengths, options.retrieval_lengths, options.prompt_lengths = [1536], [256], [1536]
        options.questions, options.rounds, options.prompt_rounds = 2, 1, 1
    parts = {"curves": measure_curves, "retrieval": measure_retrieval, "first-token": measure_first_token}
    with torch_threads(options.threads) as threads:
        run = Run.start("attention_quality", options)
        rows = [row for name in options.only or parts for row in parts[name](options)]
    protocol = {"threads": threads, "dtype": "bfloat16", "heads": [8, 2], "head_dim": 128, "seed": options.seed,
                "synthetic": dataclasses.asdict(Synthetic(options.lengths[0], seed=options.seed))}  # fmt: skip
    show(*tables(rows), path=run.save(protocol, rows))


if __name__ == "__main__":
    main()
