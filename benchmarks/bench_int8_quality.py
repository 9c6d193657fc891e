"""What int8 values cost in perplexity: the bundled model at 70 % zeros, in its own dtype and quantised."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from harness import Run, command_line, show, threads_of
from torch import nn

import pysparse
from pysparse import Packing, data
from pysparse.measure.results import make_table
from pysparse.measure.rounds import torch_threads

PACKINGS = {
    "int8, a scale a row": Packing("int8"),
    "int8, a scale a row, 16-bit tokens": Packing("int8", activation_bits=16),
    "int8, a scale for 128 inputs": Packing("int8", group_size=128),
}
WEIGHTS_ALONE = "weights alone"  # written out again, so that nothing quantises tokens
PROTOCOLS = {"tokens quantised too": (64, 1), WEIGHTS_ALONE: (512, 4)}  # window, batch


def models_of(options: argparse.Namespace) -> dict[str, nn.Module]:
    dense = pysparse.from_pretrained(data.demo_model_path(), format="dense")
    pruned = pysparse.prune(dense, options.sparsity, options.method, progress=False).model
    models = {}
    for name, packing in {"own dtype": Packing(), **PACKINGS}.items():
        models[name] = copy.deepcopy(pruned)
        pysparse.sparsify_(
            models[name], min_sparsity=0.3, values=packing.values, group_size=packing.group_size,
            activation_bits=packing.activation_bits,
        )  # fmt: skip
    return models


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows, models = [], models_of(options)
    for what, (window, batch) in PROTOCOLS.items():
        for name, model in models.items():
            if what == WEIGHTS_ALONE:
                pysparse.densify_(model)
            count = options.windows * 512 // window
            found = pysparse.evaluate(
                model, data.demo_model_path(), window=window, batch_size=batch, max_windows=count
            ).perplexity
            rows.append({"what": what, "values": name, "perplexity": found.value, "tokens": found.tokens})
        own = next(row["perplexity"] for row in rows if row["what"] == what)
        for row in rows[-len(models) :]:
            row["over_own_dtype"] = row["perplexity"] / own
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("int8_quality", __doc__ or "")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--windows", type=int, default=24, help="of 512 held-out tokens")
    options = parser.parse_args(arguments)
    if options.quick:
        options.windows = 1
    this = Run.start("int8_quality", options)
    with torch_threads(options.threads):
        rows = measure(options)
        protocol = {
            "model": "the bundled one, real trained weights",
            "sparsity": options.sparsity, "method": options.method, "threads": threads_of(options),
            "windows": {what: f"{window} tokens, {batch} a call" for what, (window, batch) in PROTOCOLS.items()},
        }  # fmt: skip
        path = this.save(protocol, rows)
    columns = ["", "values", "perplexity", "of own dtype"]
    cells = [[row["what"], row["values"], row["perplexity"], row["over_own_dtype"]] for row in rows]
    show(make_table(f"{options.method}, {options.sparsity:.0%} zeros", columns, cells), path=path)


if __name__ == "__main__":
    main()
