"""Shaver beside every baseline: AUC and log loss at 50, 80 and 95 % on planted and real clicks, and what scoring costs.

Each set is split 70/10/20 by the seed; a model is trained from it, every score is made from the training part alone,
and the test part is predicted. Scoring once is compared with the training run that it replaces: in passing, and on
smaller sets by turns (``--only cost``, a minute).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean, stdev
from typing import Any

from harness import Call, Run, command_line, show, threads_of, time_calls
from rich.table import Table

from pysparse.calib.clicks import Clicks, load_clicks
from pysparse.calib.clicks_synthetic import SyntheticClicks, SyntheticSpec
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.methods.ctr_training import CtrTraining
from pysparse.methods.shaver_study import all_scorers, study, trained_model
from pysparse.nn.ctr import CtrConfig

SPARSITIES = (0.5, 0.8, 0.95)
DIMS, SYNTHETIC, SYNTHETIC_COST = 4, 40_000, 10_000
PARTS = ("quality", "cost")
MODELS = {"synthetic": ("fm", "deepfm", "dcn-v2", "dcn-mix"), "fair": ("fm", "deepfm"), "randhie": ("fm", "deepfm"),
          "digits": ("fm",)}  # fmt: skip
TRAINING = CtrTraining(epochs=15, batch_size=512, learning_rate=3e-3, patience=2)


def clicks_of(name: str, quick: bool, seed: int, synthetic: int = SYNTHETIC) -> Clicks:
    if name == "synthetic":
        return SyntheticClicks(SyntheticSpec(seed=seed)).draw(1500 if quick else synthetic)
    found = load_clicks(name)
    return found.take(slice(None, None, 5)) if quick else found


def config_of(kind: str, field_sizes: tuple[int, ...]) -> CtrConfig:
    return CtrConfig(kind, field_sizes, DIMS, (32, 32), cross_layers=2, rank=8)


def training_of(quick: bool, seed: int) -> CtrTraining:
    return replace(TRAINING, epochs=2 if quick else TRAINING.epochs, seed=seed)


def run(options: Any) -> Iterator[dict[str, Any]]:
    for name in options.sets:
        for kind in MODELS[name][: 1 if options.quick else None]:
            for seed in range(options.seeds):
                parts = clicks_of(name, options.quick, seed).split(0.7, 0.1, seed=seed)
                training, config = (
                    training_of(options.quick, seed),
                    config_of(kind, parts[0].field_sizes),
                )
                model, seconds = trained_model(config, *parts[:2], training)
                found = study(model, seconds, parts, all_scorers(seed=seed), SPARSITIES)
                yield {
                    "part": "quality",
                    "set": name,
                    "model": kind,
                    "seed": seed,
                    "samples": len(parts[0].ids),
                    **found.record(),
                }


def costs(options: Any) -> Iterator[dict[str, Any]]:
    """Time each score and one training of the same model by turns."""
    for name in options.sets:
        parts = clicks_of(name, options.quick, 0, SYNTHETIC_COST).split(0.7, 0.1, seed=0)
        for kind in MODELS[name][: 1 if options.quick else None]:
            training = partial(
                trained_model,
                config_of(kind, parts[0].field_sizes),
                *parts[:2],
                training_of(options.quick, 0),
            )
            model, _ = training()
            calls = {"training": Call(training)}
            calls |= {one: Call(partial(scorer, model, parts[0])) for one, scorer in all_scorers().items()}
            timings = time_calls(calls, rounds=3, sample_seconds=0.0, warmup=0)
            yield {
                "part": "cost", "set": name, "model": kind, "samples": len(parts[0].ids),
                "calls": {scores: one.record() for scores, one in timings.items()},
                "training_takes_times": to_jsonable(
                    {scores: one.speedup_over(timings["training"]) for scores, one in timings.items()}
                ),
            }  # fmt: skip


def cost_table(rows: list[dict[str, Any]]) -> Table:
    lines = []
    for row in rows:
        spread = row["calls"]["training"]["microseconds"]
        seconds = "-" if spread is None else f"{spread['median'] / 1e6:.2f}"
        shares = [row["training_takes_times"][scores] for scores in row["calls"] if scores != "training"]
        cells = ["-" if share is None else f"{1 / share['median']:.4f}" for share in shares]
        lines.append([f"{row['set']}, {row['model']}", row["samples"], seconds, *cells])
    columns = ["set, model", "samples", "training s", *(one for one in rows[0]["calls"] if one != "training")]
    return make_table("time to score over the time of one training", columns, lines)


def table(rows: list[dict[str, Any]]) -> Table:
    lines = []
    for name, kind in dict.fromkeys((row["set"], row["model"]) for row in rows):
        mine = [row for row in rows if (row["set"], row["model"]) == (name, kind)]
        dense = [row["dense"] for row in mine]
        lines.append([f"{name}, {kind}", "dense", *_cells([dense] * len(SPARSITIES)), "-"])
        for scores in dict.fromkeys(one["scores"] for one in mine[0]["rows"]):
            found = [
                [
                    one
                    for row in mine
                    for one in row["rows"]
                    if (one["scores"], one["sparsity"]) == (scores, cut)
                ]
                for cut in SPARSITIES
            ]
            cost = mean(
                one["score_seconds"] / row["train_seconds"]
                for row in mine
                for one in row["rows"]
                if one["scores"] == scores
            )
            lines.append(["", scores, *_cells(found), f"{cost:.3f}"])
    columns = [
        "set, model",
        "scores",
        *(f"AUC, log loss at {cut:.0%}" for cut in SPARSITIES),
        "cost/training",
    ]
    return make_table("mean over seeds ± standard deviation of the log loss", columns, lines)


def _cells(found: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    cells = []
    for rows in found:
        losses = [row["log_loss"] for row in rows]
        spread = f" ±{stdev(losses):.4f}" if len(losses) > 1 else ""
        cells.append(f"{mean(row['auc'] for row in rows):.4f}  {mean(losses):.4f}{spread}")
    return cells


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("shaver", __doc__ or "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.sets = 1, ["synthetic", "fair"]
    threads = threads_of(options)
    this = Run.start("shaver", options)
    with torch_threads(threads):
        quality = list(run(options)) if "quality" in options.only else []
        cost = list(costs(options)) if "cost" in options.only else []
    protocol = {"threads": threads, "seeds": options.seeds, "dims": DIMS, "split": [0.7, 0.1, 0.2]}
    tables = [*([table(quality)] if quality else []), *([cost_table(cost)] if cost else [])]
    show(*tables, path=this.save(protocol, [*quality, *cost]))


if __name__ == "__main__":
    main()
