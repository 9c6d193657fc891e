"""The kinds of modules that hold weight matrices: which can be pruned, and how their matrices are read."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from pysparse.calib.inputs import expert_input_name, is_fused_experts
from pysparse.pruning import PrunableLayer


def _is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's transposed linear layer, without an import of the class from wherever it lives today."""
    return type(module).__name__ == "Conv1D" and "weight" in module._parameters


def is_prunable(module: nn.Module) -> bool:
    """Tell whether the module is of a kind that is pruned."""
    return isinstance(module, nn.Linear | nn.Conv2d) or _is_conv1d(module) or is_fused_experts(module)


def matrix_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that hold its matrices."""
    return (expert_input_name(module), "down_proj") if is_fused_experts(module) else ("weight",)


def dimensions(module: nn.Module) -> int:
    """Return how many dimensions a weight has that nothing unusual was done to."""
    return 4 if isinstance(module, nn.Conv2d) else 3 if is_fused_experts(module) else 2


def layers_in(place: str, module: nn.Module, name: str, block: int) -> Iterator[PrunableLayer]:
    """Yield the layers in one parameter of ``module``: one, or one for each of several experts."""
    if isinstance(module, nn.Conv2d):
        yield PrunableLayer(place, module, block, groups=module.groups)
    elif is_fused_experts(module):
        weight: Tensor = getattr(module, name)
        transposed = bool(module.is_transposed)
        for expert in range(len(weight)):
            yield PrunableLayer(f"{place}[{expert}]", module, block, transposed, name, expert)
    else:
        yield PrunableLayer(place, module, block, transposed=_is_conv1d(module))


def holds_matrix(module: nn.Module) -> bool:
    """Tell whether a module has a parameter of two or more dimensions of its own."""
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def is_closed(module: nn.Module) -> bool:
    """Tell a layer whose weights are no parameters: a quantized or packed one.

    Such are torch.ao's quantized layers, whose ``weight()`` unpacks an opaque object, and those of other
    quantizers, which have the sizes of a linear layer and keep its weights in buffers. A module that has
    ordinary weights somewhere inside is not meant.
    """
    if is_prunable(module) or any(map(holds_matrix, module.modules())):
        return False
    sized = all(isinstance(getattr(module, f"{end}_features", None), int) for end in ("in", "out"))
    return callable(getattr(module, "weight", None)) or (sized and _keeps_weights(module))


def _keeps_weights(module: nn.Module) -> bool:
    tensors = (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False))
    return any("weight" in name for name, _ in tensors)


def closed_reason(module: nn.Module) -> str:
    """Say why a layer for which :func:`is_closed` is true is not pruned."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return f"{kind} keeps its weights packed, not as parameters (quantized?)"
