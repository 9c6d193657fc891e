"""The calls that prune, and that say what pruning would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pysparse import huggingface, methods
from pysparse.api.loading import calibration_for, load_model, tokenizer_or_none
from pysparse.huggingface.folder import is_ours
from pysparse.huggingface.saving import FORMATS
from pysparse.measure.progress import progress_on_stderr
from pysparse.measure.rounds import torch_threads
from pysparse.models.discover import discover
from pysparse.models.skeleton import skeleton
from pysparse.pruning import BlockEvent, PrunePlan, PruneReport, Recipe, plan, resolve_sparsity, run
from pysparse.pruning.run import Propagate


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What :func:`prune` returns."""

    model: nn.Module  # masked: pruned weights are zeros in ordinary dense layers
    report: PruneReport


def prune(
    model_or_path: nn.Module | str | Path,
    sparsity: float | None = None,
    method: str = "wanda",
    pattern: str | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    *,
    num_samples: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    allocation: str = "uniform",
    recipe: Recipe | str | Path | None = None,
    propagate: Propagate = "pruned",
    output_dir: str | Path | None = None,
    save_format: str = "pysparse",
    seed: int = 0,
    threads: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[BlockEvent], None]] | None = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int | None = None,
) -> PruneResult:
    """Zero the least important weights of a model; a model object is pruned IN PLACE and returned.

    Args:
        model_or_path: a model, or the folder (or hub name) of one, which is then loaded.
        sparsity: fraction of zeros in [0, 1) in every pruned matrix; None is 0.5, or what ``pattern`` implies.
        method: a name of ``pysparse.methods.METHODS``: "wanda", "sparsegpt" (both calibrated), "magnitude".
        pattern: None or "unstructured", or "n:m": n KEPT of every m consecutive inputs, e.g. "2:4".
        calibration: texts (a list, or a .txt, .json or .jsonl file) or batches of tokens (tensors, dicts with
            ``input_ids``, a DataLoader). None takes the bundled text, and the report says so; a method that
            needs no data runs no forward pass at all.
        tokenizer: for texts; defaults to the one saved beside the model. Saved with the result.
        num_samples: calibration sequences, default 128; also spelled ``num_calibration_samples``.
        max_length: tokens a sequence, default the smaller of 2048 and the model's positions; also spelled
            ``max_seq_length``.
        batch_size: sequences in a forward pass, for texts and tensors; DataLoaders bring their own.
        targets, ignore: class names, module paths or "re:" expressions, see ``pysparse.models.discover``.
        allocation: how sparsity is spread over layers, a name of ``pysparse.methods.ALLOCATIONS``.
        recipe: a :class:`pysparse.pruning.Recipe` or a YAML file, in place of method, pattern and allocation.
        propagate: "pruned" calibrates a block on outputs of the pruned blocks before it, "dense" on dense ones.
        output_dir: folder to save the model in, with tokenizer, ``recipe.yaml`` and ``prune_report.json``.
        save_format: "pysparse" (packed), "dense" or "compressed-tensors".
        seed: of the calibration windows.
        threads: torch threads while pruning; None leaves them alone.
        progress: show blocks done and time left on stderr.
        callbacks: called with a :class:`pysparse.pruning.BlockEvent` after each block.

    Returns the model and a report with the exact count of every layer. Everything is checked before a weight
    is touched. Raises ValueError for a wrong sparsity, an unknown name, contradicting arguments, a model
    without linear layers, missing or empty calibration data, activations that are not finite.
    """
    samples = _one_of("num_samples", num_samples, "num_calibration_samples", num_calibration_samples)
    length = _one_of("max_length", max_length, "max_seq_length", max_seq_length)
    chosen = _recipe(recipe, method, pattern, allocation)
    resolve_sparsity(chosen.structure, sparsity)
    saved_recipe = None if output_dir is None else _check_output(output_dir, save_format, chosen)
    model = load_model(model_or_path, format="dense")
    if output_dir is not None and not isinstance(model, PreTrainedModel):
        raise ValueError(f"output_dir needs a transformers model, got {type(model).__name__}: leave it out")
    layout = discover(model, targets, ignore)
    found = tokenizer_or_none(model_or_path, model, tokenizer)
    data_in = None
    if chosen.needs_calibration:
        data_in = calibration_for(calibration, model, found, samples, length, batch_size, seed)
    with torch_threads(threads), progress_on_stderr(progress) as advance:
        advance("pruning blocks", 0, len(layout.blocks))
        report = run(
            layout, chosen, sparsity, data_in, propagate=propagate, seed=seed,
            callbacks=(lambda event: advance("pruning blocks", event.index + 1, event.total), *(callbacks or ())),
        )  # fmt: skip
    if calibration is not None and data_in is None:
        report = report.with_warnings(["calibration was given, but this method needs none: not used"])
    if output_dir is not None and saved_recipe is not None:
        files = {"recipe.yaml": saved_recipe, "prune_report.json": report.to_json() + "\n"}
        huggingface.save_pretrained(model, output_dir, format=save_format, tokenizer=found, extra_files=files)
    return PruneResult(model, report)


def plan_prune(
    model_or_path: nn.Module | str | Path,
    sparsity: float | None = None,
    method: str = "wanda",
    pattern: str | None = None,
    *,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    allocation: str = "uniform",
    recipe: Recipe | str | Path | None = None,
) -> PrunePlan:
    """Return what :func:`prune` would do with these arguments: layers, budgets, exact counts, predicted bytes.

    Touches nothing; of a folder only ``config.json`` is read. Raises as :func:`prune` does.
    """
    chosen = _recipe(recipe, method, pattern, allocation)
    resolve_sparsity(chosen.structure, sparsity)
    model = model_or_path if isinstance(model_or_path, nn.Module) else skeleton(model_or_path)
    return plan(discover(model, targets, ignore), chosen, sparsity)


def _one_of(name: str, value: int | None, alias: str, other: int | None) -> int | None:
    """Return what was given under either name; ValueError when both were and they differ."""
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name}={value} and {alias}={other} are two names of one thing: pass one of them")
    return other if value is None else value


def _recipe(recipe: Recipe | str | Path | None, method: str, pattern: str | None, allocation: str) -> Recipe:
    if recipe is None:
        return methods.recipe_for(method, pattern, allocation)
    for name, value, default in (("method", method, "wanda"), ("pattern", pattern, None),
                                 ("allocation", allocation, "uniform")):  # fmt: skip
        if value != default:
            raise ValueError(f"{name}={value!r} is part of the recipe that was given too: pass one of them")
    return methods.load_recipe(recipe) if isinstance(recipe, str | Path) else recipe


def _check_output(output_dir: str | Path, save_format: str, recipe: Recipe) -> str:
    """Return the recipe as YAML; an error now when the result could not be saved after the work is done."""
    if save_format not in FORMATS:
        raise ValueError(f"save_format is one of {', '.join(FORMATS)}, got '{save_format}'")
    folder = Path(output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir={output_dir} is a file; pass a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise FileExistsError(
            f"output_dir={output_dir} is neither empty nor a model that pysparse saved: choose another folder"
        )
    return methods.recipe_to_yaml(recipe)
