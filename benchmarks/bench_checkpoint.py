"""What a pruned model weighs on disk, what saving and loading it takes, and whether it comes back the same."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shapes
import torch
from harness import Call, Run, command_line, show, threads_of, time_calls
from rich.table import Table
from torch import nn

import pysparse
from pysparse import data
from pysparse.formats import BitmapTensor, TiledBitmap
from pysparse.measure.comparison import BenchSettings, logit_difference
from pysparse.measure.results import make_table, megabytes, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.measure.size import file_size
from pysparse.measure.twins import zero_rows_at_random_

METHOD = "wanda"
LLAMA_LINEARS = 32 * (
    4 * 4096 * 4096 + 3 * 4096 * 11008
)  # weights of Llama-2-7B's blocks, lm_head left dense


def pruned_model(sparsity: float, options: argparse.Namespace) -> nn.Module:
    """The bundled model, a fresh one, pruned."""
    model = pysparse.from_pretrained(data.demo_model_path(), format="dense")
    return pysparse.prune(
        model, sparsity, METHOD, num_samples=options.samples, max_length=512, progress=False
    ).model  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def model_row(sparsity: float, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prune, save, load, save again, load again: sizes, differences, times."""
    model, settings = pruned_model(sparsity, options), BenchSettings(prompt_len=64)
    first, second, dense = work / "first", work / "second", work / "dense"
    pysparse.save_pretrained(model, first)
    pysparse.save_pretrained(model, dense, format="dense")
    pysparse.save_pretrained(pysparse.from_pretrained(first), second)
    size, layers = file_size(first), [layer.path for layer in pysparse.report(model).layers if layer.sparsity]
    logits = {}
    for name, dtype in shapes.DTYPES.items():
        masked, packed = (
            pysparse.from_pretrained(dense, dtype=dtype),
            pysparse.from_pretrained(first, dtype=dtype),
        )
        difference = logit_difference({"masked": masked, "packed": packed}, settings)["packed"]
        logits[name] = difference
    return {
        "what": "bundled model",
        "method": METHOD,
        "sparsity": sparsity,
        "linear_bytes": size.linears,
        "linear_bytes_dense": file_size(dense, layers).linears,
        "linear_ratio": size.linear_ratio,
        "file_bytes": size.total,
        "file_bytes_dense": file_size(dense, layers).total,
        "save_load_save": "identical" if digests(first) == digests(second) else "DIFFERENT",
        "sha256": digests(first)["model.safetensors"],
        "logit_difference": logits,
        **_times(model, first, dense, work, options),
    }


def _times(
    model: nn.Module, packed: Path, dense: Path, work: Path, options: argparse.Namespace
) -> dict[str, Any]:
    calls = {
        "save_packed": Call(lambda: pysparse.save_pretrained(model, work / "again")),
        "save_dense": Call(lambda: pysparse.save_pretrained(model, work / "again", format="dense")),
        "load_packed": Call(lambda: pysparse.from_pretrained(packed)),
        "load_dense": Call(lambda: pysparse.from_pretrained(dense)),
    }
    return {name: timing.record() for name, timing in time_calls(calls, options.rounds).items()}


def packing_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How fast a large layer is packed, in dense bytes read; and what that makes for 7 billion weights."""
    rows, cols = shapes.LINEAR[options.layer]
    for name, dtype in shapes.DTYPES.items():
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, cols, generator=generator).to(dtype)
        zero_rows_at_random_(weight, 0.7, generator)
        bitmap = BitmapTensor.from_dense(weight)
        tiled = TiledBitmap.from_bitmap(bitmap)
        steps = {
            "zeros found, file layout": Call(lambda w=weight: BitmapTensor.from_dense(w)),
            "file layout checked": Call(bitmap.validate),
            "file to kernel layout": Call(lambda b=bitmap: TiledBitmap.from_bitmap(b)),
            "kernel to file layout": Call(tiled.to_bitmap),
            "file layout to dense": Call(bitmap.to_dense),
        }
        for step, timing in time_calls(steps, options.rounds).items():
            spread = timing.spread()
            rate = weight.nbytes / spread.median / 1e3 if spread else None  # GB/s
            yield {
                "what": "packing", "layer": options.layer, "dtype": name, "sparsity": 0.7, "step": step,
                **timing.record(), "dense_gigabytes_per_second": rate,
                "llama_2_7b_seconds_extrapolated": rate and LLAMA_LINEARS * dtype.itemsize / rate / 1e9,
            }  # fmt: skip


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for sparsity in options.sparsity:
        work = Path(tempfile.mkdtemp(prefix="pysparse-bench-"))
        try:
            rows.append(model_row(sparsity, work, options))
        finally:
            shutil.rmtree(work)
    return to_jsonable([*rows, *packing_rows(options)])


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    models, packing = ([row for row in rows if row["what"] == what] for what in ("bundled model", "packing"))
    columns = [
        "zeros",
        "linears",
        "of dense bf16",
        "file",
        "dense file",
        "save, load, save",
        "load ms",
        "dense ms",
    ]
    yield make_table("bundled model, " + METHOD, columns, [_model_line(row) for row in models])
    columns = [f"packing {packing[0]['layer']}, 70 % zeros", "ms", "dense GB/s", "7B, seconds (extrapolated)"]
    yield make_table("one layer", columns, [_packing_line(row) for row in packing])


def _model_line(row: dict[str, Any]) -> list[Any]:
    loads = [row[name]["microseconds"] for name in ("load_packed", "load_dense")]
    return [
        f"{row['sparsity']:.0%}",
        megabytes(row["linear_bytes"]),
        row["linear_ratio"],
        megabytes(row["file_bytes"]),
        megabytes(row["file_bytes_dense"]),
        row["save_load_save"],
        *(one and one["median"] / 1e3 for one in loads),
    ]


def _packing_line(row: dict[str, Any]) -> list[Any]:
    spread = row["microseconds"]
    seconds = row["llama_2_7b_seconds_extrapolated"]
    return [
        f"{row['step']}, {row['dtype']}",
        spread and spread["median"] / 1e3,
        row["dense_gigabytes_per_second"],
        seconds,
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("checkpoint", __doc__ or "")
    parser.add_argument("--sparsity", nargs="+", type=float, default=shapes.END_TO_END_SPARSITIES)
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--layer", choices=shapes.LINEAR, default="4096x11008")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    if options.quick:
        options.sparsity, options.samples, options.layer, options.rounds = [0.7], 2, shapes.QUICK_SHAPE, 3
    this = Run.start("checkpoint", options)
    with torch_threads(options.threads):
        rows = run(options)
        protocol = {
            "threads": threads_of(options),
            "rounds": options.rounds,
            "model": f"bundled model, {METHOD}, {options.samples} calibration sequences of 512 tokens",
            "linear_ratio": "bytes of the packed layers' tensors in the file over the same layers in dense bf16",
            "save_load_save": "sha256 of every file of the folder, saved again after loading",
            "logit_difference": "packed against masked dense, both loaded from disk, one prompt of 64 tokens",
            "extrapolated": f"Llama-2-7B: {LLAMA_LINEARS / 1e9:.2f}e9 weights at the rate of this one layer",
        }
        path = this.save(protocol, rows)
    show(*tables(rows), path=path)


if __name__ == "__main__":
    main()
