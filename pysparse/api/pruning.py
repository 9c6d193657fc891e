"""The call that prunes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pysparse.api.choosing import choose, find_layout, one_of, quantized_jointly, refuse_in_stages
from pysparse.api.execution import Running, Task, executing
from pysparse.api.loading import (
    Texts,
    Windows,
    calibration_for,
    explaining_memory,
    load_model,
    tokenizer_or_none,
)
from pysparse.api.saving import Saving, packing_for
from pysparse.api.search import is_searched, part_texts, search_windows
from pysparse.api.stages import Order, prune_in_stages
from pysparse.calib.activations import Place
from pysparse.calib.ranks import joined
from pysparse.measure.progress import progress_on_stderr
from pysparse.measure.rounds import torch_threads
from pysparse.methods import AllocationLike
from pysparse.models.discover import Filter
from pysparse.pruning import (
    BlockEvent,
    BlockLayout,
    PruneReport,
    Recipe,
    StagedRecipe,
    StagedReport,
    StructuralMethod,
    StructuralReport,
)
from pysparse.pruning.run import Propagate


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What :func:`prune` returns."""

    model: nn.Module  # masked: pruned weights are zeros in ordinary dense layers; or smaller
    report: PruneReport | StructuralReport | StagedReport


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
    allocation: AllocationLike | None = None,
    search_texts: Texts | None = None,
    recipe: Recipe | StagedRecipe | StructuralMethod | str | Path | None = None,
    filter_fn: Filter | None = None,
    whole: bool = False,
    strict: bool = False,
    compat: str | None = None,
    propagate: Propagate = "pruned",
    output_dir: str | Path | None = None,
    resume: bool = False,
    save_format: str = "pysparse",
    values: str | None = None,
    group_size: int | None = None,
    device: torch.device | str | None = None,
    activations: Place = "memory",
    activations_dir: str | Path | None = None,
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
        method: a name of ``pysparse.methods.METHODS``: "wanda", "sparsegpt" (both calibrated), "magnitude"; or of
            ``STRUCTURAL``, which make a smaller dense model and take ``sparsity`` as the share of all the blocks'
            parameters that goes: "2ssp", with settings "2ssp:multiple_of=64,n_attn=3", "shortgpt".
        pattern: None or "unstructured", or "n:m": n KEPT of every m consecutive inputs, e.g. "2:4".
        calibration: texts (a list, or a .txt, .json or .jsonl file) or batches of tokens (tensors, dicts with
            ``input_ids``, a DataLoader). None takes the bundled text, and the report says so; a method that
            needs no data runs no forward pass at all.
        tokenizer: for texts; defaults to the one saved beside the model. Saved with the result.
        num_samples: calibration sequences, default 128; also spelled ``num_calibration_samples``.
        max_length: tokens a sequence, default the smaller of 2048 and the model's positions; also spelled
            ``max_seq_length``.
        batch_size: sequences in a forward pass, for texts and tensors; DataLoaders bring their own.
        targets, ignore: class names, module paths, globs or "re:" expressions, see ``pysparse.models.discover``.
        allocation: how sparsity is spread over layers: "uniform", "owl", "dlp", "atp", "global" or another name
            of ``pysparse.methods.ALLOCATIONS``, with settings "owl:m=7,lmbda=0.1"; a .json profile, a list
            (sparsities of the blocks), a mapping (of layers), a function, or an allocation. None is the
            method's own. With "n:m" layers get an n of their own, with the zeros of n:m in all.
        search_texts: text that "atp" scores its trials on; never the text of a test. None holds every fifth
            calibration document back for it.
        recipe: a :class:`pysparse.pruning.Recipe`, one with stages (:class:`pysparse.pruning.StagedRecipe`, whose
            stages have sparsities of their own), a structural method or a YAML file, in place of method, pattern and
            allocation.
        filter_fn: called as ``filter_fn(module, path)`` for each layer that targets and ignore leave; False keeps
            it dense.
        whole: take the model as one block, so that layers outside of its blocks (stem, classifier) are prunable too,
            as is usual in vision; statistics of all layers are held at once.
        strict: raise ValueError where some of what was asked for cannot be done and a warning would say so: a
            width that n:m does not divide, an ``ignore`` that names nothing, experts that cannot be calibrated.
        compat: None, or "paper" for what the methods' released code does where it differs from the exact form:
            see :func:`pysparse.methods.as_released`.
        propagate: "pruned" calibrates a block on outputs of the pruned blocks before it, "dense" on dense ones;
            "sequential" prunes within a block in order too: after query, key and value the batches run again
            for the output projection, and so on (about twice the time of calibration).
        output_dir: folder to save the model in, with tokenizer, ``recipe.yaml`` and ``prune_report.json``.
            While it is made, progress is kept in a folder beside it, "<output_dir>.pruning-progress".
        resume: go on with that progress after a crash, at the block that was in work. The weights become those
            of an uninterrupted run bit by bit; another model, recipe or calibration is refused.
        save_format: "pysparse" (packed), "dense" or "compressed-tensors".
        values: "int8" saves int8 values with a float32 scale a row; an n:m pattern then has compact indices where
            they pay. SparseGPT rounds each weight in its sweep, where the columns right of it make that good;
            other methods' pruned weights are quantised as they are. None saves the model's own dtype.
        group_size: inputs that share a scale of int8 values (a multiple of 4, e.g. 128) instead of a whole row.
        device: where blocks are calibrated and pruned, moved there one by one; None: where the model is.
        activations: "memory", or "disk": hidden states wait in files, in ``activations_dir`` (None: with the
            progress, or the system's temporary folder), which are removed at the end.
        seed: of the calibration windows.
        threads: torch threads while pruning; None leaves them alone.
        progress: show blocks done and time left on stderr.
        callbacks: called with a :class:`pysparse.pruning.BlockEvent` after each block.

    Under torchrun (or inside a torch.distributed group) the calibration batches are split over the processes;
    all get the same weights as a single one would, and only the first writes and shows progress.

    Returns the model and a report with the exact count of every layer. Everything is checked before a weight
    is touched. Raises ValueError for a wrong sparsity, an unknown name, contradicting arguments, a model
    without linear layers, missing or empty calibration data, activations that are not finite; FileExistsError,
    NotADirectoryError or PermissionError for an ``output_dir`` that cannot be written; MemoryError that names
    what can be lowered.
    """
    cut = Windows(
        one_of("num_samples", num_samples, "num_calibration_samples", num_calibration_samples),
        one_of("max_length", max_length, "max_seq_length", max_seq_length), batch_size, seed,
    )  # fmt: skip
    running = Running(output_dir, resume, device, activations, activations_dir)
    chosen = quantized_jointly(
        choose(recipe, method, pattern, allocation, sparsity, compat), values, group_size
    )
    saving = Saving.checked(
        output_dir, save_format, packing_for(values, group_size, chosen, save_format), chosen
    )
    if isinstance(chosen, StagedRecipe):
        refuse_in_stages(filter_fn=filter_fn, whole=whole, strict=strict, search_texts=search_texts)
        order = Order(
            model_or_path, chosen, calibration, tokenizer, cut, running, targets, ignore, propagate, save_format,
            saving.packing, seed, threads, progress, callbacks or (),
        )  # fmt: skip
        return PruneResult(*prune_in_stages(order))
    model = load_model(model_or_path, format="dense")
    saving.check_model(model)
    layout = find_layout(model, chosen, targets, ignore, filter_fn, strict, whole)
    found = tokenizer_or_none(model_or_path, model, tokenizer)
    task = _task(layout, chosen, sparsity, calibration, search_texts, found, cut, propagate)
    with (
        joined() as ranks,
        torch_threads(threads),
        progress_on_stderr(progress and ranks.first) as advance,
        executing(running, ranks, task.identity) as execution,
        explaining_memory(cut),
    ):
        settled, report = task.perform(execution, advance, callbacks or ())
        if calibration is not None and task.calibration is None:
            report = report.with_warnings(["calibration was given, but this method needs none: not used"])
        if ranks.first:
            saving.save(model, found, settled, report)
        if execution.journal is not None:
            ranks.barrier()
            execution.journal.remove()
    return PruneResult(model, report)


def _task(
    layout: BlockLayout, recipe: Recipe, sparsity: float | None, calibration: Any, search_texts: Texts | None,
    tokenizer: Any, cut: Windows, propagate: Propagate,
) -> Task:  # fmt: skip
    """Bring calibration data, and the text of a search, into the shape that they are used in."""
    material, windows, data_in = calibration, None, None
    if is_searched(recipe):
        material, texts = part_texts(calibration, search_texts)
        windows = search_windows(layout.model, tokenizer, texts, cut.seed)
    if recipe.needs_calibration:
        data_in = calibration_for(material, layout.model, tokenizer, cut, bundled=calibration is None)
    return Task(layout, recipe, sparsity, data_in, windows, propagate, cut.seed)
