"""The commands. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

import pysparse
from pysparse.cli.adapt import adapt
from pysparse.cli.attention import attention
from pysparse.cli.ebf import app as ebf_app
from pysparse.cli.embed import embed
from pysparse.cli.options import Debug, Device, Dtype, Json, Model, Plot, Seed, Threads, torch_dtype
from pysparse.cli.output import EXIT_FAILED, console, emit, guarded, say
from pysparse.cli.prune import prune
from pysparse.cli.shapley import shapley
from pysparse.cli.suite import app as suite_app

app = typer.Typer(
    name="pysparse",
    help="Make Hugging Face models sparse, and make the sparsity pay.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(pysparse.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make Hugging Face models sparse, and make the sparsity pay.

    Results go to stdout, progress and messages to stderr. Exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted.
    """


app.command()(prune)
app.command()(adapt)
app.command()(embed)
app.command()(shapley)
app.add_typer(ebf_app, name="ebf")
app.add_typer(attention)
app.add_typer(suite_app, name="suite")


@app.command("eval")
def evaluate(
    model: Model,
    texts: Annotated[
        Path | None, typer.Option(help="Text, .jsonl or .json file. [default: the bundled held-out text]")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense model to compare with: perplexity and agreement.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. [default: 2048 or the model's limit]")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows. [default: window, no overlap]")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Score a random subset of windows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Measure perplexity and bits per byte, with the protocol in the result."""
    with guarded(debug):
        from pysparse import api

        result = api.evaluate(
            model, texts=texts, reference=dense, window=window, stride=stride, max_windows=max_windows,
            batch_size=batch_size, threads=threads, seed=seed, progress=True,
        )  # fmt: skip
        emit(result, json, result)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="Folder of a sparse model.", show_default=False)] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of a model: llama-2-7b, llama-3-8b, tinyllama or qwen2.5-0.5b with random weights."
        ),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            help="Fraction of zeros for --shape; several with --device cuda. [default: 0.7; cuda: 0.5 0.6 0.7]"
        ),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Blocks for --shape. [default: as many as memory holds]")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to time; cuda takes --shape only.")] = Device.cpu,
    compiled: Annotated[bool, typer.Option("--compiled", help="Under torch.compile, too (cuda).")] = False,
    dense: Annotated[
        str | None, typer.Option(help="Dense model to compare with. [default: the same weights, unpacked]")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of weights and activations. [default: bf16 for --shape]")
    ] = None,
    prompt_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated in each round.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
    debug: Debug = False,
) -> None:
    """Time dense and sparse in one process, round by round."""
    with guarded(debug):
        from pysparse import api

        if (model is None) == (shape is None):
            raise ValueError("pass either a model folder or --shape NAME")
        settings = api.BenchSettings(prompt_len, new_tokens, batch_size, rounds, 1, threads, seed)
        if device is Device.cuda:
            _check_cuda_options(shape, dtype, threads)
            result = api.benchmark_shape_on_cuda(
                str(shape), sparsity or (0.5, 0.6, 0.7), blocks, settings, compiled=compiled, progress=True
            )
        elif compiled or len(sparsity or ()) > 1:
            raise ValueError("--compiled and several --sparsity go with --device cuda")
        elif shape is not None:
            (zeros,) = sparsity or (0.7,)
            result = api.benchmark_shape(
                shape, zeros, torch_dtype(dtype or Dtype.bf16), blocks, settings, progress=True
            )
        else:
            result = api.benchmark(
                str(model), dense, prompt_len, new_tokens, batch_size, threads,
                None if dtype is None else torch_dtype(dtype), rounds=rounds, seed=seed, progress=True,
            )  # fmt: skip
        emit(result, json, result)
        if plot is not None:
            say(f"wrote {result.plot(plot)}")


def _check_cuda_options(shape: str | None, dtype: Dtype | None, threads: int | None) -> None:
    if shape is None or threads is not None or dtype not in (None, Dtype.bf16):
        raise ValueError("--device cuda times --shape NAME in bf16, and takes no --threads")


@app.command()
def report(model: Model, json: Json = None, plot: Plot = None, debug: Debug = False) -> None:
    """List a model's linear layers: sparsity, bytes, and the kernel that each one runs."""
    with guarded(debug):
        from pysparse import api

        result = api.report(api.load_model(model))
        emit(result, json, result.to_dict())
        if plot is not None:
            say(f"wrote {result.plot(plot)}")


@app.command()
def kernels(json: Json = None, debug: Debug = False) -> None:
    """List the compiled kernels and which of them this CPU runs."""
    with guarded(debug):
        from pysparse.measure.kernels import choice_table, kernel_table, show_choices, show_kernels

        entries, choices = kernel_table(), choice_table()
        emit(
            Group(show_kernels(entries), show_choices(choices)),
            json,
            {"kernels": entries, "choices": choices},
        )


@app.command()
def tune(
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype to measure. [default: bf16 and fp32]")] = None,
    threads: Threads = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Measure this machine's kernels now and keep the costs by which layers choose. Some seconds."""
    with guarded(debug):
        from pysparse.measure.kernels import show_choices, tune_kernels

        dtypes = [torch_dtype(one) for one in ([dtype] if dtype else (Dtype.bf16, Dtype.fp32))]
        rows, files = tune_kernels(dtypes, threads)
        emit(show_choices(rows), json, {"choices": rows, "files": files})
        say(f"kept in {', '.join(files)}")


@app.command()
def doctor(json: Json = None) -> None:
    """Check the installation and say what to do about what is wrong (exit code 1 if anything is)."""
    from pysparse.measure.doctor import doctor as examine
    from pysparse.measure.doctor import show_findings

    findings = examine()
    emit(show_findings(findings), json, findings)
    if not findings["ok"]:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for table, JSON, plot and models.")
    ] = Path("demo_output"),
    speed: Annotated[bool, typer.Option(help="Also time two Llama-2-7B-shaped blocks.")] = True,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens for the perplexity.")] = 48,
    threads: Threads = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Prune the bundled model, save, load and score it; then time true 7B shapes. About two minutes."""
    with guarded(debug):
        from pysparse.cli.demo import run_demo

        result = run_demo(output, speed=speed, max_windows=windows, threads=threads)
        if json == "-":
            emit(None, json, result.to_dict())
        else:
            for table in result.tables():
                console().print(table)
            say(f"wrote {', '.join(str(path) for path in result.files)}")
