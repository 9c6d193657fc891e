"""Structured pruning of the bundled model: 2SSP beside its stages alone and ShortGPT, and the cost of the search.

For each rate: perplexity on held-out text, parameters, file size, prefill and decode speed beside the dense model. Then
the search for attention modules against the straightforward one, which runs the whole model for each candidate.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import Run, command_line, read_runs, result_path, show, threads_of
from torch import Tensor, nn

import pysparse
from pysparse import data
from pysparse.calib import load_calibration
from pysparse.calib.batches import Batch
from pysparse.measure.latency import decode_benchmark, prefill_benchmark
from pysparse.measure.quality import evaluating, sequence_nats
from pysparse.measure.results import make_table
from pysparse.measure.rounds import ratios, round_robin, torch_threads
from pysparse.models.anatomy import anatomy_of
from pysparse.nn.structure import Surgery
from pysparse.pruning.depth import AttentionSearch, remove_attentions
from pysparse.pruning.probe import Seats, find_seats

METHODS = ("2ssp", "2ssp-width", "2ssp-depth", "shortgpt")
DENSE = "dense"
PARTS = ("models", "search")
Row = dict[str, Any]


def prune(method: str, sparsity: float, folder: Path, options: argparse.Namespace) -> Row:
    """Prune, save, load and score; a rate that a method cannot meet is a row that says why."""
    row: Row = {"what": "quality", "method": method, "asked": sparsity}
    model = pysparse.from_pretrained(data.demo_model_path(), format="dense")
    start = time.perf_counter()
    try:
        result = pysparse.prune(
            model, sparsity, method, num_samples=options.samples, tokenizer=data.demo_model_path(), output_dir=folder,
            seed=options.seed, progress=False,
        )  # fmt: skip
    except ValueError as error:
        return {**row, "cannot_be_met": str(error)}
    seconds = time.perf_counter() - start
    facts = {"sparsity": result.report.sparsity, "seconds_to_prune_and_save": seconds} | {
        name: result.report.to_dict()[name] for name in ("blocks", "steps")
    }
    return {**row, **facts, **score(folder, options)}


def score(folder: Path, options: argparse.Namespace) -> Row:
    model = pysparse.from_pretrained(folder, format="dense")
    found = pysparse.evaluate(
        model, data.demo_model_path(), window=512, max_windows=options.windows
    ).perplexity
    return {
        "perplexity": found.value, "tokens": found.tokens,
        "parameters": sum(one.numel() for one in model.parameters()),
        "file_bytes": (folder / "model.safetensors").stat().st_size,
    }  # fmt: skip


def speed(folders: Mapping[str, Path], options: argparse.Namespace) -> list[Row]:
    """Time all models of one rate together, by torch's own linear layers: what is measured is the structure."""
    models = {name: pysparse.from_pretrained(folder, format="dense") for name, folder in folders.items()}
    decode = decode_benchmark(models, 32, options.new_tokens, rounds=options.rounds)
    prefill = prefill_benchmark(models, options.prompt, rounds=options.rounds, repeats=2)
    return [
        {"what": "speed", "method": name, "decode": decode[name], "prefill": prefill[name]} for name in models
    ]


def straightforward(model: nn.Module, seats: list[Seats], batch: Batch, count: int) -> list[str]:
    """Remove attentions greedily, each candidate scored by a forward pass of the whole model."""
    surgery, gone = Surgery(model), []
    left = list(seats)
    for _ in range(count):
        nats = [whole_pass(model, one, batch) for one in left]
        best = left.pop(min(range(len(left)), key=nats.__getitem__))
        best.clear(surgery)
        gone.append(best.attention)
    surgery.undo()
    return gone


def whole_pass(model: Any, seat: Seats, batch: Batch) -> float:
    surgery = Surgery(model)
    seat.clear(surgery)
    logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    surgery.undo()
    return sequence_nats(logits, batch.ids)


def search_cost(blocks: int, count: int, options: argparse.Namespace) -> Row:
    """Time both searches on ``blocks`` blocks, the bundled model's own repeated."""
    model: Any = pysparse.from_pretrained(data.demo_model_path(), format="dense")
    own = list(model.model.layers)
    model.model.layers = nn.ModuleList(copy.deepcopy(own[index % len(own)]) for index in range(blocks))
    model.config.num_hidden_layers, model.config.use_cache = blocks, False
    anatomy = anatomy_of(model)
    (batch,) = load_calibration(
        torch.randint(3, 4096, (1, options.prompt), generator=torch.Generator())
    ).batches
    runs: list[int] = []

    def ours() -> tuple[float, list[str]]:
        start, surgery = time.perf_counter(), Surgery(model)
        search = AttentionSearch(anatomy, seats, [batch])
        steps = remove_attentions(search, count, surgery)
        seconds = time.perf_counter() - start
        surgery.undo()
        runs.append(search.block_runs)
        return seconds, [step.path for step in steps]

    def theirs() -> tuple[float, list[str]]:
        start = time.perf_counter()
        gone = straightforward(model, seats, batch, count)
        return time.perf_counter() - start, gone

    with evaluating(model):
        seats = find_seats(anatomy, [batch])
        found = round_robin({"straightforward": theirs, "ours": ours}, options.search_rounds).results
    pairs = {name: [seconds for seconds, _ in results] for name, results in found.items()}
    return {
        "what": "search", "blocks": blocks, "removed": count, "tokens": options.prompt,
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in pairs.items()},
        "speedup": ratios(pairs["straightforward"], pairs["ours"]),
        "block_runs": {"straightforward": sum(blocks * (blocks - step) for step in range(count)), "ours": runs[-1]},
        "same_modules": found["straightforward"][-1][1] == found["ours"][-1][1],
    }  # fmt: skip


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield each row as soon as it is there."""
    if "models" in options.only:
        yield from model_rows(options, folder)
    if "search" in options.only:
        for blocks in options.blocks:
            yield search_cost(blocks, blocks // 3, options)


def model_rows(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Quality of every method at a rate, then the speed of all of them together."""
    dense = folder / DENSE
    pysparse.save_pretrained(pysparse.from_pretrained(data.demo_model_path()), dense, format="dense")
    yield {"what": "quality", "method": DENSE, "asked": 0.0, "sparsity": 0.0, **score(dense, options)}
    for sparsity in options.sparsities:
        folders = {DENSE: dense}
        for method in options.methods:
            place = folder / f"{method}-{sparsity:g}"
            row = prune(method, sparsity, place, options)
            if "cannot_be_met" not in row:
                folders[method] = place
            yield row
        yield from ({**row, "asked": sparsity} for row in speed(folders, options))


def tables(rows: list[Row]) -> list[Any]:
    timed = {(row["method"], row["asked"]): row for row in rows if row["what"] == "speed"}
    cells = []
    for row in rows:
        if row["what"] != "quality":
            continue
        name = [row["method"], f"{row['asked']:.1%}"]
        if "cannot_be_met" in row:
            cells.append([*name, "cannot be met", "", "", "", "", ""])
            continue
        fast = timed.get((row["method"], row["asked"]))
        ratio = [f"{fast[key].speedup.median:.2f}x" if fast else "" for key in ("decode", "prefill")]
        cells.append(
            [*name, f"{row['sparsity']:.2%}", row["perplexity"], row["parameters"], row["file_bytes"], *ratio]
        )
    columns = ["method", "asked", "removed", "perplexity", "parameters", "file bytes", "decode", "prefill"]
    costs = [
        [row["blocks"], row["removed"], *row["seconds"].values(), f"{row['speedup'].median:.2f}x",
         " / ".join(map(str, row["block_runs"].values())), row["same_modules"]]
        for row in rows if row["what"] == "search"
    ]  # fmt: skip
    heads = ["blocks", "removed", "straightforward s", "ours s", "speed-up", "block runs", "same modules"]
    return [
        make_table("structured pruning, bundled model", columns, cells),
        make_table("search", heads, costs),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("structured", __doc__ or "")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.375, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--windows", type=int, default=48, help="of 512 held-out tokens")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of 512 tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[6, 24], help="of the searches; a third of them goes"
    )
    parser.add_argument("--search-rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=384, help="tokens of a prefill and of the search")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.quick:
        options.sparsities, options.blocks = options.sparsities[:1], [6]
        options.windows, options.samples, options.rounds, options.search_rounds = 2, 2, 2, 1
        options.prompt, options.new_tokens = 64, 8
    this = Run.start("structured", options)
    protocol = {
        "model": "the bundled one, real trained weights; speed by torch's linear layers, bfloat16, batch 1",
        "perplexity": f"{options.windows} windows of 512 held-out tokens", "samples": options.samples,
        "decode": f"prompt 32, {options.new_tokens} tokens", "prefill": f"{options.prompt} tokens, no head",
        "rounds": options.rounds, "seed": options.seed, "threads": threads_of(options),
        "search": "the bundled model's blocks repeated, random tokens, one sequence; a whole forward pass "
        "for each candidate, against states kept in front of each block",
    }  # fmt: skip
    rows: list[Row] = []
    with torch_threads(options.threads), tempfile.TemporaryDirectory() as folder:
        path = result_path(this)
        earlier = read_runs(path) if options.append and path is not None and path.exists() else []
        for row in measure(options, Path(folder)):
            rows.append(row)
            path = this.save(protocol, rows, earlier)
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
