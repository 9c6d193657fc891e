"""The call that says what pruning would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pysparse.api.choosing import choose, find_layout, refuse_in_stages
from pysparse.api.loading import Windows, calibration_for, load_model, tokenizer_or_none
from pysparse.api.stages import plan_in_stages
from pysparse.calib.load import DEFAULT_SAMPLES
from pysparse.measure.windows import choose_window
from pysparse.methods import AllocationLike
from pysparse.models.discover import Filter
from pysparse.models.skeleton import skeleton
from pysparse.pruning import (
    PrunePlan,
    Recipe,
    StagedPlan,
    StagedRecipe,
    StructuralMethod,
    StructuralPlan,
    gather_evidence,
    plan,
)


def plan_prune(
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
    recipe: Recipe | StagedRecipe | StructuralMethod | str | Path | None = None,
    filter_fn: Filter | None = None,
    strict: bool = False,
    compat: str | None = None,
    seed: int = 0,
) -> PrunePlan | StructuralPlan | StagedPlan:
    """Return what :func:`prune` would do with these arguments: layers, budgets, exact counts, predicted bytes, time.

    Touches nothing; of a folder only ``config.json`` is read. An allocation that looks at activations is
    computed when ``calibration`` is given (the model is then loaded and run), one that looks at weights when
    the model is an object or loaded for that reason; otherwise the plan has the totals and says that the
    layers' shares are not known yet. A structural method is planned by shapes alone; which modules go is known
    after the search. Raises as :func:`prune` does.
    """
    chosen = choose(recipe, method, pattern, allocation, sparsity, compat)
    if isinstance(chosen, StagedRecipe):
        refuse_in_stages(filter_fn=filter_fn, strict=strict)
        shapes = model_or_path if isinstance(model_or_path, nn.Module) else skeleton(model_or_path)
        return plan_in_stages(shapes, chosen, targets, ignore)  # type: ignore[no-any-return]
    cut = Windows(num_samples, max_length, batch_size, seed)
    computed = calibration is not None and bool(chosen.allocation.needs)
    if isinstance(model_or_path, nn.Module):
        model = model_or_path
    else:
        model = load_model(model_or_path, format="dense") if computed else skeleton(model_or_path)
    layout = find_layout(model, chosen, targets, ignore, filter_fn, strict)
    if not computed:
        return plan(layout, chosen, sparsity, tokens=_expected_tokens(model, cut))
    found = tokenizer_or_none(model_or_path, model, tokenizer)
    batches = calibration_for(calibration, model, found, cut)
    tokens = sum(batch.tokens for batch in batches.batches)
    return plan(layout, chosen, sparsity, gather_evidence(layout, chosen, batches), tokens)


def _expected_tokens(model: nn.Module, cut: Windows) -> int | None:
    """Return how many tokens of calibration are taken when there is enough text; None for other inputs."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    return (cut.num_samples or DEFAULT_SAMPLES) * (cut.max_length or choose_window(model, None))
