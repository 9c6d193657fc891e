"""``pysparse adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pysparse.cli.options import Debug, Json, Model, Seed, Threads
from pysparse.cli.output import emit, guarded, say


def adapt(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to save the merged model in.")],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Fraction of zeros in the end. [default: the zeros that are there; losa needs it]"),
    ] = None,
    method: Annotated[str, typer.Option(help="losa, masked-lora or masked-full.")] = "losa",
    host: Annotated[str, typer.Option(help="Method that prunes: wanda, sparsegpt, ...")] = "wanda",
    pattern: Annotated[str | None, typer.Option(help="'n:m', n KEPT of each m inputs; not for losa.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Text to train on. [default: the bundled calibration text]")
    ] = None,
    calib: Annotated[Path | None, typer.Option(help="Text that pruning looks at. [default: --texts]")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a sequence. [default: 2048 or the model's limit]")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of masked-lora, and what alpha is divided by.")] = 8,
    alpha: Annotated[float, typer.Option(help="Above 0: the scale of the adapters is alpha / rank.")] = 16.0,
    dropout: Annotated[float, typer.Option(min=0.0, help="Of the adapters' inputs, below 1.")] = 0.0,
    rounds: Annotated[int | None, typer.Option(help="Of losa. [default: 5]")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training text, above 0.")] = 1.0,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Largest learning rate.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches whose gradients make a step.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 over float32 weights.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, one more forward pass.")
    ] = False,
    save_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints. [default: rounds only]")
    ] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the last adapters in peft's format, and their base; merge them under its mask."
        ),
    ] = None,
    save_format: Annotated[str, typer.Option("--format", help="pysparse (packed) or dense.")] = "pysparse",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run into the same --output.")
    ] = False,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Train a sparse model under its mask (LoSA, masked LoRA or full), merge, and save it packed."""
    with guarded(debug):
        from pysparse import api
        from pysparse.huggingface.adapters import require_peft
        from pysparse.methods import LoSA

        training: dict[str, Any] = {
            "num_train_epochs": epochs, "learning_rate": learning_rate, "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulate, "bf16": bf16, "gradient_checkpointing": checkpointing,
        }  # fmt: skip
        if save_steps is not None:
            training |= {"save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 1}
        result = api.adapt(
            model, sparsity, method, host, pattern, texts, calib,
            lora=require_peft().LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM"),
            losa=None if rounds is None else LoSA(rounds=rounds), training=training, num_samples=num_samples,
            max_length=max_length, output_dir=output, adapter_dir=adapter_dir, save_format=save_format, resume=resume,
            seed=seed, threads=threads,
        )  # fmt: skip
        emit(result.report.table(), json, result.report.to_dict())
        say(f"saved {output}")
