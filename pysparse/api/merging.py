"""Adapters that users bring, merged into a pruned model without losing what pruning gained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pysparse.calib import load_calibration
from pysparse.huggingface.adapters import require_peft
from pysparse.methods import recipe_for
from pysparse.models.discover import discover
from pysparse.nn import sparsify_
from pysparse.pruning import run

Mode = Literal["mask", "reprune", "keep"]
MODES = ("mask", "reprune", "keep")


@dataclass(frozen=True, slots=True, eq=False)
class _Merge:
    """One adapted layer of a peft model, and what its weight becomes."""

    path: str  # in the base model
    layer: nn.Module  # peft's
    base: nn.Module  # the linear layer in it
    weight: Tensor  # as stored, GPT-2's transposed
    delta: Tensor  # of the same shape, float32

    @property
    def sparsity(self) -> float:
        return 1.0 - int(self.weight.count_nonzero()) / max(1, self.weight.numel())

    def merged(self, mask: bool) -> Tensor:
        total = (self.weight.float() + self.delta).to(self.weight.dtype)
        if not mask:
            return total
        keep = self.weight != 0
        total = total.masked_fill(~keep, 0.0)
        return total.masked_fill(keep & (total == 0), torch.finfo(total.dtype).tiny)  # stays a survivor


def merge_and_sparsify(
    peft_model: Any,
    mode: Mode = "mask",
    *,
    method: str = "magnitude",
    pattern: str | None = None,
    calibration: Any = None,
    sparsify: bool = True,
) -> nn.Module:
    """Merge the active LoRA adapters of a peft model whose base was pruned, and pack the sparse layers.

    Args:
        peft_model: a ``peft.PeftModel`` with LoRA layers over linear layers that hold zeros.
        mode: "mask" adds the adapter where a weight survives and leaves every zero: the sparsity is that of
            before to the last weight, the function that of LoSA's masked adapter. "reprune" adds all of it
            and prunes each layer to the sparsity it had. "keep" leaves the adapter beside the sparse layer:
            the function is exactly peft's, and two thin products a layer are added to its time.
        method: that "reprune" prunes with, a name of ``pysparse.methods.METHODS``.
        pattern: of "reprune", "n:m" to meet a pattern again; None: unstructured.
        calibration: batches for a ``method`` that needs them, see :func:`pysparse.calib.load_calibration`.
        sparsify: pack layers by :func:`pysparse.sparsify_` afterwards; False leaves zeros in ordinary ones.

    Returns the base model with merged weights (with "keep" the peft model). It is changed in place; after an
    error it is as before. Raises TypeError for another model, ValueError for an unknown mode, a model without
    active LoRA layers or with merged ones, an adapter that does not fit or is not finite, or a base without a
    single zero when zeros are to be met again.
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}")
    merges = _merges(peft_model)
    if mode == "keep":
        bases = {id(one.base) for one in merges}
        if sparsify:
            sparsify_(peft_model, lambda module, path: id(module) in bases or "lora_" not in path)
        return peft_model  # type: ignore[no-any-return]
    if not any(one.sparsity for one in merges):
        raise ValueError(
            f'mode="{mode}" needs a pruned model, and none of its {len(merges)} adapted layers has a zero weight: '
            "prune it first, or merge with peft's merge_and_unload()"
        )
    model = (
        _reprune(peft_model, merges, method, pattern, calibration)
        if mode == "reprune"
        else _cut(peft_model, merges)
    )
    if sparsify:
        sparsify_(model)
    return model


@torch.no_grad()
def _cut(peft_model: Any, merges: list[_Merge]) -> nn.Module:
    weights = [one.merged(mask=True) for one in merges]
    for one, weight in zip(merges, weights, strict=True):
        one.weight.copy_(weight)
    model: nn.Module = peft_model.unload()
    return model


@torch.no_grad()
def _reprune(
    peft_model: Any, merges: list[_Merge], method: str, pattern: str | None, calibration: Any
) -> nn.Module:
    sizes = [one.weight.numel() for one in merges]
    rates = {one.path: one.sparsity for one in merges}
    mean = sum(rate * size for rate, size in zip(rates.values(), sizes, strict=True)) / sum(sizes)
    recipe = recipe_for(method, pattern, rates if pattern is None else None)
    if recipe.needs_calibration and calibration is None:
        raise ValueError(f"reprune with method='{method}' needs calibration batches: pass calibration=...")
    batches = None if calibration is None else load_calibration(calibration)
    before = [one.weight.clone() for one in merges]
    model: nn.Module = peft_model.get_base_model()
    try:
        for one in merges:
            one.weight.copy_(one.merged(mask=False))
            model.set_submodule(one.path, one.base)
        run(discover(model, targets=tuple(rates)), recipe, mean if pattern is None else None, batches)
    except BaseException:
        for one, weight in zip(merges, before, strict=True):
            one.weight.copy_(weight)
            model.set_submodule(one.path, one.layer)
        raise
    return model


def _merges(peft_model: Any) -> list[_Merge]:
    """Return every adapted layer with what is to be added to it; changes nothing."""
    peft = require_peft()
    from peft.tuners.lora import LoraLayer

    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(f"merge_and_sparsify takes a peft.PeftModel, got {type(peft_model).__name__}")
    found = []
    for path, module in peft_model.get_base_model().named_modules():
        active = [] if not isinstance(module, LoraLayer) else [
            name for name in module.active_adapters if name in module.lora_A
        ]  # fmt: skip
        if not active:
            continue
        if module.merged:
            raise ValueError(f"{path}: an adapter is merged already; call peft's unmerge_adapter() first")
        base = module.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            raise ValueError(
                f"{path} is a {type(base).__name__} without a plain weight: densify or dequantise it first"
            )
        delta = sum(module.get_delta_weight(name).detach().float() for name in active)
        if delta.shape != weight.shape:
            raise ValueError(
                f"{path}: the adapter is for a weight {tuple(delta.shape)}, this one is {tuple(weight.shape)}"
            )
        if not bool(torch.isfinite(delta).all()):
            raise ValueError(f"{path}: the adapter is not finite")
        found.append(_Merge(path, module, base, weight.detach(), delta))
    if not found:
        raise ValueError("this model has no layers with an active LoRA adapter: there is nothing to merge")
    return found
