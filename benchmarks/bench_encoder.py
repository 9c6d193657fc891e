"""MiniLM, a real trained encoder: what pruning does to its embeddings, its file and its speed."""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import shapes
from harness import Run, command_line, show, threads_of
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import pysparse
from pysparse import data
from pysparse.measure.latency import prefill_benchmark
from pysparse.measure.results import make_table, megabytes, to_jsonable
from pysparse.measure.rounds import Spread, torch_threads
from pysparse.measure.size import checkpoint_bytes, file_size
from pysparse.measure.twins import dense_kernel_twin, sparse_twin
from pysparse.suite.tasks.embedding import MINILM, embed, encoder_folder, held_out_sentences, same_neighbours

METHODS = ("magnitude", "wanda")
LENGTHS = (16, 32, 64, 128)  # tokens; a sentence is 20 to 40


def compare(dense: Tensor, pruned: Tensor) -> dict[str, Any]:
    """Cosine of each sentence's two embeddings, and how often its nearest neighbour stays the same."""
    cosine = (dense * pruned).sum(1)
    return {
        "mean_cosine": float(cosine.mean()),
        "cosine": to_jsonable(Spread.of(cosine.tolist())),
        "lowest_cosine": float(cosine.min()),
        "same_nearest_neighbour": same_neighbours(dense, pruned),
    }


def quality_rows(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[float, nn.Module]]:
    """Embeddings and files at each method and sparsity; and the models pruned by Wanda."""
    folder = encoder_folder(MINILM)
    dense, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sentences = held_out_sentences(options.sentences)
    reference, rows, kept = embed(dense, tokenizer, sentences), [], {}
    for method in METHODS:
        for sparsity in options.sparsity:
            model = pysparse.prune(
                copy.deepcopy(dense), sparsity, method, tokenizer=tokenizer, num_samples=options.samples,
                max_length=128, progress=False, calibration=data.calibration_texts() if method == "wanda" else None,
            ).model  # fmt: skip
            found = {**compare(reference, embed(model, tokenizer, sentences)), **sizes(model)}
            rows.append({"what": "quality", "method": method, "sparsity": sparsity, **found})
            if method == "wanda":
                kept[sparsity] = model
    return rows, {0.0: dense, **kept}


def sizes(model: nn.Module) -> dict[str, int | float]:
    """Bytes of the model's file packed and dense, in its own dtype."""
    with tempfile.TemporaryDirectory(prefix="pysparse-bench-") as work:
        packed = pysparse.save_pretrained(model, Path(work) / "packed")
        dense = pysparse.save_pretrained(model, Path(work) / "dense", format="dense")
        size = file_size(packed)
        return {
            "file_bytes": size.total, "file_bytes_dense": checkpoint_bytes(dense), "linear_bytes": size.linears,
            "linear_bytes_dense": size.linears_dense, "linear_ratio": size.linear_ratio,
        }  # fmt: skip


def speed_rows(models: dict[float, nn.Module], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward time of one sentence of each length, dense and sparse interleaved, in fp32 and bf16."""
    rows = []
    for dtype_name, dtype in shapes.DTYPES.items():
        dense = copy.deepcopy(models[0.0]).to(dtype)
        engines = {"torch dense": dense, "pysparse dense": dense_kernel_twin(dense)}
        for sparsity, model in models.items():
            if sparsity:
                engines[f"sparse {sparsity:.0%}"] = sparse_twin(copy.deepcopy(model).to(dtype))
        for length in options.length:
            timings = prefill_benchmark(
                engines, length, rounds=options.rounds, warmup=2, repeats=options.repeats
            )
            rows += [
                {"what": "speed", "dtype": dtype_name, "tokens": length, "engine": name, **to_jsonable(one)}
                for name, one in timings.items()
            ]
    return rows


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    columns = [
        "pruned by",
        "zeros",
        "mean cosine",
        "lowest",
        "same neighbour",
        "file",
        "dense file",
        "linears of dense",
    ]
    quality = [
        [
            row["method"], f"{row['sparsity']:.0%}", row["mean_cosine"], row["lowest_cosine"],
            f"{row['same_nearest_neighbour']:.1%}", megabytes(row["file_bytes"]), megabytes(row["file_bytes_dense"]),
            row["linear_ratio"],
        ]
        for row in rows if row["what"] == "quality"
    ]  # fmt: skip
    speed = [row for row in rows if row["what"] == "speed"]
    engines = list(dict.fromkeys(row["engine"] for row in speed))
    lines: dict[tuple[str, int], list[str]] = {}
    for row in speed:
        cell = f"{row['milliseconds']['median']:.2f} ({row['speedup']['median']:.2f}x)"
        lines.setdefault((row["dtype"], row["tokens"]), []).append(cell)
    return [
        make_table("MiniLM embeddings of held-out sentences", columns, quality),
        make_table(
            "milliseconds a forward pass, batch 1 (speed-up over torch)",
            ["", *engines],
            [[f"{dtype}, {tokens} tokens", *cells] for (dtype, tokens), cells in lines.items()],
        ),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("encoder", __doc__ or "")
    parser.add_argument("--sparsity", nargs="+", type=float, default=shapes.END_TO_END_SPARSITIES)
    parser.add_argument("--length", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 128 tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="forward passes that make one sample")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sparsity, options.length, options.sentences = [0.5], [8], 16
        options.samples, options.rounds, options.repeats = 4, 1, 1
    this = Run.start("encoder", options)
    with torch_threads(options.threads):
        quality, models = quality_rows(options)
        rows = [*quality, *speed_rows(models, options)]
        protocol = {
            "model": "all-MiniLM-L6-v2, fp32 as published; every nn.Linear is pruned",
            "threads": threads_of(options),
            "rounds": options.rounds,
            "calibration": f"{options.samples} sequences of 128 tokens of the bundled calibration text",
            "sentences": f"{options.sentences} of the bundled held-out text, 40 to 300 characters, mean pooling",
            "speed": "one forward pass, batch 1, engines interleaved round by round",
        }
        path = this.save(protocol, rows)
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
