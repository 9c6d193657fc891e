"""What is worth saying about the layers that were found, and about those that were not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from pysparse.nn.match import matches
from pysparse.pruning import PrunableLayer

DEFAULT_IGNORE = ("lm_head",)


def unused_patterns(model: nn.Module, ignore: Sequence[str]) -> list[str]:
    """Say which names in ``ignore`` are none of this model's."""
    modules = dict(model.named_modules())
    unused = [
        pattern
        for pattern in ignore
        if pattern not in DEFAULT_IGNORE and not any(matches(m, p, [pattern]) for p, m in modules.items())
    ]
    return [f"ignore={unused} names no module of this model"] if unused else []


def dense_anyway(layers: Sequence[PrunableLayer]) -> list[str]:
    """Say which layers get zeros that no packed format holds."""
    texts = []
    for what, found in (
        ("matrices of fused experts", [layer for layer in layers if layer.expert is not None]),
        ("convolutions", [layer for layer in layers if isinstance(layer.module, nn.Conv2d)]),
    ):
        if found:
            share = sum(layer.size for layer in found) / sum(layer.size for layer in layers)
            texts.append(
                f"{len(found)} {what} ({found[0].path}, ...) hold {share:.0%} of the weights to prune: they get "
                "their zeros, but no packed layer or file holds them, so they take as much memory and time as before"
            )
    return texts


def other_experts(skipped: dict[str, str], model: nn.Module) -> list[str]:
    """Say how much of the model sits in three-dimensional weights of modules that nobody knows how to calibrate."""
    modules = dict(model.named_modules())
    found = {
        f"{path}.{name}": parameter.numel()
        for path, reason in skipped.items()
        if reason.endswith("is no kind of layer that is pruned") and "Conv" not in reason
        for name, parameter in modules[path].named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }
    if not found:
        return []
    total = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{len(found)} fused weights ({next(iter(found))}, ...) hold {sum(found.values()) / total:.0%} of the "
        "model's parameters and are not pruned: their module has not the interface of transformers' experts"
    ]


def most_common(skipped: dict[str, str], prunable: dict[str, nn.Module]) -> str:
    """Return the reasons why prunable modules were skipped, with their counts."""
    reasons = Counter(reason for path, reason in skipped.items() if path in prunable)
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
