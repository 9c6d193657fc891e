"""EBF: batched small factors, the pruner's speed and quality beside Wanda, one-shot OBS and SparseGPT, deblurring."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

import torch
from audit import Audited
from bench_encoder import compare as compare_embeddings
from harness import RESULTS, Call, Run, Timing, command_line, show, threads_of, time_calls
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from pysparse import data, huggingface, ops
from pysparse.bayes.deblur import BASELINES, Setup, bundled_image, compare
from pysparse.bayes.matrix_free import OperatorSettings
from pysparse.calib import Calibration, load_calibration
from pysparse.measure.perplexity import Perplexity
from pysparse.measure.quality import score_models
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.measure.windows import text_windows
from pysparse.methods import METHODS, EbfUpdate, Evidence
from pysparse.models.discover import discover
from pysparse.models.sources import load_tokenizer
from pysparse.pruning import Keep, Recipe, Unstructured, run
from pysparse.suite.tasks.embedding import MINILM, embed, encoder_folder, held_out_sentences

OURS, TORCH, CHUNKED = "pysparse", "torch batched", "torch batched, 64 at a time"
RIDGE_TOLERANCE = 1e-4  # of the largest entry, between two float32 solutions
PRUNER_TOLERANCE = 0.01  # of the output error: masks differ where the evidence nearly ties
IMAGES, METHODS_OF_IMAGES = (
    ("camera", "coins", "text", "shepp_logan_phantom"),
    ("flat", "half-laplace", "half-root"),
)
Row = dict[str, Any]


# --- speed -------------------------------------------------------------------------------------------------


def problems(rows: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A Hessian of correlated inputs, scales of which a third is zero, and targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * size, size, generator=generator)
    x[:, 1:] += 0.5 * x[:, :-1]
    scale = 3 * torch.rand(rows, size, generator=generator)
    return x.T @ x / (4 * size), scale * (scale > 1), torch.randn(rows, size, generator=generator)


def ridge_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Solutions and inverse diagonals of many small problems, checked against torch once."""
    for size, rows in ((16, 32), (32, 32)) if options.quick else ((32, 2048), (64, 2048), (128, 512)):
        gram, scale, target = problems(rows, size)

        def chunked(gram: Tensor = gram, scale: Tensor = scale, target: Tensor = target) -> None:
            for part, wanted in zip(scale.split(64), target.split(64), strict=True):
                ops.ridge_rows_torch(gram, part, wanted)

        calls = {
            OURS: Call(lambda g=gram, s=scale, t=target: ops.ridge_rows(g, s, t)),
            TORCH: Call(lambda g=gram, s=scale, t=target: ops.ridge_rows_torch(g, s, t)),
            CHUNKED: Call(chunked),
        }
        for ours, right in zip(calls[OURS].function(), calls[TORCH].function(), strict=True):
            if not float((ours - right).abs().max()) <= RIDGE_TOLERANCE * float(right.abs().max()):
                raise RuntimeError(f"{rows} problems of {size}: the kernel differs from torch")
        timed = time_calls(calls, options.rounds, warmup=1)
        yield speed_row("ridge", f"{rows} problems of {size} x {size}", timed, problems=rows)


@contextmanager
def without_kernel() -> Iterator[None]:
    """Let the pruner run on batched torch."""
    with mock.patch.object(ops.ridge, "can_ridge", return_value=False):
        yield


def pruner_rows(options: argparse.Namespace) -> Iterator[Row]:
    """A whole layer pruned by evidence, all but the small problems being the same code."""
    rows, cols = (32, 64) if options.quick else (256, 256)
    weight, x = torch.randn(rows, cols) * 0.02, torch.randn(2 * cols, cols)
    x[:, 1:] += 0.5 * x[:, :-1]
    stats = {"gram": x.T @ x}

    def prune() -> Tensor:
        return EbfUpdate().solve(weight, stats, Evidence(), Unstructured("matrix"), 0.5).weight

    errors = []
    for setting in (None, without_kernel):
        with setting() if setting else mock.patch.dict({}):
            lost = weight - prune()
            errors.append(float(((lost @ stats["gram"]) * lost).sum()))
    if not abs(errors[0] - errors[1]) <= PRUNER_TOLERANCE * errors[1]:
        raise RuntimeError(f"the pruner's output error is {errors[0]:.6g}, on torch {errors[1]:.6g}")
    timed = time_calls(
        {OURS: Call(prune), TORCH: Call(prune, without_kernel)}, min(options.rounds, 5), warmup=1
    )
    yield speed_row("pruner", f"{rows} x {cols}, 50 %", timed, output_error_over_torch=errors[0] / errors[1])


def speed_row(what: str, detail: str, timed: Mapping[str, Timing], **more: Any) -> Row:
    ours = timed[OURS]
    return {
        "what": what, "detail": detail, "engines": {name: one.record() for name, one in timed.items()},
        "speedup_over": {
            name: to_jsonable(ours.speedup_over(one)) for name, one in timed.items() if name != OURS
        },
        **more,
    }  # fmt: skip


# --- quality -----------------------------------------------------------------------------------------------


def recipes() -> dict[str, Recipe]:
    """What is compared at the same sparsity: masks alone, then with their updates."""
    free = Unstructured("matrix")
    uniform = METHODS["sparsegpt"].allocation
    return {
        "wanda": METHODS["wanda"],
        "obs one-shot": Recipe(Evidence(), uniform, free, Keep()),
        "sparsegpt": METHODS["sparsegpt"],
        "ebf, no iteration": Recipe(Evidence(), uniform, free, EbfUpdate(iterations=0)),
        "ebf": METHODS["ebf"],
    }


def prune_copy(
    model: nn.Module, recipe: Recipe, sparsity: float, calibration: Calibration
) -> tuple[nn.Module, Row]:
    """Prune a copy; its layers' output errors and sparsities."""
    pruned, start = copy.deepcopy(model), time.perf_counter()
    audit = Audited(recipe.reconstruction, beside=False)
    report = run(discover(pruned), dataclasses.replace(recipe, reconstruction=audit), sparsity, calibration)
    layers = {one.path: one.zeros / (one.shape[0] * one.shape[1]) for one in report.layers}
    errors = [one["updated"] for one in audit.errors]
    return pruned, {
        "sparsity": report.sparsity, "mean_output_error": mean(errors), "output_errors": errors,
        "layer_sparsity": layers, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def auto_recipe(tau: float) -> Recipe:
    return dataclasses.replace(METHODS["ebf-auto"], reconstruction=EbfUpdate(tau=tau))


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, float, Recipe]]:
    """(name, sparsity or tau, recipe): the methods at equal sparsity, then what the evidence finds."""
    chosen = {"ebf": METHODS["ebf"]} if options.quick else recipes()
    for sparsity in options.sparsity:
        for name, recipe in chosen.items():
            yield name, sparsity, recipe
    for tau in options.tau:
        yield "ebf-auto", tau, auto_recipe(tau)


def language_rows(options: argparse.Namespace) -> Iterator[Row]:
    """The bundled model: perplexity and layer error."""
    folder = data.demo_model_path()
    tokenizer = load_tokenizer(folder)
    dense = huggingface.from_pretrained(folder, format="dense", dtype=torch.bfloat16)
    calibration = load_calibration(
        data.calibration_texts(), tokenizer, num_samples=options.samples, max_length=512, batch_size=8
    )
    windows = text_windows(tokenizer, data.held_out_texts(), 512, max_windows=options.windows)

    def perplexity(model: nn.Module) -> float:
        score = score_models({"model": model}, windows, batch_size=8)["model"]
        return Perplexity.from_score(score, windows, model).value

    yield {"what": "language", "method": "dense", "level": 0.0, "perplexity": perplexity(dense)}
    for name, level, recipe in jobs(options):
        pruned, found = prune_copy(dense, recipe, level if name != "ebf-auto" else 0.5, calibration)
        yield {"what": "language", "method": name, "level": level, "perplexity": perplexity(pruned), **found}


def encoder_rows(options: argparse.Namespace) -> Iterator[Row]:
    """MiniLM, an encoder: it has no perplexity, so the embeddings of sentences beside the dense model's."""
    folder = encoder_folder(MINILM)
    dense, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    calibration = load_calibration(
        data.calibration_texts(), tokenizer, num_samples=options.samples, max_length=128, batch_size=8
    )
    sentences = held_out_sentences(options.sentences)
    reference = embed(dense, tokenizer, sentences)
    for name, level, recipe in jobs(options):
        pruned, found = prune_copy(dense, recipe, level if name != "ebf-auto" else 0.5, calibration)
        embeddings = compare_embeddings(reference, embed(pruned, tokenizer, sentences))
        yield {"what": "encoder", "method": name, "level": level, **embeddings, **found}


# --- images ------------------------------------------------------------------------------------------------


def image_setups(options: argparse.Namespace) -> Iterator[tuple[str, Setup, int]]:
    """(image, setup, seeds). A cross through one centre: size, blur and noise in turn, for every image."""
    if options.quick:
        yield "camera", Setup("gaussian:1", 0.01, 16, settings=OperatorSettings(iterations=2, probes=2)), 1
        return
    for image in IMAGES:
        for deviation, noise in ((1, 0.01), (2, 0.01), (3, 0.01), (1, 0.001), (1, 0.05)):
            seeds = options.seeds if deviation == 1 and noise == 0.01 else 1
            yield image, Setup(f"gaussian:{deviation}", noise, 64), seeds
        yield image, Setup("gaussian:1", 0.01, 128), 1
        yield image, Setup("gaussian:1", 0.01, 256, settings=OperatorSettings(iterations=15, probes=4)), 1
        yield image, Setup("gaussian:1", 0.01, 512, settings=OperatorSettings(iterations=10, probes=4)), 1


def image_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Every hyperprior and baseline on every setup."""
    for image, setup, seeds in image_setups(options):
        if image not in options.images or (options.sizes and setup.size not in options.sizes):
            continue
        truth = bundled_image(image, setup.size)
        methods = (
            (*METHODS_OF_IMAGES, *BASELINES) if setup.size <= 128 else ("flat", "half-laplace", "tikhonov")
        )
        for seed in range(seeds):
            experiment, found = compare(truth, dataclasses.replace(setup, seed=seed), methods)
            for one in found:
                yield {
                    "what": "image", "image": image, "size": setup.size, "psf": setup.psf, "noise": setup.noise,
                    "seed": seed, "condition": experiment.condition, **one.record(),
                }  # fmt: skip


# --- what is shown -----------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> list[Table]:
    return [
        table for table in (speed_table(rows), *quality_tables(rows), image_table(rows)) if table is not None
    ]


def speed_table(rows: Sequence[Row]) -> Table | None:
    lines = []
    for row in (row for row in rows if row["what"] in ("ridge", "pruner")):
        for name, engine in row["engines"].items():
            spread, faster = engine["microseconds"], row["speedup_over"].get(name)
            time_text = f"{spread['median'] / 1e3:.2f} ms" if spread else None
            lines.append(
                [row["what"], row["detail"], name, time_text, f"{faster['median']:.1f}x" if faster else None]
            )
    return make_table("speed", ["what", "", "engine", "time", "ours is faster by"], lines) if lines else None


def quality_tables(rows: Sequence[Row]) -> Iterator[Table]:
    for what, figure in (("language", "perplexity"), ("encoder", "mean_cosine")):
        lines = [
            [
                row["method"], f"{row['level']:g}", f"{row.get('sparsity', 0):.1%}", row.get("mean_output_error"),
                row[figure],
            ]
            for row in rows if row["what"] == what
        ]  # fmt: skip
        if lines:
            columns = ["method", "sparsity or tau", "zeros", "mean output error", figure.replace("_", " ")]
            yield make_table({"language": "bundled model", "encoder": "MiniLM"}[what], columns, lines)


def image_table(rows: Sequence[Row]) -> Table | None:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for row in rows if row["what"] == "image"):
        groups.setdefault((row["size"], row["psf"], row["noise"], row["method"]), []).append(row)
    lines = []
    for (size, psf, noise, method), mine in groups.items():
        errors = [row["relative_error"] for row in mine]
        counts = [row["nonzeros"] for row in mine if row["nonzeros"] is not None]
        spread = f" ±{stdev(errors):.4f}" if len(errors) > 1 else ""
        lines.append([
            size, psf, noise, method, len(mine), f"{mean(errors):.4f}{spread}",
            f"{mean(row['psnr'] for row in mine):.2f}", f"{mean(row['ssim'] for row in mine):.3f}",
            round(mean(counts)) if counts else None, f"{mean(row['seconds'] for row in mine):.1f}",
        ])  # fmt: skip
    columns = [
        "px",
        "psf",
        "noise",
        "method",
        "runs",
        "relative error",
        "PSNR",
        "SSIM",
        "non-zeros",
        "seconds",
    ]
    return make_table("deblurring, mean over images and seeds", columns, lines) if lines else None


def draw_auto(rows: Sequence[Row], path: Path) -> Path | None:
    """Draw the sparsity per layer that the evidence found; return ``path``, or None when nothing was run."""
    from matplotlib.figure import Figure

    found = [row for row in rows if row.get("method") == "ebf-auto"]
    if not found:
        return None
    models = list(dict.fromkeys(row["what"] for row in found))
    figure = Figure(figsize=(9, 3.2 * len(models)), layout="constrained")
    for ax, what in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        for row in (row for row in found if row["what"] == what):
            ax.plot(list(row["layer_sparsity"].values()), marker=".", label=f"tau {row['level']:g}")
        ax.set(title=what, xlabel="layer", ylabel="sparsity found", ylim=(0, 1))
        ax.legend()
    figure.savefig(path)
    return path


PARTS = {
    "ridge": ridge_rows, "pruner": pruner_rows, "language": language_rows, "encoder": encoder_rows,
    "images": image_rows,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("ebf", __doc__ or "")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    parser.add_argument("--tau", nargs="+", type=float, default=[0.05, 0.2])
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--windows", type=int, default=24, help="of 512 held-out tokens")
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5, help="noise draws at the centre of the image grid")
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--sizes", nargs="+", type=int, help="of images, in pixels; default: all")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.sparsity, options.tau, options.samples = 3, [0.5], [0.2], 2
        options.windows, options.sentences, options.seeds = 1, 8, 1
    with torch_threads(threads_of(options)) as threads:
        result = Run.start("ebf", options)
        rows = [row for name in options.only for row in PARTS[name](options)]
        protocol = {
            "threads": threads, "rounds": options.rounds, "block_size": EbfUpdate().block_size,
            "iterations": EbfUpdate().iterations, "damping": EbfUpdate().damping,
            "calibration": f"{options.samples} sequences of the bundled calibration text",
            "text": f"{options.windows} windows of 512 tokens of the bundled held-out text",
            "output_error": "||X (W - W')^T||^2 / ||X W^T||^2 of each layer, inputs of the pruned model so far",
            "images": "scikit-image's, grey, square, Haar with 4 levels, periodic blur, noise known; l1, TV, Tikhonov "
            "and IAS take the weight that is best against the truth",
        }  # fmt: skip
        path = result.save(protocol, rows)
    if path is not None and path.is_relative_to(RESULTS):
        draw_auto(rows, path.with_name(f"{path.stem}_auto.svg"))
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
