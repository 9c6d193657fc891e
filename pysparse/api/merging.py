"""Adapters that users bring, merged into a pruned model without losing what pruning gained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pysparse.calib import load_calibration
from pysparse.huggingface.adapters import require_peft
from pysparse.methods import recipe_for
from pysparse.models.discover import discover
from pysparse.nn import sparsify_
from pysparse.pruning import BlockLayout, run

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
        """Return the new weight in the dtype of the old; ValueError when that dtype cannot hold it."""
        total = (self.weight.float() + self.delta).to(self.weight.dtype)
        if not bool(torch.isfinite(total).all()):
            limit = torch.finfo(total.dtype)
            raise ValueError(
                f"{self.path}: weight plus adapter is not finite in {str(total.dtype).removeprefix('torch.')}, which "
                f"ends at {limit.max:g}: use a wider dtype or a smaller adapter"
            )
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
            and prunes each layer to the sparsity it had (a dense one not at all). "keep" leaves the adapter beside
            the sparse layer: the function is exactly peft's, and two thin products a layer are added to its time.
        method: that "reprune" prunes with, a name of ``pysparse.methods.METHODS``.
        pattern: of "reprune", "n:m" to meet a pattern again; None: unstructured.
        calibration: batches for a ``method`` that needs them, see :func:`pysparse.calib.load_calibration`.
        sparsify: pack layers by :func:`pysparse.sparsify_` afterwards; False leaves zeros in ordinary ones.

    Returns the base model with merged weights (with "keep" the peft model). It is changed in place; after an
    error it is as before. What peft trained whole, ``modules_to_save`` and ``trainable_token_indices``, stays.
    With "keep" nothing is merged, so every kind of LoRA will do; but :func:`pysparse.save_pretrained` takes no
    peft model: save the pruned base before it is wrapped and the adapter by ``peft_model.save_pretrained``; to
    load, read the base with ``format="dense"``, wrap it by ``PeftModel.from_pretrained`` and "keep" again.

    Raises TypeError for another model, ValueError for an unknown mode, a model without active LoRA layers or
    with merged ones, what is more than a sum of weight and B A (DoRA and other variants, ``lora_bias``, LoRA of
    an embedding), a weight that another layer shares, an adapter that does not fit, is not finite or leaves the
    range of the weight's dtype, or a base without a single zero when zeros are to be met again.
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}")
    adapted = _adapted(peft_model)
    if mode == "keep":
        bases = {id(layer.get_base_layer()) for layer in adapted.values()}
        if sparsify:
            sparsify_(peft_model, lambda module, path: id(module) in bases or "lora_" not in path)
        return peft_model  # type: ignore[no-any-return]
    _check_trained_tokens(peft_model)
    _check_untied(peft_model, adapted)
    merges = [_merge_of(path, layer) for path, layer in adapted.items()]
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
    return _unwrapped(peft_model)


@torch.no_grad()
def _reprune(
    peft_model: Any, merges: list[_Merge], method: str, pattern: str | None, calibration: Any
) -> nn.Module:
    sparse = [one for one in merges if one.sparsity]  # a dense one, such as the head, stays dense
    rates = {one.path: one.sparsity for one in sparse}
    sizes = [one.weight.numel() for one in sparse]
    mean = sum(rate * size for rate, size in zip(rates.values(), sizes, strict=True)) / sum(sizes)
    recipe = recipe_for(method, pattern, rates if pattern is None else None)
    if recipe.needs_calibration and calibration is None:
        raise ValueError(f"reprune with method='{method}' needs calibration batches: pass calibration=...")
    batches = None if calibration is None else load_calibration(calibration)
    before = [one.weight.clone() for one in merges]
    after = [one.merged(mask=False) for one in merges]
    model: nn.Module = peft_model.get_base_model()
    try:
        for one, weight in zip(merges, after, strict=True):
            one.weight.copy_(weight)
            model.set_submodule(one.path, one.base)
        layout = discover(model, targets=tuple(rates), ignore=())
        _check_prunable(layout, rates)
        run(layout, recipe, mean if pattern is None else None, batches)
    except BaseException:
        for one, weight in zip(merges, before, strict=True):
            one.weight.copy_(weight)
            model.set_submodule(one.path, one.layer)
        raise
    return _unwrapped(peft_model)


def _check_prunable(layout: BlockLayout, rates: Mapping[str, float]) -> None:
    left = sorted(set(rates) - {layer.path for layer in layout.layers})
    if left:
        raise ValueError(
            f'mode="reprune" prunes layers of blocks, and {", ".join(left)}, {rates[left[0]]:.1%} zeros, is none: '
            'use mode="mask", or train no adapter there'
        )


def _unwrapped(peft_model: Any) -> nn.Module:
    """Return the base model without peft's wrappers, with the modules and tokens that were trained whole."""
    for layer in _token_layers(peft_model):
        layer.merge()  # unload() alone would drop these rows
    model: nn.Module = peft_model.unload()
    return model


def _token_layers(peft_model: Any) -> list[Any]:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return [module for module in peft_model.modules() if isinstance(module, TrainableTokensLayer)]


def _check_trained_tokens(peft_model: Any) -> None:
    for layer in _token_layers(peft_model):
        for name in layer.active_adapters:
            rows = layer.trainable_tokens_delta.get(name, None)
            if rows is not None and not bool(torch.isfinite(rows).all()):
                raise ValueError(f"the trained token embeddings of adapter '{name}' are not finite")


def _check_untied(peft_model: Any, adapted: Mapping[str, Any]) -> None:
    """Refuse an adapter of one of two layers that share a weight: merged, it would act in both."""
    bases = {id(layer.get_base_layer()._parameters.get("weight")): path for path, layer in adapted.items()}
    owners: dict[int, list[str]] = {}
    for path, module in peft_model.get_base_model().named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in bases:
            owners.setdefault(id(weight), []).append(path.removesuffix(".base_layer"))
    for weight_id, paths in owners.items():
        if len(paths) > 1:
            raise ValueError(
                f"{bases[weight_id]}: its weight is that of {' and '.join(paths)}, so that a merged adapter would act "
                'in each: use mode="keep", or untie them'
            )


def _adapted(peft_model: Any) -> dict[str, Any]:
    """Return every layer with an active LoRA adapter by its path in the base model; changes nothing."""
    peft = require_peft()
    from peft.tuners.lora import LoraLayer

    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(f"merge_and_sparsify takes a peft.PeftModel, got {type(peft_model).__name__}")
    found = {}
    for path, module in peft_model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or not _active(module):
            continue
        if module.merged:
            raise ValueError(f"{path}: an adapter is merged already; call peft's unmerge_adapter() first")
        found[path] = module
    if not found:
        raise ValueError("this model has no layers with an active LoRA adapter: there is nothing to merge")
    return found


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]


def _merge_of(path: str, layer: Any) -> _Merge:
    """Return what is to be added to ``layer``'s weight; ValueError for what no sum of two weights can be."""
    base, names = layer.get_base_layer(), _active(layer)
    for name in names:
        _check_plain(path, layer, name)
    weight = base._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        raise ValueError(
            f"{path} is a {type(base).__name__} without a plain weight: densify or dequantise it first"
        )
    delta = sum(layer.get_delta_weight(name).detach().float() for name in names)
    if delta.shape != weight.shape:
        raise ValueError(
            f"{path}: the adapter is for a weight {tuple(delta.shape)}, this one is {tuple(weight.shape)}"
        )
    if not bool(torch.isfinite(delta).all()):
        raise ValueError(f"{path}: the adapter is not finite")
    return _Merge(path, layer, base, weight.detach(), delta)


def _check_plain(path: str, layer: Any, name: str) -> None:
    """Refuse an adapter of which B A is but a part: merging that alone would lose the rest."""
    variant = layer.lora_variant.get(name)
    if variant is not None:
        what = f"{type(variant).__name__.removesuffix('Variant')}, which is more than W + B A"
    elif layer.lora_bias.get(name, False):
        what = "LoRA with lora_bias=True, whose bias no weight can hold"
    elif name in layer.lora_embedding_A:
        what = "LoRA of an embedding, which is no linear layer"
    else:
        return
    raise ValueError(
        f"{path}: adapter '{name}' is {what}: use mode=\"keep\", or train the adapter without it"
    )
