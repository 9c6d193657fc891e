"""The options of ``pysparse prune``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Propagate(StrEnum):
    """What calibrates the next layers."""

    pruned = "pruned"
    dense = "dense"
    sequential = "sequential"


class Place(StrEnum):
    """Where activations are kept."""

    memory = "memory"
    disk = "disk"


Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to save the sparse model in.")]
Sparsity = Annotated[
    str | None,
    typer.Option(
        metavar="FLOAT", help="Fraction of weights to zero. [default: 0.5, or what --pattern implies]"
    ),
]
Method = Annotated[str, typer.Option(help="wanda, sparsegpt, magnitude, 2ssp, ...")]
Pattern = Annotated[str | None, typer.Option(help="'unstructured' or 'n:m', n KEPT of each m inputs.")]
Calib = Annotated[
    list[Path] | None,
    typer.Option("--calib", help="Text, .jsonl or .json file; may be repeated. [default: the bundled text]"),
]
NumSamples = Annotated[
    int | None, typer.Option(min=1, help="Calibration sequences. [default: 128, structural methods: 32]")
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens per calibration sequence. [default: 2048 or the model's limit]"),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="Layers to prune: classes, paths, globs or re:EXPRESSION; may be repeated. [default: Linear]"
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Layers to leave dense, named likewise; may be repeated. [default: lm_head]"),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        help="How sparsity is spread: uniform, owl, dlp, atp, global, owl:m=7,lmbda=0.1 or a .json profile. "
        "[default: the method's own]"
    ),
]
SearchTexts = Annotated[
    Path | None,
    typer.Option(help="Text that atp scores its trials on. [default: a fifth of the calibration text]"),
]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML recipe, instead of --method.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse what a warning would say cannot be done in full.")
]
Compat = Annotated[
    str | None, typer.Option(help="'paper': count and average as the methods' released code does.")
]
Propagation = Annotated[
    Propagate,
    typer.Option(
        help="Calibrate on outputs of pruned or dense blocks, or sequential: within a block as well."
    ),
]
SaveFormat = Annotated[str, typer.Option("--format", help="pysparse (packed), dense, or compressed-tensors.")]
Values = Annotated[
    str | None, typer.Option(help="'int8' saves int8 values. [default: the model's own dtype]")
]
GroupSize = Annotated[
    int | None, typer.Option(help="Inputs that share a scale of int8 values. [default: a whole row]")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run into the same --output.")
]
Device = Annotated[str | None, typer.Option(help="Prune blocks on this device, one by one, e.g. cuda.")]
Activations = Annotated[Place, typer.Option(help="Where hidden states wait between blocks.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and sizes; touch nothing.")]
ReportFolder = Annotated[
    Path | None, typer.Option(help="Folder for the report: prune_report.json and, with plot, .png.")
]
