"""Copies of a model that share its weights, so that dense and sparse engines fit in memory together."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pysparse.nn import CompactLinear, DenseLinear, SparseLinear, densify_, sparsify_
from pysparse.nn.dispatch import MIN_SPARSITY


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose modules are new but whose parameters and buffers are the same objects."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin


def is_packed(model: nn.Module) -> bool:
    """Tell whether any layer holds a packed sparse weight."""
    return any(isinstance(module, SparseLinear | CompactLinear) for module in model.modules())


def dense_twin(model: nn.Module) -> nn.Module:
    """Return the same function in plain ``nn.Linear`` layers; only what was packed takes new memory."""
    return densify_(shared_copy(model))


def dense_kernel_twin(dense: nn.Module) -> nn.Module:
    """Return ``dense`` with its linear layers on the compiled dense kernel, sharing every weight."""
    twin = shared_copy(dense)
    sparsify_(twin, lambda module, path: False, dense_kernels=True)
    return twin


def sparse_twin(dense: nn.Module) -> nn.Module:
    """Return ``dense`` with every layer that has enough zeros packed; ValueError when none has."""
    twin = shared_copy(dense)
    report = sparsify_(twin)
    if not report.sparse:
        raise ValueError(f"no layer of this model is sparse enough to pack: {_sparsest(dense)}")
    return twin


def _sparsest(model: nn.Module) -> str:
    """Tell how far a model without layers to pack is from having one."""
    linears = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel() and not path.endswith("lm_head")
    ]
    if not linears:
        return "it has no nn.Linear layers (lm_head apart, which stays dense)"
    zeros = {path: 1 - int(module.weight.count_nonzero()) / module.weight.numel() for path, module in linears}
    path = max(zeros, key=zeros.__getitem__)
    return f"the sparsest is {path} with {zeros[path]:.0%} zeros; prune it first, {MIN_SPARSITY:.0%} or more"


@torch.no_grad()
def zero_at_random_(
    model: nn.Module, sparsity: float, seed: int = 0, on_layer: Callable[[str], None] | None = None
) -> nn.Module:
    """Zero a random fraction of every linear weight but ``lm_head``, in place: for timing, not for quality.

    Each weight is kept when 16 random bits reach ``sparsity``, so counts vary by row as they do after real
    pruning, and with one seed a higher sparsity's zeros contain a lower one's.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is a fraction between 0 and 1, got {sparsity}")
    for index, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and not path.endswith("lm_head"):
            generator = torch.Generator().manual_seed(seed + index)
            zero_rows_at_random_(module.weight, sparsity, generator)
            if on_layer is not None:
                on_layer(path)
    return model


def zero_rows_at_random_(weight: Tensor, sparsity: float, generator: torch.Generator) -> None:
    """Zero a random fraction of ``weight`` [R, C] in place, some rows at a time to stay in the caches."""
    rows = max(1, (1 << 21) // max(1, weight.shape[1]))
    threshold = round(sparsity * (1 << 15))
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        draws = torch.empty(block.shape, dtype=torch.int16).random_(0, 1 << 15, generator=generator)
        block.masked_fill_(draws < threshold, 0)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer by path: ``nn.Linear`` and its kinds, packed layers, GPT-2's Conv1D."""
    kinds = (nn.Linear, CompactLinear, DenseLinear, SparseLinear)
    return {p: m for p, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"}
