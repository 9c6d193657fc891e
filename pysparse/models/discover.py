"""Find the blocks of a model and the weight matrices in them, from the module tree alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from pysparse.calib.inputs import expert_input_name, is_fused_experts
from pysparse.nn import CompactLinear, SparseLinear
from pysparse.nn.match import matches
from pysparse.pruning import BlockLayout, PrunableLayer

# Routers choose experts: a handful of weights on which everything hangs. "gate_proj" is not one.
_ROUTER = re.compile(r"(^|\.)(router|gate|gating|shared_expert_gate)(\.|$)")
_DEFAULT_IGNORE = ("lm_head",)
Blocks = tuple[tuple[str, nn.Module], ...]
Filter = Callable[[nn.Module, str], bool]


def discover(
    model: nn.Module,
    targets: Sequence[str] | str = ("Linear",),
    ignore: Sequence[str] | str = _DEFAULT_IGNORE,
    *,
    whole: bool = False,
    filter_fn: Filter | None = None,
) -> BlockLayout:
    """Return the blocks of ``model`` and what is prunable in them; no model is known by name.

    The blocks are the elements of the outermost list of like modules that holds the most weights (in a
    language model the longest one: the transformer blocks); sibling lists of the same kind of block, such as
    the stages of a ResNet, count as one list. A model without such a list is one block. In the blocks every
    ``nn.Linear``, GPT-2 ``Conv1D``, ``nn.Conv2d`` and matrix of fused experts that ``targets`` name and
    ``ignore`` does not is prunable; both hold class names, module paths (or their last parts), globs and
    "re:" expressions over paths. "Linear" names Conv1D and fused experts too; convolutions are targeted by
    ``targets=("Linear", "Conv2d")``. Everything else that holds a matrix stays dense, with the cause in
    ``skipped``: layers outside of the blocks (heads, embeddings' projections), expert routers, weights that
    are shared with another module, and modules of other kinds. With ``whole`` the model is taken as one block, so
    that stem and classifier are prunable too, as is usual in vision; its statistics are held all at once then.
    ``filter_fn(module, path)`` is asked about each module that ``targets`` and ``ignore`` leave, and a False
    keeps it dense.

    Raises ValueError for a model without such layers, an already packed one, and targets that name nothing.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is called with a module and its path, got {filter_fn!r}")
    targets, ignore = ([names] if isinstance(names, str) else names for names in (targets, ignore))
    prunable = {path: module for path, module in model.named_modules() if _is_prunable(module)}
    _require_layers(model, prunable)
    blocks = (("", model),) if whole else _find_blocks(model, prunable)
    search = _Search(targets, ignore, filter_fn, _other_owners(model, prunable))
    search.visit_all(model, blocks, prunable)
    layers = tuple(sorted(search.layers, key=lambda layer: layer.block))
    warnings = (
        *_unused_patterns(model, ignore),
        *_dense_anyway(layers),
        *_other_experts(search.skipped, model),
    )
    return BlockLayout(model, blocks, layers, search.skipped, warnings)


@dataclass(slots=True)
class _Search:
    """Sorts layers into prunable and skipped."""

    targets: Sequence[str]
    ignore: Sequence[str]
    filter_fn: Filter | None
    owners: dict[int, str]  # id of a parameter -> path of a module of another kind that uses it too
    layers: list[PrunableLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def visit_all(self, model: nn.Module, blocks: Blocks, prunable: dict[str, nn.Module]) -> None:
        """Sort every module of ``model``; ValueError when no layer is left to prune."""
        for path, module in model.named_modules():
            if path in prunable:
                owners = (i for i, (name, _) in enumerate(blocks) if not name or path.startswith(name + "."))
                self.visit(path, module, next(owners, None))
            elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                self.skipped[path] = "router of experts" if _ROUTER.search(path) else (
                    f"{type(module).__name__} is no kind of layer that is pruned"
                )  # fmt: skip
        if not self.layers:
            classes = ", ".join(sorted({type(module).__name__ for module in prunable.values()}))
            raise ValueError(
                f"no layer to prune: targets={list(self.targets)} without ignore={list(self.ignore)} leaves none of "
                f"the {len(prunable)} prunable layers (classes {classes}; first {next(iter(prunable))}): "
                f"{_most_common(self.skipped, prunable)}"
            )

    def visit(self, path: str, module: nn.Module, block: int | None) -> None:
        for name in _matrix_names(module):
            place = f"{path}.{name}" if is_fused_experts(module) else path
            reason = self._reason(path, place, module, name, block)
            if reason is not None:
                self.skipped[place] = reason
            elif block is not None:
                self.layers += _layers(place, module, name, block)
                self.owners[id(module._parameters[name])] = place

    def _reason(self, path: str, place: str, module: nn.Module, name: str, block: int | None) -> str | None:
        """Return why a matrix is not prunable, or None."""
        weight = module._parameters.get(name)
        if not self._named(module, path, place, self.targets):
            return "not in targets"
        if self._named(module, path, place, self.ignore):
            return "in ignore"
        if self.filter_fn is not None and not self.filter_fn(module, path):
            return "filter_fn said no"
        if block is None:
            return "outside of the blocks"
        if _ROUTER.search(path):
            return "router of experts"
        if weight is None or weight.dim() != _dimensions(module) or not weight.is_floating_point():
            return (
                "its weight is no matrix of floating-point parameters (quantized, or computed from others?)"
            )
        if id(weight) in self.owners:
            return f"shares its weight with {self.owners[id(weight)]}"
        return None

    def _named(self, module: nn.Module, path: str, place: str, patterns: Sequence[str]) -> bool:
        return (
            matches(module, path, patterns)
            or (place != path and matches(module, place, patterns))
            or (is_fused_experts(module) and "Linear" in patterns)
        )


def _is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's transposed linear layer, without an import of the class from wherever it lives today."""
    return type(module).__name__ == "Conv1D" and "weight" in module._parameters


def _is_prunable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) or _is_conv1d(module) or is_fused_experts(module)


def _matrix_names(module: nn.Module) -> tuple[str, ...]:
    return (expert_input_name(module), "down_proj") if is_fused_experts(module) else ("weight",)


def _dimensions(module: nn.Module) -> int:
    """Return how many dimensions a weight has that nothing unusual was done to."""
    return 4 if isinstance(module, nn.Conv2d) else 3 if is_fused_experts(module) else 2


def _layers(place: str, module: nn.Module, name: str, block: int) -> Iterator[PrunableLayer]:
    if isinstance(module, nn.Conv2d):
        yield PrunableLayer(place, module, block, groups=module.groups)
    elif is_fused_experts(module):
        weight: Tensor = getattr(module, name)
        transposed = bool(module.is_transposed)
        for expert in range(len(weight)):
            yield PrunableLayer(f"{place}[{expert}]", module, block, transposed, name, expert)
    else:
        yield PrunableLayer(place, module, block, transposed=_is_conv1d(module))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _require_layers(model: nn.Module, prunable: dict[str, nn.Module]) -> None:
    packed = next(
        (path for path, module in model.named_modules() if isinstance(module, SparseLinear | CompactLinear)),
        None,
    )
    if packed is not None:
        raise ValueError(f"{packed} is packed already: call pysparse.densify_(model) before pruning it again")
    if not prunable:
        raise ValueError(
            f"{type(model).__name__} has no Linear layers (nor Conv2d or experts): there is nothing to prune"
        )


def _find_blocks(model: nn.Module, prunable: dict[str, nn.Module]) -> Blocks:
    """Return the stack with the most weights; sibling stacks of like blocks count as one."""
    weights: Counter[tuple[str, frozenset[type]]] = Counter()
    stacks: dict[tuple[str, frozenset[type]], list[tuple[str, nn.Module]]] = {}
    chosen: list[str] = []
    for path, module in model.named_modules():  # parents come before children
        inside = any(path.startswith(outer + ".") for outer in chosen)
        if not isinstance(module, nn.ModuleList | nn.Sequential) or inside or not _alike(module):
            continue
        chosen.append(path)
        prefix = path + "." if path else ""
        family = (path.rpartition(".")[0], frozenset(map(type, module)))
        stacks.setdefault(family, []).extend(
            (f"{prefix}{name}", one) for name, one in module.named_children()
        )
        weights[family] += sum(_size(m) for p, m in prunable.items() if p.startswith(prefix))
    best = max(weights, key=weights.__getitem__, default=None)
    return tuple(stacks[best]) if best is not None and weights[best] else (("", model),)


def _alike(stack: nn.ModuleList | nn.Sequential) -> bool:
    """Tell whether a list is a stack of blocks: several modules with prunable layers inside, of few kinds."""
    blocks = list(stack)
    if len(blocks) < 2 or any(
        _is_prunable(block) or not any(map(_is_prunable, block.modules())) for block in blocks
    ):
        return False
    return min(Counter(type(block) for block in blocks).values()) >= 2 or len({type(b) for b in blocks}) == 1


def _other_owners(model: nn.Module, prunable: dict[str, nn.Module]) -> dict[int, str]:
    """Return the parameters of all modules of other kinds, such as embeddings, by id."""
    return {
        id(parameter): f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if path not in prunable
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


def _dense_anyway(layers: Sequence[PrunableLayer]) -> list[str]:
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


def _other_experts(skipped: dict[str, str], model: nn.Module) -> list[str]:
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


def _most_common(skipped: dict[str, str], prunable: dict[str, nn.Module]) -> str:
    reasons = Counter(reason for path, reason in skipped.items() if path in prunable)
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
