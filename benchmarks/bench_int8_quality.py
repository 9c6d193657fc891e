"""What int8 values cost in perplexity: the bundled model at 70 % zeros, in its own dtype and quantised.

With ``--joint`` SparseGPT prunes it, to be rounded afterwards or rounding as it prunes: perplexity, and the output
error of each layer on the inputs that the dense model gives it.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import torch
from harness import Run, command_line, show, threads_of
from torch import Tensor, nn

import pysparse
from pysparse import Packing, data
from pysparse.measure.results import make_table
from pysparse.measure.rounds import torch_threads

PACKINGS = {
    "int8, a scale a row": Packing("int8"),
    "int8, a scale a row, 16-bit tokens": Packing("int8", activation_bits=16),
    "int8, a scale for 128 inputs": Packing("int8", group_size=128),
}
SCALES = {"a scale a row": None, "a scale for 32 inputs": 32}
AFTER, WITHIN = "rounded after", "rounded within"
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


def joint_models(options: argparse.Namespace) -> dict[str, nn.Module]:
    """SparseGPT alone, rounded after it, and rounded within it; all as dense weights."""
    models = {}
    for name, values, group in (
        ("own dtype", None, None),
        *((f"{when}, {scales}", when, group) for scales, group in SCALES.items() for when in (AFTER, WITHIN)),
    ):
        dense = pysparse.from_pretrained(data.demo_model_path(), format="dense")
        model = pysparse.prune(
            dense, options.sparsity, "sparsegpt", progress=False,
            **({"values": "int8", "group_size": group} if values == WITHIN else {}),
        ).model  # fmt: skip
        if values is not None:
            pysparse.sparsify_(model, min_sparsity=0.3, values="int8", group_size=group)
        models[name] = pysparse.densify_(model)
    return models


def layer_inputs(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """The dense model and the second moments of each pruned layer's inputs on held-out text."""
    dense = pysparse.from_pretrained(data.demo_model_path(), format="dense")
    linears = {
        path: one for path, one in dense.named_modules() if type(one) is nn.Linear and path != "lm_head"
    }
    grams = {path: torch.zeros(one.in_features, one.in_features) for path, one in linears.items()}

    def add(path: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        grams[path] += rows.T @ rows

    hooks = [
        one.register_forward_pre_hook(lambda _, args, path=path: add(path, args[0]))
        for path, one in linears.items()
    ]
    pysparse.evaluate(dense, data.demo_model_path(), window=512, batch_size=4, max_windows=options.windows)
    for hook in hooks:
        hook.remove()
    return dense, grams


def layer_errors(dense: nn.Module, model: nn.Module, grams: dict[str, Tensor]) -> dict[str, float]:
    """||(W - W') X|| of each layer over ||W X||."""
    errors = {}
    for path, gram in grams.items():
        before = dense.get_submodule(path).weight.detach().double()
        moved = before - model.get_submodule(path).weight.detach().double()
        lost, whole = ((one @ gram.double() * one).sum() for one in (moved, before))
        errors[path] = float((lost / whole).sqrt())
    return errors


def measure_joint(options: argparse.Namespace) -> list[dict[str, Any]]:
    dense, grams = layer_inputs(options)
    rows: list[dict[str, Any]] = []
    for name, model in joint_models(options).items():
        found = pysparse.evaluate(
            model, data.demo_model_path(), window=512, batch_size=4, max_windows=options.windows
        ).perplexity
        rows.append({
            "what": "SparseGPT, weights alone", "values": name, "perplexity": found.value, "tokens": found.tokens,
            "over_own_dtype": found.value / (rows[0]["perplexity"] if rows else found.value),
            "layer_errors": layer_errors(dense, model, grams),
        })  # fmt: skip
        if name.startswith(WITHIN):
            after = rows[-2]["layer_errors"]
            ratios = [own / after[path] for path, own in rows[-1]["layer_errors"].items()]
            rows[-1]["error_over_rounded_after"] = {
                "geometric_mean": math.exp(math.fsum(map(math.log, ratios)) / len(ratios)),
                "least": min(ratios), "largest": max(ratios), "layers": len(ratios),
            }  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("int8_quality", __doc__ or "")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--windows", type=int, default=24, help="of 512 held-out tokens")
    parser.add_argument("--joint", action="store_true", help="SparseGPT rounded after and within its sweep")
    options = parser.parse_args(arguments)
    if options.quick:
        options.windows = 1
    if options.joint:
        options.method = "sparsegpt"
    this = Run.start("int8_joint" if options.joint else "int8_quality", options)
    with torch_threads(options.threads):
        rows = measure_joint(options) if options.joint else measure(options)
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
