"""``pysparse prune``."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pysparse.cli.options import Debug, Json, Model, Seed, Threads
from pysparse.cli.output import emit, guarded, say

if TYPE_CHECKING:
    from pysparse.pruning import PruneReport, StagedReport, StructuralReport


class Propagate(StrEnum):
    """What calibrates the next layers."""

    pruned = "pruned"
    dense = "dense"
    sequential = "sequential"


class Place(StrEnum):
    """Where activations are kept."""

    memory = "memory"
    disk = "disk"


def prune(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to save the sparse model in.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="FLOAT", help="Fraction of weights to zero. [default: 0.5, or what --pattern implies]"
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="wanda, sparsegpt, magnitude, 2ssp, ...")] = "wanda",
    pattern: Annotated[
        str | None, typer.Option(help="'unstructured' or 'n:m', n KEPT of each m inputs.")
    ] = None,
    calib: Annotated[
        list[Path] | None,
        typer.Option(
            "--calib", help="Text, .jsonl or .json file; may be repeated. [default: the bundled text]"
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Calibration sequences. [default: 128, structural methods: 32]")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per calibration sequence. [default: 2048 or the model's limit]"),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to prune: classes, paths, globs or re:EXPRESSION; may be repeated. [default: Linear]"
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Layers to leave dense, named likewise; may be repeated. [default: lm_head]"),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How sparsity is spread: uniform, owl, dlp, atp, global, owl:m=7,lmbda=0.1 or a .json profile. "
            "[default: the method's own]"
        ),
    ] = None,
    search_texts: Annotated[
        Path | None,
        typer.Option(help="Text that atp scores its trials on. [default: a fifth of the calibration text]"),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe, instead of --method.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse what a warning would say cannot be done in full.")
    ] = False,
    compat: Annotated[
        str | None, typer.Option(help="'paper': count and average as the methods' released code does.")
    ] = None,
    propagate: Annotated[
        Propagate,
        typer.Option(
            help="Calibrate on outputs of pruned or dense blocks, or sequential: within a block as well."
        ),
    ] = Propagate.pruned,
    save_format: Annotated[
        str, typer.Option("--format", help="pysparse (packed), dense, or compressed-tensors.")
    ] = "pysparse",
    values: Annotated[
        str | None, typer.Option(help="'int8' saves int8 values. [default: the model's own dtype]")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale of int8 values. [default: a whole row]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run into the same --output.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Prune blocks on this device, one by one, e.g. cuda.")
    ] = None,
    activations: Annotated[
        Place, typer.Option(help="Where hidden states wait between blocks.")
    ] = Place.memory,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and sizes; touch nothing.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Folder for the report: prune_report.json and, with plot, .png.")
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Zero the least important weights of a model and save it packed, or cut it smaller (2ssp)."""
    with guarded(debug):
        from pysparse import api

        if output is None and not dry_run:
            raise ValueError(
                "nowhere to save the pruned model: pass --output DIR (or --dry-run to see the plan)"
            )
        options: dict[str, Any] = {
            "sparsity": _number(sparsity), "method": method, "pattern": pattern, "recipe": recipe,
            "allocation": allocation, "targets": tuple(targets) if targets else ("Linear",),
            "ignore": tuple(ignore) if ignore else ("lm_head",), "calibration": _calibration(calib),
            "num_samples": num_samples, "max_length": max_length, "seed": seed,
            "strict": strict, "compat": compat,
        }  # fmt: skip
        if dry_run:
            plan = api.plan_prune(model, **options)
            emit(plan.table(), json, plan.to_dict())
            return
        result = api.prune(
            model, search_texts=search_texts, output_dir=output, save_format=save_format, values=values,
            group_size=group_size, threads=threads, resume=resume, device=device, activations=activations.value,
            propagate=propagate.value, **options,
        )  # fmt: skip
        if os.environ.get("RANK", "0") != "0":
            return  # one of several processes under torchrun: the first one speaks
        if report is not None:
            _write_report(result.report, report)
        emit(result.report, json, result.report.to_dict())
        say(f"saved in {output}; load it with pysparse.from_pretrained('{output}')")


def _number(text: str | None) -> Any:
    """Return ``text`` as a float where it is one; "50%" goes on as it is, to be answered with a hint."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _write_report(report: PruneReport | StructuralReport | StagedReport, folder: Path) -> None:
    """Write the report as JSON, and as a picture where matplotlib is installed."""
    report.to_json(folder / "prune_report.json")
    say(f"wrote {folder / 'prune_report.json'}")
    try:
        say(f"wrote {report.plot(folder / 'prune_report.png')}")
    except RuntimeError as error:
        say(f"no plot: {error}")


def _calibration(files: list[Path] | None) -> list[str] | None:
    from pysparse import calib

    return [text for file in files for text in calib.load_texts(file)] if files else None
