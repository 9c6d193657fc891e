"""What sparse attention loses and gains: recall against density and time, retrieval, time to first token.

    python benchmarks/bench_attention_quality.py [--only curves retrieval first-token plugin] [--model DIR] [--quick]

curves: every planner over a sweep of its knob on synthetic calls (Hq 8, Hk 2, D 128, bf16) and on the trained model's:
density, recall, error; then the settings that reach recall 0.95 and 0.99 at the least density race against our exact
attention, in turn.
retrieval: needles and long copies by the model of ``retrieval_model/train.py`` (``--model``), planner by planner.
first-token: a Llama-shaped model of 16 layers, random weights, through ``generate()``.
plugin: prompts of 512 to 4k tokens, where a planner has little to gain and must cost nothing.
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
from attention_curves import Measured, Source, curve_rows, families, measure, race, synthetic, timed, trained
from harness import Run, command_line, read_runs, result_path, show
from retrieval_model.tasks import Tasks, local_text
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pysparse
from pysparse.attention import Planner
from pysparse.attention.quality import plot_curves, plot_head
from pysparse.attention.synthetic import Synthetic
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.methods import PLANNERS, AnchorAttention, ProxyAttention

Row = dict[str, Any]
FLASH = "pysparse_flash"


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_curves(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Recall of every setting on synthetic calls, and with --model on the trained model's; then the race."""
    for source in sources(options):
        made = families(source.length, options.quick)
        wanted = {name: made[name] for name in options.families}
        planners = {str(planner): planner for family in wanted.values() for planner in family}
        measured = measure(source, wanted, 64 if options.quick else options.rows)
        points = list(curve_rows(source, measured))
        yield points
        yield race(source, points, planners, options.rounds)
        if options.plot is not None:
            draw(options.plot, source, measured)


def sources(options: argparse.Namespace) -> Iterator[Source]:
    for length in options.lengths:
        yield synthetic(length, options.seed)
    if options.model is not None:
        for length in options.model_lengths:
            yield trained(options.model, length, options.seed)


def draw(folder: Path, source: Source, measured: Measured) -> None:
    """Curves over the source's first call, and one of its heads with what AnchorAttention computes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{source.name.replace(' ', '_')}_{source.length}"
    first = {family: calls[0] for family, calls in measured.items()}
    plot_curves(folder / f"recall_{name}.png", first, f"{source.name}, {source.length} tokens")
    given = source.inputs[-1]
    plot_head(folder / f"head_{name}.png", given, AnchorAttention(8.0, 512).plan(given))


# What AnchorAttention loses follows the rows of a pool, whose queries are averaged, more than theta.
POOLS = {
    "anchor, theta 24": AnchorAttention(theta=24.0),
    "anchor, pools of 8 rows": AnchorAttention(group_size=512, step=64),
    "anchor, pools of 4 rows": AnchorAttention(group_size=256, step=64),
    "anchor, pools of 4 rows, theta 24": AnchorAttention(theta=24.0, group_size=256, step=64),
}


def measure_retrieval(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Needles at several depths and long copies: share of answer bytes right, teacher-forced, by planner."""
    if options.model is None:
        yield [{"what": "retrieval", "skipped": "no --model: make one with retrieval_model/train.py"}]
        return
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    planners: dict[str, Planner | None] = {"exact": None, **PLANNERS, **POOLS}  # as people get them
    for length in options.retrieval_lengths:
        for name, planner in planners.items():
            pysparse.use_attention(model, planner, min_length=0, max_density=1.0)
            tasks = Tasks(local_text(), options.seed)  # the same questions for every planner
            depths = [(turn + 0.5) / options.questions for turn in range(options.questions)]
            with pysparse.attention_options(planner, min_length=0, max_density=1.0, sample_rows=64) as log:
                needle = [answered(model, *tasks.needle(length, depth)) for depth in depths]
                copy = [answered(model, *tasks.long_copy(length)) for _ in range(options.questions)]
            total = log.total("dense" if planner is None else "sparse")
            yield [
                {"what": "retrieval", "length": length, "planner": name, "setting": str(planner),
                 "needle": statistics.mean(needle), "copy": statistics.mean(copy), "density": total.density,
                 "recall": total.recall}
            ]  # fmt: skip


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


# Random weights attend nearly evenly, so that no planner could skip much without a loss: what is measured is time,
# at a density that the settings fix (few logits come within -1 of the maximum over the anchor region).
ENGINES: dict[str, tuple[str, Planner | None]] = {
    "sdpa": ("sdpa", None),
    "pysparse_flash": ("pysparse_flash", None),
    "pysparse_anchor": ("pysparse_anchor", AnchorAttention(theta=-1.0, group_size=512)),
    "pysparse_proxy": ("pysparse_proxy", ProxyAttention(gamma=0.1, minimum=1024)),
}


def measure_first_token(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Seconds to the first token through generate(), engines in turn, the fastest of the rounds."""
    torch.manual_seed(options.seed)
    with llama(2 if options.quick else 16) as model:
        for length in options.prompt_lengths:
            # Without token 0, the padding: generate() would make a mask with a hole at each, an N x N one.
            prompt = torch.randint(1, 1024, (1, length))
            measured = [
                first_token(model, name, prompt)
                for _ in range(options.prompt_rounds)
                for name in options.engines
            ]
            best = [
                min((row for row in measured if row["engine"] == name), key=lambda row: row["seconds"])
                for name in options.engines
            ]
            seconds = {row["engine"]: row["seconds"] for row in best}
            for row in best:
                for base, key in (("sdpa", "faster_than_sdpa"), ("pysparse_flash", "faster_than_flash")):
                    row[key] = seconds[base] / row["seconds"] if base in seconds else None
            yield best


def first_token(model: LlamaForCausalLM, name: str, prompt: torch.Tensor) -> Row:
    implementation, planner = ENGINES[name]
    model.set_attn_implementation(implementation)
    with pysparse.attention_options(planner, max_density=1.0) as log:
        seconds = seconds_of(
            lambda: model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
        )
    attention = sum(
        log.total(way).select_seconds + log.total(way).compute_seconds for way in ("sparse", "dense")
    )
    return {"what": "first token", "length": prompt.shape[1], "engine": name, "setting": str(planner),
            "seconds": seconds, "attention_seconds": attention or None,
            "density": log.total("sparse").density or 1.0, "fallbacks": log.fallbacks}  # fmt: skip


def measure_plugin(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Prompts too short for a planner to gain: a forward pass of 2 layers by the plug-in beside its exact way."""
    torch.manual_seed(options.seed)
    with llama(2) as model:
        for length in (256,) if options.quick else (512, 1024, 2048, 4096):
            prompt = torch.randint(1024, (1, length))
            calls = {
                name: forward(model, name, prompt)
                for name in ("sdpa", FLASH, "pysparse_anchor", "pysparse_proxy")
            }
            with pysparse.attention_options("anchor") as log:
                forward(model, "pysparse_anchor", prompt)()
            timings = timed(calls, options.plugin_rounds)
            yield [
                {"what": "plug-in", "length": length, "engine": name, **timing.record(),
                 "faster_than_flash": to_jsonable(timing.speedup_over(timings[FLASH])),
                 "reasons": log.fallbacks if name == "pysparse_anchor" else {}}
                for name, timing in timings.items()
            ]  # fmt: skip


def forward(model: LlamaForCausalLM, implementation: str, prompt: torch.Tensor) -> Callable[[], Any]:
    def call() -> None:
        model.set_attn_implementation(implementation)
        model(prompt, use_cache=False, logits_to_keep=1)

    return call


def cell(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        value = value["median"]
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def tables(rows: list[Row]) -> list[Table]:
    """One table for each kind of row."""
    shown = {
        "equal recall": ("source", "length", "target", "planner", "setting", "density", "recall", "select_ms",
                         "compute_ms", "faster_than_dense", "faster_than_flexprefill"),
        "retrieval": ("length", "planner", "needle", "copy", "density", "recall"),
        "first token": ("length", "engine", "seconds", "attention_seconds", "density", "faster_than_sdpa",
                        "faster_than_flash"),
        "plug-in": ("length", "engine", "microseconds", "faster_than_flash", "reasons"),
    }  # fmt: skip
    found = []
    for what, columns in shown.items():
        lines = [
            tuple(cell(row.get(column, "")) for column in columns) for row in rows if row["what"] == what
        ]
        if lines:
            found.append(make_table(what, columns, lines))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("attention_quality", __doc__ or "")
    parser.add_argument("--only", nargs="+", choices=("curves", "retrieval", "first-token", "plugin"))
    parser.add_argument("--model", type=Path, help="folder that retrieval_model/train.py wrote")
    parser.add_argument("--plot", type=Path, help="folder for curves and heat maps")
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[8192, 16384, 32768], help="of synthetic calls"
    )
    parser.add_argument("--model-lengths", type=int, nargs="*", default=[8192])
    parser.add_argument("--families", nargs="+", choices=list(PLANNERS), default=list(PLANNERS))
    parser.add_argument("--rows", type=int, default=256, help="of a call whose recall is measured")
    parser.add_argument("--retrieval-lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument(
        "--prompt-lengths", type=int, nargs="+", default=[16384], help="32768 takes some minutes"
    )
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-rounds", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--plugin-rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.quick:
        options.plugin_rounds = 3
        options.lengths, options.retrieval_lengths, options.prompt_lengths = [1536], [256], [1536]
        options.questions, options.rounds, options.prompt_rounds = 2, 3, 1
    parts = {"curves": measure_curves, "retrieval": measure_retrieval, "first-token": measure_first_token,
             "plugin": measure_plugin}  # fmt: skip
    with torch_threads(options.threads) as threads, torch.no_grad():
        run = Run.start("attention_quality", options)
        path, rows = result_path(run), []
        earlier = read_runs(path) if options.append and path is not None and path.exists() else []
        made = dataclasses.asdict(Synthetic(8192, seed=options.seed))
        protocol = {"threads": threads, "dtype": "bfloat16", "heads": [8, 2], "head_dim": 128, "seed": options.seed,
                    "synthetic": made}  # fmt: skip
        for name in options.only or parts:
            for some in parts[name](options):  # kept as they come: a run takes long
                rows += some
                run.save(protocol, rows, earlier)
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
