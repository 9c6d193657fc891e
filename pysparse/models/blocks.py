"""Find the stack of blocks that a model is made of."""

from __future__ import annotations

from collections import Counter

from torch import nn

from pysparse.models.kinds import is_prunable

Blocks = tuple[tuple[str, nn.Module], ...]  # (path, module)


def find_blocks(model: nn.Module, prunable: dict[str, nn.Module]) -> Blocks:
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


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _alike(stack: nn.ModuleList | nn.Sequential) -> bool:
    """Tell whether a list is a stack of blocks: several modules with prunable layers inside, of few kinds.

    A list of lists is none: nobody calls a list, so that it has neither inputs nor outputs.
    """
    blocks = list(stack)
    if len(blocks) < 2 or any(isinstance(block, nn.ModuleList) for block in blocks):
        return False
    if any(is_prunable(block) or not any(map(is_prunable, block.modules())) for block in blocks):
        return False
    return min(Counter(type(block) for block in blocks).values()) >= 2 or len({type(b) for b in blocks}) == 1
