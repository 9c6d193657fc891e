"""Dense and sparse copies of a published architecture on a CUDA device, with random weights and zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pysparse.measure.latency import random_tokens
from pysparse.measure.twins import linear_layers, shared_copy
from pysparse.models.cuda_speed import compile_blocks_
from pysparse.models.named_shapes import random_model
from pysparse.nn import fuse_, sparsify_

TOLERANCE = 0.05  # of the norm of the logits: both round to 16 bits in other orders, layer after layer
DENSE = "torch dense"
Engines = tuple[dict[str, nn.Module], dict[str, dict[str, float]]]


def random_keep(rows: int, cols: int, sparsity: float | None, seed: int, device: torch.device) -> Tensor:
    """Return a random bool mask [rows, cols], True survives: unstructured, or two of every four for None.

    ValueError for two of four where 4 does not divide ``cols``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    draws = torch.rand(rows, cols, device=device, generator=generator)
    if sparsity is not None:
        return draws >= sparsity
    if cols % 4:
        raise ValueError(f"two of four need a multiple of 4 columns, got {cols}")
    groups = draws.view(rows, -1, 4)
    smaller = groups.unsqueeze(3) > groups.unsqueeze(2)  # how many of the four each one beats
    return (smaller.sum(dim=3, dtype=torch.uint8) >= 2).view(rows, cols)


@torch.no_grad()
def sparse_copy(dense: nn.Module, sparsity: float | None, seed: int = 0) -> tuple[nn.Module, float]:
    """Return a packed copy with random zeros (2:4 for None), and its distance to the same zeros kept dense.

    The distance is that of one token's logits, over their norm; RuntimeError where it exceeds ``TOLERANCE``: the speed
    of a wrong answer is worth nothing.
    """
    copy = shared_copy(dense)
    for index, (path, module) in enumerate(linear_layers(copy).items()):
        weight = module.weight
        if not path.endswith("lm_head") and isinstance(weight, Tensor):
            rows, cols = weight.shape
            keep = random_keep(rows, cols, sparsity, seed + index, weight.device)
            module.weight = nn.Parameter(weight * keep, requires_grad=False)
    tokens = random_tokens(dense, 1, 1, seed).to(next(dense.parameters()).device)
    exact = copy(input_ids=tokens).logits.double()
    sparsify_(copy, ignore=("lm_head",), dense_kernels=False)
    error = float((copy(input_ids=tokens).logits.double() - exact).norm() / exact.norm())
    if not error < TOLERANCE:
        raise RuntimeError(f"sparse logits are {error:.3g} off, over the bound {TOLERANCE}")
    return copy, error


@torch.no_grad()
def stacked_copy(sparse: nn.Module, seed: int = 0) -> tuple[nn.Module, float]:
    """Return a copy whose layers that share an input are one weight (:func:`pysparse.nn.fuse_`), and its distance.

    The distance is that of one token's logits from those of ``sparse``, over their norm; RuntimeError where it exceeds
    ``TOLERANCE``, or where no layers could be stacked.
    """
    copy = shared_copy(sparse)
    tokens = random_tokens(sparse, 1, 1, seed).to(next(sparse.parameters()).device)
    exact = sparse(input_ids=tokens).logits.double()
    report = fuse_(copy, {"input_ids": tokens})
    if not report.stacked:
        raise RuntimeError(f"no layers share an input: {report.apart}")
    error = float((copy(input_ids=tokens).logits.double() - exact).norm() / exact.norm())
    if not error < TOLERANCE:
        raise RuntimeError(f"logits of stacked layers are {error:.3g} off, over the bound {TOLERANCE}")
    return copy, error


def engines_on_cuda(
    shape: str, blocks: int | None, sparsities: Sequence[float], *, two_of_four: bool, compiled: bool, seed: int = 0
) -> Engines:  # fmt: skip
    """Build dense and sparse engines of ``shape`` (bf16, ``blocks`` of its blocks or all), and what they differ by.

    The last sparsity comes a second time with layers that share an input as one weight; ``compiled`` adds the dense
    engine and both of the last sparsity with their blocks under torch.compile. ValueError for an unknown shape;
    torch.OutOfMemoryError where the device has no room for all of them.
    """
    dense = random_model(shape, blocks, seed=seed).cuda()
    wanted: dict[str, float | None] = {f"sparse {sparsity:.0%}": sparsity for sparsity in sparsities}
    if two_of_four:
        wanted["sparse 2:4"] = None
    models, differences = {DENSE: dense}, {}
    for name, sparsity in wanted.items():
        models[name], error = sparse_copy(dense, sparsity, seed + 1)
        differences[name] = {"relative_difference": error}
    last = [f"sparse {sparsity:.0%}" for sparsity in sparsities[-1:]]
    for name in last:
        models[f"{name}, stacked"], error = stacked_copy(models[name], seed)
        differences[f"{name}, stacked"] = {"relative_difference": error}
    torch.cuda.empty_cache()
    if compiled:
        for name in (DENSE, *last, *(f"{name}, stacked" for name in last)):
            models[f"{name}, compiled"] = compile_blocks_(shared_copy(models[name]))
    return models, differences
