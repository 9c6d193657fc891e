"""``pysparse attention``: what sparse attention does to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pysparse.cli.options import Debug, Dtype, Json, Model, Threads, torch_dtype
from pysparse.cli.output import emit, guarded

attention = typer.Typer(
    name="attention",
    help="Long prompts: what sparse attention computes, and what it loses.",
    no_args_is_help=True,
)


@attention.callback()
def main() -> None:
    """Long prompts: what sparse attention computes, and what it loses."""


@attention.command()
def tune(
    planner: Annotated[
        str, typer.Option(help="anchor, proxy, streaming, vertical-slash, flexprefill or xattention.")
    ] = "anchor",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the calls.")] = Dtype.bf16,
    longest: Annotated[int, typer.Option(help="Keys of the longest call timed, at least 128.")] = 8192,
    threads: Threads = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Time a planner beside exact attention and keep from how many keys on it is used. Some seconds."""
    with guarded(debug):
        from pysparse import api

        found = api.tune_attention(planner, torch_dtype(dtype), longest=longest, threads=threads)
        emit(found.table(), json, found.to_dict())


@attention.command()
def stats(
    model: Model,
    planner: Annotated[
        str,
        typer.Option(
            help="anchor, proxy, streaming, vertical-slash, flexprefill, xattention; or flash for exact."
        ),
    ] = "anchor",
    prompt: Annotated[
        Path | None, typer.Option(help="Text, .jsonl or .json file. [default: the bundled held-out text]")
    ] = None,
    length: Annotated[
        int, typer.Option(min=2, help="Tokens of the prompt; the text is repeated to it.")
    ] = 8192,
    min_length: Annotated[
        int | None,
        typer.Option(min=0, help="Exact below this many keys. [default: what `tune` found]"),
    ] = None,
    max_density: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Exact where a plan would compute more of the pairs.")
    ] = 0.6,
    sample_rows: Annotated[int, typer.Option(min=0, help="Rows of each call whose recall is measured.")] = 64,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to run in. [default: the model's]")] = None,
    threads: Threads = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Run one long prompt and show density, recall, milliseconds and fallbacks, layer by layer."""
    with guarded(debug):
        from pysparse import api

        log = api.attention_stats(
            model, None if planner == "flash" else planner, prompt=prompt, length=length, min_length=min_length,
            max_density=max_density, sample_rows=sample_rows,
            dtype=None if dtype is None else torch_dtype(dtype), threads=threads,
        )  # fmt: skip
        emit(log, json, log.to_dict())
