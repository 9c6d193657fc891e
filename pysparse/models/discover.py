"""Find the blocks of a model and the weight matrices in them, from the module tree alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from pysparse.calib.inputs import is_fused_experts
from pysparse.models.blocks import Blocks, find_blocks
from pysparse.models.kinds import (
    closed_reason,
    dimensions,
    holds_matrix,
    is_closed,
    is_prunable,
    layers_in,
    matrix_names,
)
from pysparse.models.remarks import (
    DEFAULT_IGNORE,
    dense_anyway,
    most_common,
    other_experts,
    unused_patterns,
)
from pysparse.nn import CompactLinear, SparseLinear
from pysparse.nn.match import matches
from pysparse.pruning import BlockLayout, PrunableLayer
from pysparse.pruning.layout import SECOND_NAME

# Routers choose experts: a handful of weights on which everything hangs. "gate_proj" is not one.
_ROUTER = re.compile(r"(^|\.)(router|gate|gating|shared_expert_gate)(\.|$)")
Filter = Callable[[nn.Module, str], bool]


def discover(
    model: nn.Module,
    targets: Sequence[str] | str = ("Linear",),
    ignore: Sequence[str] | str = DEFAULT_IGNORE,
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
    are shared with another module, quantized layers, whose weights are no parameters, and modules of other
    kinds. A module that stands in several places is pruned once, in its first; the others are in ``skipped``
    too. With ``whole`` the model is taken as one block, so
    that stem and classifier are prunable too, as is usual in vision; its statistics are held all at once then.
    ``filter_fn(module, path)`` is asked about each module that ``targets`` and ``ignore`` leave, and a False
    keeps it dense.

    Raises ValueError for a model without such layers, an already packed one, and targets that name nothing.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is called with a module and its path, got {filter_fn!r}")
    targets, ignore = ([names] if isinstance(names, str) else names for names in (targets, ignore))
    prunable = {path: module for path, module in model.named_modules() if is_prunable(module)}
    _require_layers(model, prunable)
    blocks = (("", model),) if whole else find_blocks(model, prunable)
    search = _Search(targets, ignore, filter_fn, _other_owners(model, prunable))
    search.visit_all(model, blocks, prunable)
    layers = tuple(sorted(search.layers, key=lambda layer: layer.block))
    warnings = (
        *unused_patterns(model, ignore),
        *dense_anyway(layers),
        *other_experts(search.skipped, model),
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
            elif is_closed(module):
                self.skipped[path] = closed_reason(module)
            elif holds_matrix(module):
                self.skipped[path] = "router of experts" if _ROUTER.search(path) else (
                    f"{type(module).__name__} is no kind of layer that is pruned"
                )  # fmt: skip
        self.note_second_names(model)
        if not self.layers:
            classes = ", ".join(sorted({type(module).__name__ for module in prunable.values()}))
            raise ValueError(
                f"no layer to prune: targets={list(self.targets)} without ignore={list(self.ignore)} leaves none of "
                f"the {len(prunable)} prunable layers (classes {classes}; first {next(iter(prunable))}): "
                f"{most_common(self.skipped, prunable)}"
            )

    def note_second_names(self, model: nn.Module) -> None:
        """Note where modules with matrices stand again that were sorted under their first path."""
        pruned = {id(layer.module) for layer in self.layers}
        for path, first, module in _second_names(model):
            if id(module) in pruned:
                self.skipped[path] = f"{SECOND_NAME}{first}: pruned once, by the inputs it has there"
            elif is_prunable(module) or holds_matrix(module) or is_closed(module):
                self.skipped[path] = f"{SECOND_NAME}{first}, which is not pruned"

    def visit(self, path: str, module: nn.Module, block: int | None) -> None:
        for name in matrix_names(module):
            place = f"{path}.{name}" if is_fused_experts(module) else path
            reason = self._reason(path, place, module, name, block)
            if reason is not None:
                self.skipped[place] = reason
            elif block is not None:
                self.layers += layers_in(place, module, name, block)
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
        if weight is None or weight.dim() != dimensions(module) or not weight.is_floating_point():
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


def _require_layers(model: nn.Module, prunable: dict[str, nn.Module]) -> None:
    packed = next(
        (path for path, module in model.named_modules() if isinstance(module, SparseLinear | CompactLinear)),
        None,
    )
    if packed is not None:
        raise ValueError(f"{packed} is packed already: call pysparse.densify_(model) before pruning it again")
    if not prunable:
        closed = [(path, module) for path, module in model.named_modules() if is_closed(module)]
        found = (
            f"; {len(closed)} layers cannot be pruned, {closed[0][0]} first: {closed_reason(closed[0][1])}"
            if closed
            else ""
        )
        raise ValueError(
            f"{type(model).__name__} has no Linear layers (nor Conv2d or experts): there is nothing to prune{found}"
        )


def _second_names(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (path, first path, module) where a module stands in the tree again, and for all inside of it."""
    first = {id(module): path for path, module in model.named_modules()}
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            place = f"{path}.{name}" if path else name
            if child is not None and first[id(child)] != place:
                for rest, part in child.named_modules(prefix=place):
                    yield rest, first[id(part)], part


def _other_owners(model: nn.Module, prunable: dict[str, nn.Module]) -> dict[int, str]:
    """Return the parameters of all modules of other kinds, such as embeddings, by id."""
    return {
        id(parameter): f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if path not in prunable
        for name, parameter in module.named_parameters(recurse=False)
    }
