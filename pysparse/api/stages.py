"""Recipes with stages, and methods that cut a model's structure: run, saved and planned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pysparse import huggingface, methods
from pysparse.api.execution import Running, Task, executing
from pysparse.api.loading import Windows, calibration_for, explaining_memory, load_model, tokenizer_or_none
from pysparse.api.search import is_searched
from pysparse.calib.ranks import joined
from pysparse.huggingface.quantizer import attach_quantizer
from pysparse.measure.progress import Advance, progress_on_stderr
from pysparse.measure.rounds import torch_threads
from pysparse.models.anatomy import anatomy_of
from pysparse.models.configs import state_depth, state_in_config
from pysparse.models.discover import discover
from pysparse.nn import Packing
from pysparse.nn.structure import NoAttention, Surgery
from pysparse.pruning import (
    BlockEvent,
    Cut,
    Execution,
    Recipe,
    Stage,
    StagedPlan,
    StagedRecipe,
    StagedReport,
    StructuralMethod,
    StructuralReport,
    plan,
    plan_structure,
    prune_structure,
    resolve_sparsity,
)
from pysparse.pruning.identity import method_identity
from pysparse.pruning.run import Propagate
from pysparse.pruning.structural_plan import removed_note


@dataclass(frozen=True, slots=True)
class Order:
    """What a caller of :func:`pysparse.prune` asked for, checked."""

    model_or_path: nn.Module | str | Path
    recipe: StagedRecipe
    calibration: Any
    tokenizer: Any
    windows: Windows
    running: Running
    targets: Sequence[str]
    ignore: Sequence[str]
    propagate: Propagate
    save_format: str
    packing: Packing
    seed: int
    threads: int | None
    progress: bool
    callbacks: Sequence[Callable[[BlockEvent], None]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a stage runs with."""

    order: Order
    tokenizer: Any
    execution: Execution
    advance: Advance


@dataclass(frozen=True, slots=True)
class Runner:
    """How a kind of adaptation is done as a stage."""

    run: Callable[[nn.Module, Stage, Setting], Any]  # changes the model in place, returns its report
    check: Callable[
        [Stage], None
    ]  # raises for what cannot work, before an earlier stage has changed the model


RUNNERS: dict[type, Runner] = {}  # by the class of the adaptation


def prune_in_stages(order: Order) -> tuple[nn.Module, Any]:
    """Run the stages of ``order`` and return the model and a report; a :class:`StagedReport` for several.

    Raises as :func:`pysparse.prune` does; ValueError for ``resume`` with several stages.
    """
    stages = order.recipe.stages
    for stage in stages:
        _check(stage)
    single = len(stages) == 1 and isinstance(stages[0].method, StructuralMethod)
    if order.running.resume and not single:
        raise ValueError(
            "resume=True goes on with one method; a recipe with several stages starts over: run the stages one by "
            "one, each with an output_dir of its own"
        )
    model = load_model(order.model_or_path, format="dense")
    found = tokenizer_or_none(order.model_or_path, model, order.tokenizer)
    running = order.running if single else dataclasses.replace(order.running, output_dir=None)
    settled: list[Stage] = []
    reports: list[Any] = []
    with (
        joined() as ranks,
        torch_threads(order.threads),
        progress_on_stderr(order.progress and ranks.first) as advance,
        executing(running, ranks, lambda device: _identity(order, model, found, device)) as execution,
        explaining_memory(order.windows),
    ):
        setting = Setting(order, found, execution, advance)
        for stage in stages:
            done, report = _run(model, stage, setting)
            settled.append(done)
            reports.append(report)
        attach_quantizer(model)
        report = reports[0] if len(reports) == 1 else StagedReport(tuple(reports))
        if order.running.output_dir is not None and ranks.first:
            _save(model, order, found, StagedRecipe(tuple(settled)), report)
        if execution.journal is not None:
            ranks.barrier()
            execution.journal.remove()
    return model, report


def _check(stage: Stage) -> None:
    """Raise now for what can be known to be wrong with a stage before an earlier one has changed the model."""
    method = stage.method
    if isinstance(method, Recipe):
        resolve_sparsity(method.structure, stage.sparsity)
        if is_searched(method):
            raise ValueError(
                "allocation 'atp' searches its setting and is no part of a recipe with stages: give beta"
            )
    elif not isinstance(method, StructuralMethod) and type(method) not in RUNNERS:
        known = ", ".join(kind.__name__ for kind in RUNNERS) or "none"
        raise TypeError(f"{type(method).__name__} is no method that a stage can run (adaptations: {known})")
    elif not isinstance(method, StructuralMethod):
        RUNNERS[type(method)].check(stage)


def _run(model: nn.Module, stage: Stage, setting: Setting) -> tuple[Stage, Any]:
    """Run one stage and return it with its sparsity settled, and its report."""
    if isinstance(stage.method, StructuralMethod):
        structural = _run_structural(model, stage, setting)
        return dataclasses.replace(stage, sparsity=structural.target), structural
    if isinstance(stage.method, Recipe):
        order = setting.order
        layout = discover(model, order.targets, order.ignore)
        data = _calibration(model, setting, order.windows) if stage.method.needs_calibration else None
        task = Task(layout, stage.method, stage.sparsity, data, None, order.propagate, order.seed)
        settled, report = task.perform(setting.execution, setting.advance, order.callbacks)
        return Stage(settled, report.target), report
    return stage, RUNNERS[type(stage.method)].run(model, stage, setting)


def _calibration(model: nn.Module, setting: Setting, windows: Windows) -> Any:
    order = setting.order
    return calibration_for(order.calibration, model, setting.tokenizer, windows)


def _structural_windows(order: Order, method: StructuralMethod) -> Windows:
    samples = order.windows.num_samples
    return dataclasses.replace(
        order.windows, num_samples=method.default_samples if samples is None else samples
    )


def _run_structural(model: nn.Module, stage: Stage, setting: Setting) -> StructuralReport:
    anatomy, method = anatomy_of(model), stage.method
    method.plan(anatomy, stage.sparsity)  # a rate that cannot be met is said before the calibration is read
    data = _calibration(model, setting, _structural_windows(setting.order, method))

    def finish(cut: Cut, surgery: Surgery) -> None:
        if cut.blocks:
            gone = set(cut.blocks)
            state_depth(model, [index for index in range(len(anatomy.blocks)) if index not in gone], surgery)
        state_in_config(model, set(cut.widths), width, surgery)

    width = anatomy.sizes.width
    return prune_structure(
        anatomy, method, stage.sparsity, data,
        seed=setting.order.seed, execution=setting.execution, advance=setting.advance, finish=finish,
    )  # fmt: skip


def _identity(order: Order, model: nn.Module, tokenizer: Any, device: Any) -> dict[str, Any]:
    """Return all that the result of a single structural stage depends on; reads every weight."""
    stage = order.recipe.stages[0]
    windows = _structural_windows(order, stage.method)
    data = calibration_for(order.calibration, model, tokenizer, windows)
    return method_identity(model, stage.method, stage.sparsity, data, device=str(device))


def _save(model: nn.Module, order: Order, tokenizer: Any, recipe: StagedRecipe, report: Any) -> None:
    files = {"recipe.yaml": methods.recipe_to_yaml(recipe), "prune_report.json": report.to_json() + "\n"}
    assert order.running.output_dir is not None  # the caller has asked
    huggingface.save_pretrained(
        model, order.running.output_dir, format=order.save_format, tokenizer=tokenizer, extra_files=files,
        packing=order.packing,
    )  # fmt: skip


def plan_in_stages(
    model: nn.Module, recipe: StagedRecipe, targets: Sequence[str], ignore: Sequence[str]
) -> Any:
    """Return what the stages would do to ``model``, of which shapes alone are read; nothing is touched.

    A later stage is planned on the shapes that the earlier ones leave. Raises ValueError as the stages would.
    """
    twin, plans = model, list[Any]()
    for number, stage in enumerate(recipe.stages):
        _check(stage)
        if isinstance(stage.method, StructuralMethod):
            anatomy = anatomy_of(twin)
            plans.append(plan_structure(anatomy, stage.method, stage.sparsity))
            if number + 1 < len(recipe.stages):
                twin = _on_meta(model)
                _cut_on_meta(twin, stage)
        elif isinstance(stage.method, Recipe):
            plans.append(plan(discover(twin, targets, ignore), stage.method, stage.sparsity))
    if len(plans) == 1:
        return plans[0]
    adaptations = [type(one.method).__name__ for one in recipe.stages if type(one.method) in RUNNERS]
    notes = tuple(f"{name} adapts what is left, no weight goes or comes" for name in adaptations)
    return StagedPlan(tuple(plans), (*removed_note(plans), *notes))


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` without data."""
    if all(parameter.is_meta for parameter in model.parameters()):
        return copy.deepcopy(model)
    tensors = {
        id(one): torch.empty_like(one, device="meta") for one in (*model.parameters(), *model.buffers())
    }
    for one in model.parameters():
        tensors[id(one)] = nn.Parameter(tensors[id(one)], requires_grad=one.requires_grad)
    return copy.deepcopy(model, tensors)  # deepcopy takes the stand-ins for copies it has made already


def _cut_on_meta(model: nn.Module, stage: Stage) -> None:
    anatomy, surgery = anatomy_of(model), Surgery(model)
    cut = stage.method.plan(anatomy, stage.sparsity)[1]
    for block, width in zip(anatomy.blocks, cut.widths, strict=True):
        block.ffn.cut(surgery, torch.arange(width, device="meta"))
    for index in cut.attentions:
        surgery.replace(anatomy.blocks[index].attention[0], NoAttention())
    if cut.blocks:
        stack = anatomy.blocks[0].path.rpartition(".")[0]
        kept = [one.module for index, one in enumerate(anatomy.blocks) if index not in cut.blocks]
        surgery.replace(stack, nn.ModuleList(kept))
