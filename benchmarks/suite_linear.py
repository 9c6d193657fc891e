"""pytest-benchmark over layer shapes x sparsity x tokens x dtype x kernel family, the answer checked once each.

    pytest benchmarks/suite_linear.py --benchmark-only --benchmark-group-by=param:shape,param:tokens

For watching one kernel while it is being written, and for comparing two commits (``--benchmark-autosave``,
``--benchmark-compare``). The published figures come from the bench_*.py scripts, whose engines take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import shapes
import torch
from harness import cold_copies
from rivals import PYSPARSE_DENSE, PYSPARSE_SPARSE, TORCH, Engine
from rivals.pysparse_int8 import PYSPARSE_INT8
from rivals.pysparse_pairs import PYSPARSE_PAIRS
from torch import Tensor

from pysparse.measure.twins import zero_rows_at_random_

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install 'pysparse[bench]'")

FEW_TOKENS, MANY_TOKENS = (1, 4, 16), (64, 256)
ERROR_BOUND = {PYSPARSE_INT8.name: 0.025}  # norm of the error over that of the product; the others':
ERROR_BOUND_FLOATS = {"bf16": 0.01, "fp32": 1e-5}


ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (TORCH, PYSPARSE_DENSE, PYSPARSE_SPARSE, PYSPARSE_INT8, PYSPARSE_PAIRS)
}


@lru_cache(maxsize=1)
def weight_of(shape: str, dtype: str, sparsity: float) -> Tensor:
    """A random weight [out, in]; the last one is kept, since its tests follow each other."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(*shapes.LINEAR[shape], generator=generator) * 0.02).to(shapes.DTYPES[dtype])
    zero_rows_at_random_(weight, sparsity, generator)
    return weight


@lru_cache(maxsize=1)
def rotation_of(engine: str, shape: str, dtype: str, sparsity: float) -> Any:
    storage = ENGINES[engine].storage
    return cold_copies(lambda: storage.pack(weight_of(shape, dtype, sparsity)), storage.nbytes)


def check(engine: Engine, answer: Tensor, weight: Tensor, x: Tensor, dtype: str) -> None:
    expected = x.double() @ weight.double().T
    error = float((answer.double() - expected).norm() / expected.norm())
    assert error <= ERROR_BOUND.get(engine.name, ERROR_BOUND_FLOATS[dtype])


# The last parameter turns fastest: weights and their copies are made once a (shape, dtype, sparsity, engine).
@pytest.mark.parametrize("tokens", FEW_TOKENS + MANY_TOKENS)
@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("sparsity", shapes.SPARSITIES)
@pytest.mark.parametrize("dtype", list(shapes.DTYPES))
@pytest.mark.parametrize("shape", ["2048x2048", "4096x4096", "11008x4096", "4096x11008"])
def test_linear(
    benchmark: Callable[..., Any], shape: str, dtype: str, sparsity: float, engine: str, tokens: int
) -> None:
    """One product with cold weights."""
    one = ENGINES[engine]
    if one in (PYSPARSE_SPARSE, PYSPARSE_DENSE) and tokens in MANY_TOKENS:
        pytest.skip("a kernel of few tokens")
    weight, copies = weight_of(shape, dtype, sparsity), rotation_of(engine, shape, dtype, sparsity)
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    prepared = one.prepare(x)
    with torch.no_grad():
        check(one, one.multiply(copies.take(), prepared), weight, x, dtype)
        benchmark(lambda: one.multiply(copies.take(), prepared))
    benchmark.extra_info.update(bytes=one.storage.nbytes(copies.take()), copies=len(copies))
