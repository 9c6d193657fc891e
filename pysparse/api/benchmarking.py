"""The calls that time dense and sparse models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pysparse import backend
from pysparse.api.loading import load_model
from pysparse.measure.comparison import (
    KERNEL_DENSE,
    SPARSE,
    TORCH_DENSE,
    BenchResult,
    BenchSettings,
    compare_speed,
)
from pysparse.measure.memory import available_bytes
from pysparse.measure.progress import progress_on_stderr
from pysparse.measure.rounds import torch_threads
from pysparse.measure.twins import (
    dense_kernel_twin,
    dense_twin,
    is_packed,
    linear_layers,
    sparse_twin,
    zero_at_random_,
)
from pysparse.models.cuda_engines import engines_on_cuda
from pysparse.models.cuda_speed import compare_on_cuda
from pysparse.models.named_shapes import RANDOM_WEIGHTS, named_shape, plan_blocks, random_model
from pysparse.pruning import check_sparsity

_TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.08,
    torch.float16: 0.02,
}  # of the largest logit, whole model


def benchmark(
    model_or_path: nn.Module | str | Path,
    dense: nn.Module | str | Path | None = None,
    prompt_len: int = 64,
    new_tokens: int = 32,
    batch_size: int = 1,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    rounds: int = 5,
    warmup: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> BenchResult:
    """Time a sparse model against dense ones, interleaved in this process, at one dtype and thread count.

    Engines: torch's dense layers (``dense``, or the same weights unpacked when it is None), the compiled
    dense kernel on the same weights, and the packed sparse layers. A model that is not packed yet is packed
    in a copy; ValueError when no layer has enough zeros. Where ``dense`` is derived, the outputs must agree
    (RuntimeError otherwise). ``dtype`` converts models that are loaded from a path.
    """
    settings = BenchSettings(prompt_len, new_tokens, batch_size, rounds, warmup, threads, seed)
    model = load_model(model_or_path, dtype)
    _require_linears(model)
    notes: tuple[str, ...] = ()
    if is_packed(model):
        baseline = dense_twin(model) if dense is None else load_model(dense, dtype, format="dense")
        sparse = model
    else:
        baseline = model if dense is None else load_model(dense, dtype, format="dense")
        sparse = sparse_twin(model)
        notes = ("the model came unpacked; its zeros were packed in a copy",)
    return _compare(baseline, sparse, settings, notes=notes, same=dense is None, progress=progress)


def benchmark_shape(
    shape: str = "llama-2-7b",
    sparsity: float = 0.7,
    dtype: torch.dtype = torch.bfloat16,
    blocks: int | None = None,
    settings: BenchSettings | None = None,
    *,
    progress: bool = False,
) -> BenchResult:
    """Time a published architecture with random weights, dense against sparse, through ``generate()``.

    ``blocks`` of its blocks are built; None takes as many as memory holds dense and sparse together (a
    quarter of the available memory is left alone), at most the model's own number. The zeros are random and
    unstructured. Raises ValueError for an unknown shape, a sparsity outside [0, 1) or too little memory.
    """
    check_sparsity(sparsity)
    known, settings = named_shape(shape), settings or BenchSettings()
    blocks = plan_blocks(known, dtype, sparsity, available_bytes()) if blocks is None else blocks
    with torch_threads(settings.threads), progress_on_stderr(progress) as advance:
        advance(f"building {blocks} blocks of {shape}", 0, 3)
        dense = random_model(shape, blocks, dtype, settings.seed)
        advance(f"building {blocks} blocks of {shape}", 1, 3)
        zero_at_random_(dense, sparsity, settings.seed)
        advance(f"building {blocks} blocks of {shape}", 2, 3)
        sparse = sparse_twin(dense)
        advance(f"building {blocks} blocks of {shape}", 3, 3)
    return _compare(
        dense, sparse, settings,
        title=f"{shape}: {blocks} of {known.blocks} blocks, {sparsity:.0%} random zeros, RANDOM WEIGHTS (speed only)",
        weights=RANDOM_WEIGHTS, progress=progress,
    )  # fmt: skip


def benchmark_shape_on_cuda(
    shape: str = "llama-2-7b",
    sparsities: Sequence[float] = (0.5, 0.6, 0.7),
    blocks: int | None = None,
    settings: BenchSettings | None = None,
    *,
    two_of_four: bool = True,
    compiled: bool = False,
    progress: bool = False,
) -> BenchResult:
    """Time a published architecture on a GPU, bf16 with random weights and zeros: dense, each sparsity, and 2:4.

    Decoding is greedy with a static KV cache and one CUDA graph a step; prefill and the first token run eagerly.
    ``compiled`` adds dense and the last sparsity with their blocks under torch.compile. ``blocks`` None builds all of
    them. Raises ValueError for an unknown shape, sparsities outside [0, 1) or none to time, and where there is no GPU
    or no CUDA kernels, saying what is missing.
    """
    known, settings = named_shape(shape), settings or BenchSettings()
    for sparsity in sparsities:
        check_sparsity(sparsity)
    if not sparsities and not two_of_four:
        raise ValueError("there is nothing to compare: give a sparsity, or two_of_four")
    missing = backend.cuda_missing_reason()
    if missing:
        raise ValueError(f"device 'cuda' cannot be timed here: {missing}")
    with progress_on_stderr(progress) as advance:
        advance(f"building {blocks or known.blocks} blocks of {shape}", 0, 1)
        models, differences = engines_on_cuda(
            shape, blocks, sparsities, two_of_four=two_of_four, compiled=compiled, seed=settings.seed
        )
        advance(f"building {blocks or known.blocks} blocks of {shape}", 1, 1)
        return compare_on_cuda(
            models, settings, weights=RANDOM_WEIGHTS, difference=differences, on_round=advance,
            title=f"{shape}: {blocks or known.blocks} of {known.blocks} blocks, bf16, RANDOM WEIGHTS (speed only)",
        )  # fmt: skip


def _compare(
    dense: nn.Module,
    sparse: nn.Module,
    settings: BenchSettings,
    *,
    title: str = "dense and sparse, interleaved in one process",
    weights: str = "the model's own",
    notes: tuple[str, ...] = (),
    same: bool = True,
    progress: bool = False,
) -> BenchResult:
    engines = {TORCH_DENSE: dense, KERNEL_DENSE: dense_kernel_twin(dense), SPARSE: sparse}
    with progress_on_stderr(progress) as advance:
        result = compare_speed(engines, settings, title=title, weights=weights, notes=notes, on_round=advance)
    if same:
        _require_same_outputs(result, getattr(dense, "dtype", torch.float32))
    return result


def _require_same_outputs(result: BenchResult, dtype: torch.dtype) -> None:
    """A benchmark of a wrong answer is worth nothing: compare the engines' outputs with torch's."""
    for name, difference in result.difference.items():
        bound = _TOLERANCE.get(dtype, 0.0) * difference["max_value"]
        if not difference["max_difference"] <= bound:
            raise RuntimeError(
                f"{name} differs from {TORCH_DENSE} by {difference['max_difference']:.3g} on the same weights, "
                f"over the bound {bound:.3g} for {dtype}: please report this with the output of 'pysparse doctor'"
            )


def _require_linears(model: nn.Module) -> None:
    if not linear_layers(model):
        raise ValueError(f"{type(model).__name__} has no Linear layers: there is nothing to prune")
