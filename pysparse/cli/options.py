"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the result as JSON; '-' prints it instead of a table."
    ),
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw a PNG (needs the plot extra).")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="torch threads [default: torch's own choice].")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
Model = Annotated[str, typer.Argument(help="Folder (or hub name) of a model.", show_default=False)]


class Dtype(StrEnum):
    """Dtypes by the names people type."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"


class Device(StrEnum):
    """Where a benchmark runs."""

    cpu = "cpu"
    cuda = "cuda"


def torch_dtype(dtype: Dtype) -> Any:
    """Return the dtype that torch calls so."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[dtype.value]
