"""What training under a mask gains and costs: perplexity of the bundled model, and memory of the masked product.

quality: one-shot pruning, masked LoRA of one rank in every layer, LoSA (and LoSA without one of its parts) and masked
full fine-tuning, all with the same training text and steps, scored on held-out text that none of them sees. memory:
one training step of a 4096 x 11008 layer at rank 8, by the tiles and with every matrix made in full. merge: logits
with trained adapters beside those of the merged weights in float32, the zeros before and after, and the decode speed of
the merged model beside that of the sparse one.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from harness import Run, command_line, read_runs, result_path, show, threads_of
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pysparse
from pysparse import data
from pysparse.calib import load_calibration, token_batches
from pysparse.huggingface.training import train, training_arguments
from pysparse.measure.latency import decode_benchmark
from pysparse.measure.memory import peak_memory
from pysparse.measure.results import make_table
from pysparse.measure.rounds import torch_threads
from pysparse.methods import LoSA, recipe_for
from pysparse.methods.attach import Attached, float32_master
from pysparse.methods.losa_budgets import rates_by_similarity, with_rates
from pysparse.models.discover import discover
from pysparse.models.sources import load_tokenizer
from pysparse.nn import Adapter, MaskedLowRank
from pysparse.ops import LowRankTerm, dense_lowrank_linear
from pysparse.pruning import run

Row = dict[str, Any]
HOSTS = ("wanda", "sparsegpt")
# What each part of LoSA is worth: the whole, and without one of its parts.
LOSA_ARMS = {
    "losa": LoSA(), "losa, one rate": LoSA(spread=0.0), "losa, one rank": LoSA(rank_by_error=False),
    "losa, one round": LoSA(rounds=1, first_rank=10),
}  # fmt: skip
ARMS = ("one-shot", "masked-lora", "losa", "masked-full")
ALLOCATED = "one-shot, LoSA's rates"  # of the dense model, without any training
ALL_ARMS = (*ARMS, ALLOCATED, *(arm for arm in LOSA_ARMS if arm not in ARMS))
RANK = 10  # of masked LoRA: LoSA's mean in its last round
PARTS = ("memory", "merge", "quality")
BYTES = ("step_bytes", "weight_bytes")
SCALE = 2.0  # of every adapter, as in the paper

# --- quality ---------------------------------------------------------------------------------------------


class Quality:
    """The bundled model and its texts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(data.demo_model_path())
        self.training = {
            "learning_rate": options.learning_rate, "num_train_epochs": options.epochs, "warmup_steps": 0.1,
            "per_device_train_batch_size": options.batch, "max_grad_norm": 1.0, "max_steps": options.max_steps,
        }  # fmt: skip

    def row(self, host: str, arm: str, sparsity: float, seed: int) -> Row:
        """Prune, train and score one copy."""
        model = AutoModelForCausalLM.from_pretrained(data.demo_model_path(), dtype=torch.bfloat16)
        start = time.perf_counter()
        rounds: list[Row] = []
        if arm == "one-shot":
            pysparse.prune(
                model, sparsity, host, tokenizer=self.tokenizer, num_samples=self.options.samples,
                max_length=self.options.length, seed=seed, progress=False,
            )  # fmt: skip
        elif arm == ALLOCATED:
            rounds = [{"rates": self.prune_allocated(model, host, sparsity, seed)}]
        else:
            report = pysparse.adapt(
                model, sparsity, "losa" if arm in LOSA_ARMS else arm, host, tokenizer=self.tokenizer,
                training=self.training, losa=LOSA_ARMS.get(arm),
                lora=LoraConfig(r=RANK, lora_alpha=SCALE * RANK, task_type="CAUSAL_LM"),
                num_samples=self.options.samples, max_length=self.options.length, seed=seed, progress=False,
            ).report  # fmt: skip
            rounds = [
                {"sparsity": one.sparsity, "rates": one.rates, "ranks": one.ranks, "steps": one.trained.steps,
                 "loss": one.trained.last_loss}
                for one in report.rounds
            ]  # fmt: skip
        seconds = time.perf_counter() - start
        return {
            "what": "quality", "host": host, "arm": arm, "level": sparsity, "seed": seed, **self.score(model),
            "sparsity": zeros_of(model), "seconds": seconds, "rounds": rounds,
        }  # fmt: skip

    def prune_allocated(self, model: nn.Module, host: str, sparsity: float, seed: int) -> list[float]:
        """Prune once, at the rates that LoSA gives the blocks, and return these."""
        calibration = load_calibration(
            data.calibration_texts(), self.tokenizer, num_samples=self.options.samples,
            max_length=self.options.length, seed=seed,
        )  # fmt: skip
        layout = discover(model)
        rates = rates_by_similarity(layout, calibration, sparsity, LoSA().half_width(sparsity), 64)
        recipe, mean_sparsity = with_rates(recipe_for(host), layout, rates, sparsity)
        run(layout, recipe, mean_sparsity, calibration)
        return rates

    def score(self, model: nn.Module) -> Row:
        found = pysparse.evaluate(
            model, tokenizer=self.tokenizer, window=512, max_windows=self.options.windows, progress=False
        ).perplexity
        return {"perplexity": found.value, "tokens": found.tokens}

    def rows(self) -> Iterator[Row]:
        dense = AutoModelForCausalLM.from_pretrained(data.demo_model_path(), dtype=torch.bfloat16)
        yield {"what": "quality", "host": "", "arm": "dense", "level": 0.0, "seed": 0, **self.score(dense)}
        for seed in self.options.seeds:
            for sparsity in self.options.level:
                for host in self.options.host:
                    for arm in self.options.arm:
                        yield self.row(host, arm, sparsity, seed)


def zeros_of(model: nn.Module) -> float:
    layout = discover(model)
    return 1.0 - sum(int(layer.weight.count_nonzero()) for layer in layout.layers) / layout.size


# --- memory ----------------------------------------------------------------------------------------------


def step_of(options: argparse.Namespace, sparsity: float) -> dict[str, tuple[int, Callable[[], None]]]:
    """Return for each way the bytes of its frozen weight and one forward and backward pass."""
    rows, cols, tokens = options.shape
    torch.manual_seed(0)
    weight = torch.randn(rows, cols)
    keep = torch.rand(rows, cols) >= sparsity
    weight *= keep
    adapter = Adapter(torch.randn(rows, 8) * 0.01, torch.randn(8, cols), SCALE)
    x, gradient = torch.randn(tokens, cols), torch.randn(tokens, rows)
    layer = MaskedLowRank(weight, keep, adapter)
    weight = layer.base_weight
    factors = [one.clone().requires_grad_() for one in (adapter.up, adapter.down)]

    def tiled() -> None:
        step(lambda inputs: layer(inputs), x, gradient)

    def dense() -> None:
        step(
            lambda inputs: dense_lowrank_linear(inputs, weight, keep, LowRankTerm(*factors, SCALE)),
            x,
            gradient,
        )

    packed = sum(one.nbytes for one in (layer.values, layer.bitmask, layer.row_offsets))
    return {"tiles": (packed, tiled), "every matrix in full": (weight.nbytes + keep.nbytes, dense)}


def step(run: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> None:
    inputs = x.clone().requires_grad_()
    run(inputs).backward(gradient)


def memory_rows(options: argparse.Namespace) -> Iterator[Row]:
    for sparsity in options.level:
        for way, (weight, call) in step_of(options, sparsity).items():
            call()  # threads and libraries take their memory once
            gc.collect()
            ctypes.CDLL(None).malloc_trim(
                0
            )  # freed memory that the process keeps would hide what a step takes
            with peak_memory() as reading:
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
            yield {
                "what": "memory", "way": way, "level": sparsity, "shape": options.shape[:2], "tokens": options.shape[2],
                "step_bytes": reading.growth, "weight_bytes": weight, "seconds": seconds, "since": reading.since,
            }  # fmt: skip


def memory_ratios(rows: Sequence[Row]) -> Iterator[Row]:
    for level in sorted({row["level"] for row in rows if row["what"] == "memory"}):
        found = {row["way"]: row for row in rows if row["what"] == "memory" and row["level"] == level}
        tiles, full = found["tiles"], found["every matrix in full"]
        yield {
            "what": "memory ratio", "level": level, "step": full["step_bytes"] / max(1, tiles["step_bytes"]),
            "step_and_weight": sum(full[key] for key in BYTES) / sum(tiles[key] for key in BYTES),
            "seconds": full["seconds"] / tiles["seconds"],
        }  # fmt: skip


# --- merge -----------------------------------------------------------------------------------------------


def merge_rows(options: argparse.Namespace, steps: int = 8) -> Iterator[Row]:
    """Prune the bundled model by Wanda, train adapters for ``steps`` steps, merge, and compare before and after."""
    tokenizer = load_tokenizer(data.demo_model_path())
    for sparsity in options.level:
        model = AutoModelForCausalLM.from_pretrained(data.demo_model_path(), dtype=torch.float32)
        dense = copy.deepcopy(model)
        pysparse.prune(
            model, sparsity, "wanda", tokenizer=tokenizer, num_samples=options.samples,
            max_length=options.length, progress=False,
        )  # fmt: skip
        sparse, layout = copy.deepcopy(model), discover(model)
        masks = {layer.path: layer.weight == 0 for layer in layout.layers}
        tokens = held_out_tokens(tokenizer, options.windows)
        with float32_master(model):
            adapters = {layer.path: Adapter.fresh(layer.shape, RANK, SCALE) for layer in layout.layers}
            attached = Attached(layout, adapters)
            train_briefly(model, tokenizer, options, steps)
            unmerged = logits_of(model, tokens)
            attached.merge()
        merged, before = logits_of(model, tokens), logits_of(sparse, tokens)
        yield {
            "what": "merge", "level": sparsity, "steps": steps, "rank": RANK, "logits": merged.numel(),
            "largest_difference": float((merged - unmerged).abs().max()),
            "largest_logit": float(merged.abs().max()),
            "moved_by_training": float((merged - before).abs().max()),
            "zeros_before": sum(int(mask.sum()) for mask in masks.values()),
            "zeros_after": sum(int((layer.weight == 0).sum()) for layer in layout.layers),
            "same_mask": all(torch.equal(layer.weight == 0, masks[layer.path]) for layer in layout.layers),
        }  # fmt: skip
        yield from decode_rows({"dense": dense, "sparse": sparse, "merged": model}, sparsity, options)


def train_briefly(model: nn.Module, tokenizer: Any, options: argparse.Namespace, steps: int) -> None:
    found = token_batches(data.calibration_texts(), tokenizer, options.batch * steps, options.length, seed=0)
    rows = torch.cat([batch.kwargs["input_ids"] for batch in found.batches])
    settings = {"learning_rate": options.learning_rate, "max_steps": steps, "warmup_steps": 0}
    settings["per_device_train_batch_size"] = options.batch
    with tempfile.TemporaryDirectory() as folder:
        train(model, rows, training_arguments(settings, Path(folder), cpu=True, seed=0), lambda *_: None)
    model.eval()


def held_out_tokens(tokenizer: Any, windows: int) -> Tensor:
    found = token_batches(data.held_out_texts(), tokenizer, windows, 256, seed=0)
    return torch.cat([batch.kwargs["input_ids"] for batch in found.batches])


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return logits


def decode_rows(
    models: Mapping[str, nn.Module], sparsity: float, options: argparse.Namespace
) -> Iterator[Row]:
    """Packed, bfloat16, one token at a time, all in one interleaved run; the sparse model is the measure."""
    ready = {name: copy.deepcopy(models[name]).to(torch.bfloat16) for name in ("sparse", "merged", "dense")}
    for name in ("sparse", "merged"):
        pysparse.sparsify_(ready[name])
    found = decode_benchmark(ready, 32, options.new_tokens, rounds=options.rounds)
    for name, timing in found.items():
        yield {"what": "merge speed", "level": sparsity, "engine": name, "decode": timing}


# --- the command -----------------------------------------------------------------------------------------


def figures(rows: Sequence[Row], host: str, arm: str, level: float) -> list[float]:
    return [
        row["perplexity"] for row in rows
        if row["what"] == "quality" and (row["host"], row["arm"], row["level"]) == (host, arm, level)
    ]  # fmt: skip


def comparisons(rows: Sequence[Row]) -> Iterator[Row]:
    """How LoSA's mean perplexity lies to that of masked LoRA, by the seeds that both have."""
    for host in HOSTS:
        for level in sorted({row["level"] for row in rows if row["what"] == "quality"}):
            losa, lora = (figures(rows, host, arm, level) for arm in ("losa", "masked-lora"))
            both = min(len(losa), len(lora))
            if both:
                ratio = mean(losa[:both]) / mean(lora[:both])
                yield {"what": "comparison", "host": host, "level": level, "seeds": both,
                       "losa_over_masked_lora": ratio}  # fmt: skip


def shown(found: Sequence[float]) -> str:
    if not found:
        return "-"
    spread = (max(found) - min(found)) / 2
    return f"{mean(found):.2f}" + (f" ±{spread:.2f}" if len(found) > 1 else "")


def speedup_of(rows: Sequence[Row], level: float, engine: str) -> str:
    found = next(
        row["decode"].speedup for row in rows
        if row["what"] == "merge speed" and (row["level"], row["engine"]) == (level, engine)
    )  # fmt: skip
    return f"{found.median:.3f}x ({found.p10:.3f} to {found.p90:.3f})"


def tables(rows: Sequence[Row]) -> Iterator[Any]:
    levels = sorted({row["level"] for row in rows if row["level"]})
    dense = [row["perplexity"] for row in rows if row.get("arm") == "dense"]
    if dense:
        lines = [
            [f"{host}, {arm}", *(shown(figures(rows, host, arm, level)) for level in levels)]
            for host in HOSTS for arm in ALL_ARMS if any(figures(rows, host, arm, level) for level in levels)
        ]  # fmt: skip
        heads = ["", *(f"{level:.0%}" for level in levels)]
        yield make_table(f"perplexity of the bundled model (dense {dense[0]:.2f})", heads, lines)
    lines = [
        [f"{row['level']:.0%}", f"{row['largest_difference']:.2g}", f"{row['moved_by_training']:.2g}", row["same_mask"],
         *(speedup_of(rows, row["level"], engine) for engine in ("merged", "dense"))]
        for row in rows if row["what"] == "merge"
    ]  # fmt: skip
    if lines:
        heads = ["zeros", "logits differ by", "training moved them by", "same zeros", "merged", "dense"]
        yield make_table("merging, and decoding beside the sparse model", heads, lines)
    cells = [
        [f"{row['level']:.0%}", row["way"], f"{row['step_bytes'] / 1e6:.0f} MB", f"{row['weight_bytes'] / 1e6:.0f} MB",
         f"{row['seconds']:.2f} s"]
        for row in rows if row["what"] == "memory"
    ]  # fmt: skip
    if cells:
        yield make_table(
            "one training step of a layer", ["zeros", "", "step", "frozen weight", "time"], cells
        )


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("losa", __doc__ or "")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--level", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    parser.add_argument("--host", nargs="+", default=HOSTS, choices=HOSTS)
    parser.add_argument("--arm", nargs="+", default=ARMS, choices=ALL_ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument(
        "--length", type=int, default=256, help="tokens of a sequence, trained or calibrated on"
    )
    parser.add_argument("--windows", type=int, default=32, help="held-out windows of 512 tokens")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1, help="of each round")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rounds", type=int, default=15, help="of the decoding")
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded a round")
    options = parser.parse_args(arguments)
    options.shape = (4096, 11008, 256)
    if options.quick:
        options.shape, options.level, options.host, options.windows = (64, 96, 8), [0.7], ["wanda"], 1
        options.samples, options.length, options.max_steps, options.arm = 2, 32, 1, ["one-shot", "losa"]
        options.rounds, options.new_tokens = 1, 4
    this = Run.start("losa", options)
    rows: list[Row] = []
    with torch_threads(options.threads):
        protocol = {
            "threads": threads_of(options), "model": "the bundled one, bfloat16; trained as float32",
            "training": f"the bundled calibration text in windows of {options.length} tokens, {options.batch} a step, "
            f"{options.epochs:g} epochs in all rounds together, learning rate {options.learning_rate:g}",
            "masked-lora": f"rank {RANK} in every layer", "losa": "5 rounds, mean ranks 6 to 10",
            "scored": f"{options.windows} held-out windows of 512 tokens",
            "merge": f"Wanda, adapters of rank {RANK} after 8 steps, float32; {options.windows} held-out windows of "
            f"256 tokens; decoding: bfloat16, packed, prompt 32, {options.new_tokens} tokens, {options.rounds} "
            "interleaved rounds, speed-up over the sparse model",
            "memory": "growth of the resident set over one forward and backward pass, float32, rank 8",
        }  # fmt: skip
        if "memory" in options.only:
            rows += memory_rows(options)
            rows += memory_ratios(rows)
        if "merge" in options.only:
            rows += merge_rows(options)
        path = result_path(this)
        earlier = read_runs(path) if options.append and path is not None and path.exists() else []
        this.save(protocol, rows, earlier)
        for row in Quality(options).rows() if "quality" in options.only else ():
            rows.append(row)
            this.save(protocol, [*rows, *comparisons(rows)], earlier)
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
