"""Find the blocks of a model and the weight matrices in them, from the module tree alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from pysparse.nn import CompactLinear, SparseLinear
from pysparse.nn.match import class_names, matches
from pysparse.pruning import BlockLayout, PrunableLayer

# Routers choose experts: a handful of weights on which everything hangs. "gate_proj" is not one.
_ROUTER = re.compile(r"(^|\.)(router|gate|gating|shared_expert_gate)(\.|$)")
_DEFAULT_IGNORE = ("lm_head",)


def discover(
    model: nn.Module, targets: Sequence[str] = ("Linear",), ignore: Sequence[str] = _DEFAULT_IGNORE
) -> BlockLayout:
    """Return the blocks of ``model`` and what is prunable in them; no model is known by name.

    The blocks are the elements of the outermost list of like modules that holds the most linear weights (in a
    language model the longest one: the transformer blocks). A model without such a list is one block. In the
    blocks every ``nn.Linear`` and GPT-2 ``Conv1D`` that ``targets`` name and ``ignore`` does not is prunable;
    both hold class names, module paths (or their last parts), globs and "re:" expressions over paths. Linear layers
    outside of the blocks (heads, embeddings' projections), expert routers, and weights that are shared with
    another module stay dense, with the cause in ``skipped``.

    Raises ValueError for a model without linear layers, an already packed one, and targets that name nothing.
    """
    linears = {path: module for path, module in model.named_modules() if _is_linear(module)}
    _require_linears(model, linears)
    blocks = _find_blocks(model, linears)
    search = _Search(targets, ignore, _other_owners(model, linears))
    for path, module in linears.items():
        index = next(
            (i for i, (name, _) in enumerate(blocks) if not name or path.startswith(name + ".")), None
        )
        search.visit(path, module, index)
    if not search.layers:
        classes = ", ".join(sorted({type(module).__name__ for module in linears.values()}))
        raise ValueError(
            f"no layer to prune: targets={list(targets)} without ignore={list(ignore)} leaves none of the "
            f"{len(linears)} linear layers (classes {classes}; first {next(iter(linears))}): "
            f"{_most_common(search.skipped)}"
        )
    layers = tuple(sorted(search.layers, key=lambda layer: layer.block))
    warnings = (*_unused_patterns(model, ignore), *_fused_experts(model, blocks))
    return BlockLayout(model, blocks, layers, search.skipped, warnings)


@dataclass(slots=True)
class _Search:
    """Sorts linear layers into prunable and skipped."""

    targets: Sequence[str]
    ignore: Sequence[str]
    owners: dict[int, str]  # id of a parameter -> path of a module that is no linear layer and uses it too
    layers: list[PrunableLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def visit(self, path: str, module: nn.Module, block: int | None) -> None:
        reason = self._reason(path, module, block)
        if reason is not None:
            self.skipped[path] = reason
        elif block is not None:
            self.layers.append(PrunableLayer(path, module, block, transposed=_is_conv1d(module)))
            self.owners[id(module.weight)] = path

    def _reason(self, path: str, module: nn.Module, block: int | None) -> str | None:
        """Return why a linear layer is not prunable, or None."""
        weight = module._parameters.get("weight")
        if not matches(module, path, self.targets):
            return "not in targets"
        if matches(module, path, self.ignore):
            return "in ignore"
        if block is None:
            return "outside of the blocks"
        if _ROUTER.search(path):
            return "router of experts"
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            return (
                "its weight is no matrix of floating-point parameters (quantized, or computed from others?)"
            )
        if id(weight) in self.owners:
            return f"shares its weight with {self.owners[id(weight)]}"
        return None


def _is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's transposed linear layer, without an import of the class from wherever it lives today."""
    return type(module).__name__ == "Conv1D" and "weight" in module._parameters


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _require_linears(model: nn.Module, linears: dict[str, nn.Module]) -> None:
    packed = next(
        (path for path, module in model.named_modules() if isinstance(module, SparseLinear | CompactLinear)),
        None,
    )
    if packed is not None:
        raise ValueError(f"{packed} is packed already: call pysparse.densify_(model) before pruning it again")
    if not linears:
        raise ValueError(f"{type(model).__name__} has no Linear layers: there is nothing to prune")


def _find_blocks(model: nn.Module, linears: dict[str, nn.Module]) -> tuple[tuple[str, nn.Module], ...]:
    best: tuple[int, tuple[tuple[str, nn.Module], ...]] = (0, (("", model),))
    chosen: list[str] = []
    for path, module in model.named_modules():  # parents come before children
        inside = any(path.startswith(outer + ".") for outer in chosen)
        if not isinstance(module, nn.ModuleList | nn.Sequential) or inside or not _alike(module):
            continue
        weights = sum(_size(m) for p, m in linears.items() if not path or p.startswith(path + "."))
        if weights == 0:
            continue
        chosen.append(path)
        prefix = path + "." if path else ""
        if weights > best[0]:
            best = (weights, tuple((f"{prefix}{name}", block) for name, block in module.named_children()))
    return best[1]


def _alike(stack: nn.ModuleList | nn.Sequential) -> bool:
    """Tell whether a list is a stack of blocks: several modules with linear layers inside, of few kinds."""
    blocks = list(stack)
    if len(blocks) < 2 or any(
        _is_linear(block) or not any(map(_is_linear, block.modules())) for block in blocks
    ):
        return False
    return min(Counter(type(block) for block in blocks).values()) >= 2 or len({type(b) for b in blocks}) == 1


def _other_owners(model: nn.Module, linears: dict[str, nn.Module]) -> dict[int, str]:
    """Return the parameters of all modules that are no linear layer, such as embeddings, by id."""
    return {
        id(parameter): f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if path not in linears
        for name, parameter in module.named_parameters(recurse=False)
    }


def _unused_patterns(model: nn.Module, ignore: Sequence[str]) -> list[str]:
    modules = dict(model.named_modules())
    unused = [
        pattern
        for pattern in ignore
        if pattern not in _DEFAULT_IGNORE and not any(matches(m, p, [pattern]) for p, m in modules.items())
    ]
    return [f"ignore={unused} names no module of this model"] if unused else []


def _fused_experts(model: nn.Module, blocks: tuple[tuple[str, nn.Module], ...]) -> list[str]:
    """Say how much of the model sits in three-dimensional expert weights, which no linear layer holds."""
    fused = {
        f"{path}.{owner}.{name}": parameter.numel()
        for path, block in blocks
        for owner, module in block.named_modules()
        if not any("Conv" in cls for cls in class_names(module))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }
    if not fused:
        return []
    total = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{len(fused)} fused expert weights ({next(iter(fused))}, ...) hold {sum(fused.values()) / total:.0%} of "
        "the model's parameters and are not pruned"
    ]


def _most_common(skipped: dict[str, str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(skipped.values()).most_common())
