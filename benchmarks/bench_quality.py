"""What pruning costs the bundled model: perplexity by method, allocation and sparsity, with calibration seeds.

Also, layer by layer: the output error of SparseGPT and EBF beside that of their own masks without the update, and
of Wanda's.
An interrupted run goes on where it was: finished cells are read from the result file.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from audit import Audited
from harness import RESULTS, Run, command_line, read_runs, result_path, show, threads_of
from rich.table import Table
from torch import nn

from pysparse import data, huggingface
from pysparse.api.search import find_beta, part_texts
from pysparse.calib import Calibration, load_calibration
from pysparse.measure.perplexity import Perplexity
from pysparse.measure.progress import progress_on_stderr
from pysparse.measure.quality import score_models
from pysparse.measure.results import make_table
from pysparse.measure.rounds import torch_threads
from pysparse.measure.windows import text_windows
from pysparse.methods import METHODS, allocation_for, recipe_for
from pysparse.models.discover import discover
from pysparse.models.sources import load_tokenizer
from pysparse.pruning import Execution, Recipe, run

METHOD_NAMES = tuple(name for name in ("magnitude", "wanda", "sparsegpt", "ebf") if name in METHODS)
ALLOCATION_NAMES = ("uniform", "owl", "dlp", "atp")
LEVELS: dict[str, tuple[float | None, str | None]] = {  # name -> (sparsity, pattern)
    "50%": (0.5, None), "60%": (0.6, None), "70%": (0.7, None), "2:4": (None, "2:4"), "4:8": (None, "4:8"),
}  # fmt: skip
SEARCH_SEQUENCES = 8  # calibration of each trial of ATP's search, which is done once, with the first seed
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of the table."""

    method: str
    allocation: str
    level: str
    seed: int

    @property
    def seeded(self) -> bool:
        """Tell whether any part of the recipe looks at calibration data, and so depends on the seed."""
        return self.method != "magnitude" or bool(allocation_for(self.allocation).needs)

    @property
    def key(self) -> Row:
        return {"what": "perplexity", **dataclasses.asdict(self)}


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Every cell, the first seed's before the second's."""
    for place, seed in enumerate(options.seeds):
        for level in options.level:
            for method in options.method:
                for allocation in options.allocation:
                    cell = Cell(method, allocation, level, seed)
                    if place == 0 or cell.seeded:
                        yield cell


class Bench:
    """The bundled model, its texts, and what has been found so far."""

    def __init__(self, options: argparse.Namespace, rows: list[Row]) -> None:
        self.options, self.rows = options, rows
        folder = data.demo_model_path()
        self.tokenizer = load_tokenizer(folder)
        self.dense = huggingface.from_pretrained(folder, format="dense", dtype=torch.bfloat16)
        self.calibration_texts, search_texts = part_texts(None, None)
        self.windows = self._windows(data.held_out_texts(), options.windows)
        self.search_windows = self._windows(search_texts, options.search_windows)

    def _windows(self, texts: Sequence[str], count: int) -> Any:
        return text_windows(self.tokenizer, texts, self.options.length, max_windows=count)

    @cache  # noqa: B019  (one object, which lives as long as the process)
    def calibration(self, seed: int, samples: int) -> Calibration:
        return load_calibration(
            self.calibration_texts, self.tokenizer, num_samples=samples, max_length=self.options.length,
            batch_size=8, seed=seed,
        )  # fmt: skip

    def protocol(self) -> Row:
        """What the figures depend on; runs with the same protocol are one run."""
        return {
            "threads": threads_of(self.options),
            "model": "bundled model, bfloat16, all linear layers of its blocks",
            "calibration": f"{self.options.samples} windows of {self.options.length} tokens of the bundled "
            "calibration text without every fifth document",
            "search": f"ATP's beta: perplexity on {self.options.search_windows} windows of these fifth documents, "
            f"{min(SEARCH_SEQUENCES, self.options.samples)} windows of calibration, the first seed",
            "text": {key: self.windows.protocol[key] for key in ("window", "windows", "text_sha256")},
            "loss": "mean cross-entropy of all positions but the first of each held-out window, no overlap",
            "n:m with an allocation": "each layer has its own n of m, with the zeros of n:m in all",
            "sensitivity": "one block alone pruned by magnitude to 70 %",
            "output_error": "||X (W - W')^T||^2 / ||X W^T||^2 of each layer, inputs of the pruned model so far",
        }

    def find(self, key: Mapping[str, Any]) -> Row | None:
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def dense_row(self) -> Row:
        return {"what": "dense", **self._score(self.dense)}

    def sensitivity_row(self, block: int) -> Row:
        """Prune one block alone, by magnitude to 70 %: what an allocation by block would have to know."""
        model = copy.deepcopy(self.dense)
        path = discover(model).blocks[block][0]
        run(discover(model, targets=f"{path}.*"), recipe_for("magnitude"), 0.7)
        return {"what": "sensitivity", "block": block, **self._score(model)}

    def search_row(self, method: str, level: str) -> Row:
        """Search ATP's beta for one method and level."""
        sparsity, pattern = LEVELS[level]
        start = time.perf_counter()
        calibration = self.calibration(self.options.seeds[0], min(SEARCH_SEQUENCES, self.options.samples))
        with progress_on_stderr(False) as advance:
            _, found = find_beta(
                discover(copy.deepcopy(self.dense)), recipe_for(method, pattern, "atp"), sparsity, calibration,
                self.search_windows, "pruned", advance, Execution(),
            )  # fmt: skip
        return {
            "what": "search", "method": method, "level": level, "beta": found.beta,
            "tried": [list(one) for one in found.tried], "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def recipe(self, cell: Cell) -> Recipe:
        name = f"atp:beta={self._beta(cell)!r}" if cell.allocation == "atp" else cell.allocation
        return recipe_for(cell.method, LEVELS[cell.level][1], name)

    def _beta(self, cell: Cell) -> float:
        found = self.find({"what": "search", "method": cell.method, "level": cell.level})
        if found is None:
            raise RuntimeError(f"no beta was searched for {cell}")
        return float(found["beta"])

    def cell_row(self, cell: Cell) -> Row:
        """Prune a copy, score it, and note the errors of its layers where the method updates weights."""
        start = time.perf_counter()
        if cell.allocation == "atp" and self._beta(cell) == 0.0:  # the very recipe of the uniform cell
            uniform = self.find(dataclasses.replace(cell, allocation="uniform").key)
            if uniform is not None:
                return {**{k: v for k, v in uniform.items() if k != "errors"}, **cell.key, "seconds": 0.0}
        recipe, model = self.recipe(cell), copy.deepcopy(self.dense)
        audit = Audited(recipe.reconstruction) if "gram" in recipe.reconstruction.needs else None
        if audit is not None:
            recipe = dataclasses.replace(recipe, reconstruction=audit)
        layout = discover(model)
        calibration = self.calibration(cell.seed, self.options.samples)
        report = run(layout, recipe, LEVELS[cell.level][0], calibration, seed=cell.seed)
        rates = {layer.block: layer.requested for layer in report.layers}
        return {
            **cell.key, **self._score(model), "sparsity": report.sparsity, "rates": list(rates.values()),
            **({"errors": _by_layer(audit.errors, report.layers)} if audit is not None else {}),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _score(self, model: nn.Module) -> Row:
        score = score_models({"model": model}, self.windows, batch_size=8)["model"]
        figure = Perplexity.from_score(score, self.windows, model)
        return {"perplexity": figure.value, "bits_per_byte": figure.bits_per_byte, "tokens": figure.tokens}

    def pending(self) -> Iterator[Row]:
        """Yield the rows that are not there yet, each as soon as it is computed."""
        if self.find({"what": "dense"}) is None:
            yield self.dense_row()
        for block in range(len(discover(self.dense).blocks)):
            if self.find({"what": "sensitivity", "block": block}) is None:
                yield self.sensitivity_row(block)
        for cell in cells(self.options):
            search = {"what": "search", "method": cell.method, "level": cell.level}
            if cell.allocation == "atp" and self.find(search) is None:
                yield self.search_row(cell.method, cell.level)
            if self.find(cell.key) is None:
                yield self.cell_row(cell)


def _by_layer(errors: Sequence[Row], layers: Sequence[Any]) -> Row:
    """Columns of errors, in the order of the layers, which the first column names."""
    names = [layer.path for layer in layers]
    return {"layer": names, **{key: [one[key] for one in errors] for key in errors[0]}}


# --- what the rows say -----------------------------------------------------------------------------------


def figures(rows: Sequence[Row], method: str, allocation: str, level: str) -> list[float]:
    """The perplexities of one cell, a seed an entry."""
    return [
        row["perplexity"] for row in rows
        if row["what"] == "perplexity"
        and (row["method"], row["allocation"], row["level"]) == (method, allocation, level)
    ]  # fmt: skip


def comparisons(rows: Sequence[Row]) -> Iterator[Row]:
    """Ratios of mean perplexities between the methods under each allocation, and the errors of all layers."""
    for level in LEVELS:
        for allocation in ALLOCATION_NAMES:
            means = {m: mean(found) for m in METHOD_NAMES if (found := figures(rows, m, allocation, level))}
            ratios = {
                f"{ours}_over_{theirs}": means[ours] / means[theirs]
                for ours, theirs in (("wanda", "magnitude"), ("sparsegpt", "wanda"), ("ebf", "sparsegpt"))
                if ours in means and theirs in means
            }
            if ratios:
                yield {"what": "comparison", "level": level, "allocation": allocation, **ratios}
    for method in METHOD_NAMES:
        audited = [row["errors"] for row in rows if row.get("errors") and row["method"] == method]
        if audited:
            yield {"what": "layer errors", "method": method, **_error_ratios(audited)}


def _error_ratios(audited: Sequence[Row]) -> Row:
    """How the errors of all layers lie to those of their masks without the update, and to Wanda's."""
    found: Row = {"layers": sum(len(errors["updated"]) for errors in audited)}
    for name in ("mask_only", "wanda"):
        ratios = [u / o for errors in audited for u, o in zip(errors["updated"], errors[name], strict=True)]
        found[f"largest_over_{name}"] = max(ratios)
        found[f"geometric_mean_over_{name}"] = math.exp(mean(map(math.log, ratios)))
    return found


def _shown(found: Sequence[float]) -> str:
    if not found:
        return "-"
    spread = (max(found) - min(found)) / 2
    return f"{mean(found):.2f}" + (f" ±{spread:.2f}" if len(found) > 1 else "")


def lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """One line a method and allocation: mean perplexity at each level, half the range over seeds."""
    for method in METHOD_NAMES:
        for allocation in ALLOCATION_NAMES:
            shown = [_shown(figures(rows, method, allocation, level)) for level in LEVELS]
            if any(one != "-" for one in shown):
                yield [f"{method}, {allocation}", *shown]


def table(rows: Sequence[Row]) -> Table:
    dense = next(row["perplexity"] for row in rows if row["what"] == "dense")
    return make_table(
        f"perplexity of the bundled model (dense {dense:.2f})", ["", *LEVELS], list(lines(rows))
    )


def markdown(rows: Sequence[Row]) -> str:
    """The same table for a README."""
    head = ["", *LEVELS]
    body = [head, ["---"] * len(head), *lines(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def newest(folder: Path = RESULTS) -> Path:
    found = sorted(folder.glob("quality_*.json"), key=lambda path: path.stem.rpartition("_")[2])
    if not found:
        raise FileNotFoundError(f"no quality_*.json in {folder}: run bench_quality.py first")
    return found[-1]


# --- the command -----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = command_line("quality", __doc__ or "")
    parser.add_argument("--method", nargs="+", default=METHOD_NAMES, choices=METHOD_NAMES)
    parser.add_argument("--allocation", nargs="+", default=ALLOCATION_NAMES, choices=ALLOCATION_NAMES)
    parser.add_argument("--level", nargs="+", default=tuple(LEVELS), choices=LEVELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows that are scored")
    parser.add_argument(
        "--search-windows", type=int, default=16, help="windows scored in a trial of ATP's beta"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after the cell that passes this"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the newest result as a table; run nothing"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.markdown:
        print(markdown(read_runs(options.output or newest())[-1]["rows"]))
        return
    if options.quick:
        options.level, options.allocation, options.seeds = ["60%"], ["uniform", "atp"], [0]
        options.samples, options.length, options.windows, options.search_windows = 4, 64, 2, 1
    this = Run.start("quality", options)
    path = result_path(this)
    stop = time.monotonic() + 60 * options.minutes
    with torch_threads(options.threads), progress_on_stderr() as advance:
        bench = Bench(options, [])
        earlier = read_runs(path) if path is not None and path.exists() else []
        if earlier and earlier[-1]["protocol"] == bench.protocol():
            bench.rows = [
                row for row in earlier.pop()["rows"] if row["what"] not in ("comparison", "layer errors")
            ]
        total = len(list(cells(options)))
        for row in bench.pending():
            bench.rows.append(row)
            this.save(bench.protocol(), [*bench.rows, *comparisons(bench.rows)], earlier)
            advance("cells", sum(one["what"] == "perplexity" for one in bench.rows), total)
            if time.monotonic() > stop:
                break
    show(table(bench.rows), path=path)


if __name__ == "__main__":
    main()
