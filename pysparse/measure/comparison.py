"""Dense and sparse engines of one model side by side: speed, memory, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pysparse.measure.latency import (
    DecodeTiming,
    PrefillTiming,
    bytes_per_step,
    decode_benchmark,
    prefill_benchmark,
    random_tokens,
)
from pysparse.measure.machine import last_level_cache_bytes, machine_card
from pysparse.measure.memory import model_bytes, peak_memory
from pysparse.measure.quality import evaluating
from pysparse.measure.results import (
    Chart,
    Result,
    make_table,
    megabytes,
    save_plot,
    to_jsonable,
)
from pysparse.measure.rounds import torch_threads

TORCH_DENSE = "torch dense"
KERNEL_DENSE = "pysparse dense"
SPARSE = "pysparse sparse"
_DISTURBED = 0.1  # share of time in the run queue above which a timing is called disturbed


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is run."""

    prompt_len: int = 64
    new_tokens: int = 32
    batch_size: int = 1
    rounds: int = 5
    warmup: int = 1
    threads: int | None = None  # None: torch's number
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BenchResult(Result):
    """Engines side by side; the first one is the baseline of every speed-up."""

    title: str
    settings: dict[str, Any]
    decode: dict[str, DecodeTiming]  # empty for models that do not generate
    prefill: dict[str, PrefillTiming]
    model_bytes: dict[str, int]  # parameters and buffers
    difference: dict[str, dict[str, float]]  # largest logit difference to the baseline, and its scale
    memory: dict[str, Any]
    machine: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Return a rich table: one column an engine, figures as rows, speed-ups beside the figures."""
        engines = list(self.prefill)
        rows: list[list[Any]] = []
        if self.decode:
            decode = [self.decode[name] for name in engines]
            rows += [
                [
                    "decode tokens/s",
                    *(_with_ratio(one.tokens_per_second, one.speedup.median) for one in decode),
                ],
                ["  ms per token p50", *(one.milliseconds_p50 for one in decode)],
                ["  p90", *(one.milliseconds_p90 for one in decode)],
                ["  p99", *(one.milliseconds_p99 for one in decode)],
                ["  speed-up p10..p90", *(f"{one.speedup.p10:.2f}..{one.speedup.p90:.2f}" for one in decode)],
                ["time to first token ms", *(one.first_token_milliseconds.median for one in decode)],
                ["weights read per token", *(megabytes(one.bytes_per_step) for one in decode)],
            ]
        prefill = [self.prefill[name] for name in engines]
        rows.append(
            [
                "prefill tokens/s, no head",
                *(_with_ratio(o.tokens_per_second, o.speedup.median) for o in prefill),
            ]
        )
        rows.append(["model in memory", *(megabytes(self.model_bytes[name]) for name in engines)])
        return make_table(self.title, ["", *engines], rows, caption="\n".join([self.header(), *self.notes]))

    def header(self) -> str:
        """Return one line on machine and settings."""
        card, s = self.machine, self.settings
        load = card["load_average"][0] if card.get("load_average") else float("nan")
        return (
            f"{card.get('cpu')}, {card.get('pysparse_isa')}, {s['threads']} threads, {s['dtype']}, batch "
            f"{s['batch_size']}, prompt {s['prompt_len']}, {s['rounds']} interleaved rounds of "
            f"{s['new_tokens']} tokens; load {load:.1f} on {card.get('cores')} cores"
        )

    def plot(self, path: str | Path) -> Path:
        """Draw tokens per second as bars into ``path``; RuntimeError without matplotlib."""
        charts = [
            _bars("decode", {name: one.tokens_per_second for name, one in self.decode.items()}),
            _bars("prefill", {name: one.tokens_per_second for name, one in self.prefill.items()}),
        ]
        charts = [chart for chart in charts if chart.x_names]
        return save_plot(path, charts, caption=f"{self.title}: {self.header()}")

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _bars(title: str, speeds: Mapping[str, float]) -> Chart:
    series = {"": (list(range(len(speeds))), list(speeds.values()))}
    return Chart(title, "", "tokens/s", series, bars=True, x_names=list(speeds))


def _with_ratio(value: float, ratio: float) -> str:
    return f"{value:.1f}  ({ratio:.2f}x)"


def compare_speed(
    models: Mapping[str, nn.Module],
    settings: BenchSettings,
    *,
    title: str = "dense and sparse, interleaved in one process",
    weights: str = "the model's own",
    notes: tuple[str, ...] = (),
    difference: dict[str, dict[str, float]] | None = None,
    on_round: Callable[[str, int, int], None] | None = None,
) -> BenchResult:
    """Time ``models`` (engine name -> model; the first is the baseline) and compare their logits once.

    All must have one dtype. ``difference`` replaces the comparison of logits where the caller has made it,
    as for engines that hold different zeros. ``weights`` says where the weights come from and goes into the
    result. ``on_round(phase, done, total)`` reports progress.
    """
    phase = (lambda name: None) if on_round is None else (lambda name: lambda d, t: on_round(name, d, t))
    card = machine_card()  # before the timing: the load that others make, not ours
    with torch_threads(settings.threads) as threads, peak_memory() as memory:
        difference = logit_difference(models, settings) if difference is None else difference
        common: dict[str, Any] = {"rounds": settings.rounds, "warmup": settings.warmup, "seed": settings.seed}
        decode: dict[str, DecodeTiming] = {}
        if all(hasattr(model, "generate") for model in models.values()):
            decode = decode_benchmark(
                models, settings.prompt_len, settings.new_tokens, settings.batch_size,
                on_round=phase("decode"), **common,
            )  # fmt: skip
        prefill = prefill_benchmark(
            models, settings.prompt_len, settings.batch_size, on_round=phase("prefill"), **common
        )
        card["torch_threads"] = threads
    dtype = getattr(next(iter(models.values())), "dtype", "unknown")
    stated = {
        **to_jsonable(settings),
        "threads": threads,
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "engines": list(models),
        "order": "round robin, turned every round; speed-up = median of per-round ratios",
    }
    sizes = {name: model_bytes(model).total for name, model in models.items()}
    warnings = [*notes, *_warnings(models, decode, prefill, card)]
    return BenchResult(title, stated, decode, prefill, sizes, difference, to_jsonable(memory), card, warnings)


def logit_difference(models: Mapping[str, nn.Module], settings: BenchSettings) -> dict[str, dict[str, float]]:
    """Return each further engine's largest difference of outputs to the first's, on one prompt."""
    names = list(models)
    tokens = random_tokens(models[names[0]], 1, settings.prompt_len, settings.seed)
    with evaluating(*models.values()):
        outputs = {name: _first_tensor(model(input_ids=tokens)).float() for name, model in models.items()}
    reference = outputs[names[0]]
    scale = float(reference.abs().max())
    return {
        name: {"max_difference": float((outputs[name] - reference).abs().max()), "max_value": scale}
        for name in names[1:]
    }


def _first_tensor(output: Any) -> torch.Tensor:
    tensor = getattr(output, "logits", None)
    tensor = getattr(output, "last_hidden_state", None) if tensor is None else tensor
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{type(output).__name__} has neither logits nor last_hidden_state to compare")
    return tensor


def _warnings(
    models: Mapping[str, nn.Module],
    decode: Mapping[str, DecodeTiming],
    prefill: Mapping[str, PrefillTiming],
    card: Mapping[str, Any],
) -> list[str]:
    cache = last_level_cache_bytes()
    smallest = min(bytes_per_step(model) for model in models.values())
    state = "cold" if smallest > cache else "partly or wholly in the cache"
    read = f"an engine reads {megabytes(smallest)} or more a token, last-level cache {megabytes(cache)}"
    found = [f"weights {state}: {read}"]
    if card.get("busy"):
        found.append(
            f"BUSY: load {card['load_average'][0]:.1f} on {card['cores']} cores; repeat on a quiet machine"
        )
    phases: dict[str, Mapping[str, DecodeTiming | PrefillTiming]] = {"decode": decode, "prefill": prefill}
    disturbed = [
        f"{phase} {name} {one.waited:.0%}"
        for phase, timings in phases.items()
        for name, one in timings.items()
        if one.waited > _DISTURBED
    ]
    first, *others = [one.first_token_milliseconds.median for one in decode.values()] or [0.0]
    if TORCH_DENSE in decode and others and first > 2 * max(others):
        found.append(
            "time to first token: torch's Linear copies the whole transposed head weight for the one position "
            "it is asked for, the compiled kernels do not: most of that ratio is not sparsity"
        )
    if disturbed:
        found.append(f"DISTURBED: threads waited for a core during {', '.join(disturbed)} of the time")
    return found
