"""``pysparse prune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysparse.cli import prune_options as given
from pysparse.cli.options import Debug, Json, Model, Seed, Threads
from pysparse.cli.output import emit, guarded, say

if TYPE_CHECKING:
    from pysparse.pruning import PruneReport, StagedReport, StructuralReport


def prune(
    model: Model,
    output: given.Output = None,
    sparsity: given.Sparsity = None,
    method: given.Method = "wanda",
    pattern: given.Pattern = None,
    calib: given.Calib = None,
    num_samples: given.NumSamples = None,
    max_length: given.MaxLength = None,
    targets: given.Targets = None,
    ignore: given.Ignore = None,
    allocation: given.Allocation = None,
    search_texts: given.SearchTexts = None,
    recipe: given.RecipeFile = None,
    strict: given.Strict = False,
    compat: given.Compat = None,
    propagate: given.Propagation = given.Propagate.pruned,
    save_format: given.SaveFormat = "pysparse",
    values: given.Values = None,
    group_size: given.GroupSize = None,
    resume: given.Resume = False,
    device: given.Device = None,
    activations: given.Activations = given.Place.memory,
    dry_run: given.DryRun = False,
    report: given.ReportFolder = None,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Zero the least important weights of a model and save it packed, or cut it smaller (2ssp)."""
    with guarded(debug):
        from pysparse import api

        options: dict[str, Any] = {
            "sparsity": _number(sparsity), "method": method, "pattern": pattern, "recipe": recipe,
            "allocation": allocation, "targets": tuple(targets or ("Linear",)), "ignore": tuple(ignore or ("lm_head",)),
            "calibration": _calibration(calib), "num_samples": num_samples, "max_length": max_length, "seed": seed,
            "strict": strict, "compat": compat,
        }  # fmt: skip
        if dry_run:
            plan = api.plan_prune(model, **options)
            emit(plan.table(), json, plan.to_dict())
            return
        if output is None:
            raise ValueError(
                "nowhere to save the pruned model: pass --output DIR (or --dry-run to see the plan)"
            )
        result = api.prune(
            model, search_texts=search_texts, output_dir=output, save_format=save_format, values=values,
            group_size=group_size, threads=threads, resume=resume, device=device, activations=activations.value,
            propagate=propagate.value, **options,
        )  # fmt: skip
        if os.environ.get("RANK", "0") == "0":  # of several processes under torchrun the first one speaks
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
