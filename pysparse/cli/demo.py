"""``pysparse demo``: prune, save, load and score the bundled model; time dense and sparse at true 7B shapes."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pysparse import api, data, huggingface
from pysparse.measure.agreement import Agreement
from pysparse.measure.comparison import (
    KERNEL_DENSE,
    TORCH_DENSE,
    BenchResult,
    BenchSettings,
    compare_speed,
    logit_difference,
)
from pysparse.measure.machine import machine_card
from pysparse.measure.memory import available_bytes
from pysparse.measure.perplexity import Perplexity
from pysparse.measure.progress import Advance, progress_on_stderr
from pysparse.measure.quality import score_models
from pysparse.measure.results import (
    Chart,
    make_table,
    megabytes,
    save_plot,
    to_jsonable,
    write_json,
    write_text,
)
from pysparse.measure.rounds import torch_threads
from pysparse.measure.size import FileSize, file_size
from pysparse.measure.twins import dense_kernel_twin, sparse_twin, zero_at_random_
from pysparse.measure.windows import choose_window, text_windows
from pysparse.models.named_shapes import RANDOM_WEIGHTS, named_shape, plan_blocks, random_model
from pysparse.models.sources import load_tokenizer

SPARSITIES = (0.5, 0.6, 0.7)
METHODS = ("magnitude", "wanda")
SPEED_SHAPE, SPEED_BLOCKS = "llama-2-7b", 2
_CALIBRATION_SEQUENCES = 64


@dataclass(frozen=True, slots=True)
class QualityRow:
    """The bundled model at one setting, after it was saved and loaded again."""

    method: str  # "dense" for the model as it is
    sparsity: float
    perplexity: Perplexity
    agreement: Agreement  # with the dense model
    size: FileSize
    prune_seconds: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Both halves of the demo; the quality is real, the speed is of random weights at published shapes."""

    quality: tuple[QualityRow, ...]
    speed: BenchResult | None
    machine: dict[str, Any]
    seconds: float
    files: tuple[Path, ...]

    def tables(self) -> list[Table]:
        """Return one table a half."""
        return [self.quality_table(), *([self.speed.table()] if self.speed else [])]

    def quality_table(self) -> Table:
        """Return perplexity and size per method and sparsity, dense first."""
        columns = (
            "bundled model",
            "sparsity",
            "perplexity",
            "bits/byte",
            "same top-1 as dense",
            "linears",
            "of dense",
            "file",
        )
        rows = [
            (
                row.method, f"{row.sparsity:.0%}", row.perplexity.value, row.perplexity.bits_per_byte,
                f"{row.agreement.top1:.1%}", megabytes(row.size.linears), f"{row.size.linear_ratio:.3f}",
                megabytes(row.size.total),
            )
            for row in self.quality
        ]  # fmt: skip
        protocol = self.quality[0].perplexity.protocol
        caption = (
            f"real trained weights (5.5 M parameters), held-out text: {self.quality[0].perplexity.tokens} tokens in "
            f"{protocol['windows']} windows of {protocol['window']}, no overlap; every row was saved and loaded again"
        )
        return make_table("quality and size", columns, rows, caption=caption)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        result: dict[str, Any] = to_jsonable(self)
        return result


def run_demo(
    output: Path, *, speed: bool = True, max_windows: int = 48, threads: int | None = None
) -> DemoResult:
    """Run the demo and write ``demo.json``, ``demo.txt``, the saved models and, with matplotlib, ``demo.png``."""
    start = time.perf_counter()
    card = machine_card()
    output.mkdir(parents=True, exist_ok=True)
    with torch_threads(threads), progress_on_stderr() as advance:
        quality = measure_quality(output / "models", max_windows, advance)
        timing = measure_speed(advance) if speed else None
    files = [output / "demo.json", output / "demo.txt"]
    result = DemoResult(quality, timing, card, time.perf_counter() - start, tuple(files))
    write_json(files[0], result.to_dict())
    write_text(files[1], _as_text(result))
    picture = _plot(result, output / "demo.png")
    return result if picture is None else _with_file(result, picture)


def _with_file(result: DemoResult, path: Path) -> DemoResult:
    return DemoResult(result.quality, result.speed, result.machine, result.seconds, (*result.files, path))


def measure_quality(folder: Path, max_windows: int, advance: Advance) -> tuple[QualityRow, ...]:
    """Prune the bundled model with every method and sparsity, save, load, and score all in one pass."""
    source = data.demo_model_path()
    tokenizer, dense = load_tokenizer(source), huggingface.from_pretrained(source, format="dense")
    models: dict[tuple[str, float], nn.Module] = {("dense", 0.0): dense}
    seconds = {("dense", 0.0): 0.0}
    total = len(METHODS) * len(SPARSITIES)
    for method in METHODS:
        for sparsity in SPARSITIES:
            target = folder / f"{method}-{sparsity:.0%}".rstrip("%")
            begin = time.perf_counter()
            _prune_and_save(dense, tokenizer, method, sparsity, target)
            seconds[method, sparsity] = time.perf_counter() - begin
            models[method, sparsity] = huggingface.from_pretrained(target, format="sparse")
            advance("prune, save, load", len(models) - 1, total)
    windows = text_windows(
        tokenizer, data.held_out_texts(), choose_window(dense, None), max_windows=max_windows
    )
    named = {f"{method} {sparsity}": model for (method, sparsity), model in models.items()}
    scores = score_models(named, windows, on_batch=lambda done, count: advance("score", done, count))
    sizes = _sizes(folder, source, models)
    return tuple(
        QualityRow(
            *key,
            Perplexity.from_score(scores[name], windows, model),
            Agreement.from_score(scores[name]),
            sizes[key],
            seconds[key],
        )
        for (key, model), name in zip(models.items(), named, strict=True)
    )


def _prune_and_save(dense: nn.Module, tokenizer: Any, method: str, sparsity: float, target: Path) -> None:
    api.prune(
        copy.deepcopy(dense), sparsity, method, calibration=data.calibration_texts(), tokenizer=tokenizer,
        num_samples=_CALIBRATION_SEQUENCES, max_length=choose_window(dense, None), output_dir=target, progress=False,
    )  # fmt: skip


def _sizes(
    folder: Path, source: Path, models: dict[tuple[str, float], nn.Module]
) -> dict[tuple[str, float], FileSize]:
    sizes = {
        (method, sparsity): file_size(folder / f"{method}-{sparsity:.0%}".rstrip("%"))
        for method, sparsity in models
        if method != "dense"
    }
    packed = [
        layer.path for layer in api.report(models[METHODS[0], SPARSITIES[0]]).layers if layer.sparsity > 0
    ]
    sizes["dense", 0.0] = file_size(source, packed)
    return sizes


def measure_speed(advance: Advance) -> BenchResult:
    """Time ``generate()`` on blocks of true 7B shape, dense beside 50, 60 and 70 % random zeros, in bf16."""
    dtype, settings = torch.bfloat16, BenchSettings(prompt_len=32, new_tokens=16, rounds=4)
    shape, blocks, note = _speed_shape(dtype)
    steps = len(SPARSITIES) + 1
    dense = random_model(shape, blocks, dtype)
    advance(f"build {shape} blocks", 1, steps)
    models: dict[str, nn.Module] = {TORCH_DENSE: dense, KERNEL_DENSE: dense_kernel_twin(dense)}
    difference: dict[str, dict[str, float]] = {}
    for index, sparsity in enumerate(SPARSITIES):
        zero_at_random_(dense, sparsity)  # one seed: each sparsity's zeros contain the last one's
        name = f"sparse {sparsity:.0%}"
        models[name] = sparse_twin(dense)
        difference |= logit_difference({TORCH_DENSE: dense, name: models[name]}, settings)
        advance(f"build {shape} blocks", index + 2, steps)
    title = f"speed: {blocks} blocks of {shape} shape, RANDOM WEIGHTS (speed only)"
    return compare_speed(
        models,
        settings,
        title=title,
        weights=RANDOM_WEIGHTS,
        notes=note,
        difference=difference,
        on_round=advance,
    )


def _speed_shape(dtype: torch.dtype) -> tuple[str, int, tuple[str, ...]]:
    try:
        room = plan_blocks(named_shape(SPEED_SHAPE), dtype, SPARSITIES[0], available_bytes(), len(SPARSITIES))
    except ValueError as error:
        return "qwen2.5-0.5b", 2, (f"SMALLER SHAPE: {error}",)
    if room < SPEED_BLOCKS:
        return SPEED_SHAPE, room, (f"memory holds {room} block(s) instead of {SPEED_BLOCKS}",)
    return SPEED_SHAPE, SPEED_BLOCKS, ()


def _as_text(result: DemoResult) -> str:
    console = Console(width=130, no_color=True)
    with console.capture() as capture:
        for table in result.tables():
            console.print(table)
    return capture.get()


def _plot(result: DemoResult, path: Path) -> Path | None:
    """Draw the three messages; None, said on stderr, when matplotlib is not installed."""
    dense, pruned = result.quality[0], result.quality[1:]
    by_method = {method: [row for row in pruned if row.method == method] for method in METHODS}
    percent = {method: [100 * row.sparsity for row in rows] for method, rows in by_method.items()}
    charts = [
        Chart(
            "perplexity (bundled model)", "% zeros", "perplexity",
            {m: (percent[m], [row.perplexity.value for row in rows]) for m, rows in by_method.items()},
            reference=dense.perplexity.value, log_y=True,
        ),
        Chart(
            "linear layers on disk", "% zeros", "bytes / dense bytes",
            {m: (percent[m], [row.size.linear_ratio for row in rows]) for m, rows in by_method.items()},
            reference=1.0,
        ),
    ]  # fmt: skip
    if result.speed is not None:
        speeds = {name: one.tokens_per_second for name, one in result.speed.decode.items()}
        bars = {"": (list(range(len(speeds))), list(speeds.values()))}
        charts.append(
            Chart("decode, 7B-shaped blocks", "", "tokens/s", bars, bars=True, x_names=list(speeds))
        )
    try:
        return save_plot(path, charts, caption=str(result.machine.get("cpu")))
    except RuntimeError as error:
        Console(stderr=True).print(f"no plot: {error}", markup=False)
        return None
