"""Deep heads walked by torch: on the CPU against the compiled walks, on a GPU against both."""

import numpy as np
import pytest
import torch

from pysparse import backend, ops

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
reason = backend.missing_reason() or backend.cuda_missing_reason()
FIELDS, COLS, COUNT = 3, 2, 7
PLAYERS = FIELDS * COLS


def samples(random):
    table = random.normal(0, 0.5, (12, COLS)).astype(np.float32)
    base = random.normal(0, 0.1, (FIELDS, COLS)).astype(np.float32)
    ids = (random.integers(0, 4, (COUNT, FIELDS)) + 4 * np.arange(FIELDS)).astype(np.int32)
    labels = random.integers(0, 2, COUNT).astype(np.float32)
    return ops.EntrySamples(table, base, ids, labels, random.normal(size=COUNT).astype(np.float32))


def floats(random, *shape):
    return random.normal(0, 0.5, shape).astype(np.float32)


def mlp(random):
    weights = (floats(random, 8, PLAYERS), floats(random, 4, 8))
    return ops.Mlp(weights, (floats(random, 8), floats(random, 4)), floats(random, 4), 0.3)


def heads(random):
    d = PLAYERS
    full = {"kind": "full", "bias": floats(random, 2, d), "weight": floats(random, 2, d, d)}
    mixture = {
        "kind": "mixture", "bias": floats(random, 2, d), "u": floats(random, 2, 3, d, 2),
        "c": floats(random, 2, 3, 2, 2), "v": floats(random, 2, 3, d, 2), "gates": floats(random, 3, d),
    }  # fmt: skip
    out = floats(random, d)
    return {
        "DeepFM": ops.DeepHead(mlp(random), pairs=True),
        "DCN-v2 stacked": ops.DeepHead(mlp(random), crosses=ops.Crosses(**full)),
        "DCN-v2 parallel": ops.DeepHead(mlp(random), crosses=ops.Crosses(**full, out=out)),
        "DCN-Mix": ops.DeepHead(mlp(random), crosses=ops.Crosses(**mixture)),
        "crosses alone": ops.DeepHead(None, crosses=ops.Crosses(**mixture, out=out)),
    }


NAMES = ["DeepFM", "DCN-v2 stacked", "DCN-v2 parallel", "DCN-Mix", "crosses alone"]
CPU = pytest.param(None, id="cpu")
GPU = pytest.param(
    0,
    id="cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=f"no CUDA kernels: {reason}")],
)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_torch_walks_as_the_compiled_kernels_do(name, antithetic, device, monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")
    random = np.random.default_rng(4)
    data, head, draw = samples(random), heads(random)[name], ops.EntryDraw(9, 100, 2, antithetic)
    found = ops.head_marginals_torch(data, draw, head, device=device)
    # Differences of float32 logits of order 1, some ten operations deep.
    assert np.allclose(found, ops.head_marginals(data, draw, head), rtol=1e-4, atol=5e-6)


def test_given_orders_and_small_tiles(monkeypatch):
    monkeypatch.setattr("pysparse.ops.shapley_heads_cuda._ROWS", 3 * PLAYERS * (PLAYERS + 1))
    random = np.random.default_rng(5)
    data, head, draw = samples(random), heads(random)["DeepFM"], ops.EntryDraw(0, antithetic=False)
    orders = np.stack([random.permutation(PLAYERS) for _ in range(COUNT)]).astype(np.int32)
    found = ops.head_marginals_torch(data, draw, head, orders)
    assert np.allclose(found, ops.head_marginals(data, draw, head, orders), rtol=1e-4, atol=5e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_error_says_what_is_missing():
    random = np.random.default_rng(6)
    data, head = samples(random), heads(random)["DeepFM"]
    with pytest.raises(RuntimeError, match="no Shapley kernels on a GPU: .+"):
        ops.head_shapley_cuda(data, ops.EntryDraw(0), head, ops.EntryTotals(12, COLS))


@pytest.mark.gpu
@pytest.mark.skipif(bool(reason), reason=f"no CUDA kernels: {reason}")
def test_totals_on_a_gpu(monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")
    random = np.random.default_rng(7)
    data, head, draw = samples(random), heads(random)["DCN-Mix"], ops.EntryDraw(1)
    mine, theirs = ops.EntryTotals(12, COLS), ops.EntryTotals(12, COLS)
    ops.head_shapley_cuda(data, draw, head, mine)
    ops.head_shapley(data, draw, head, theirs)
    assert np.allclose(mine.mean(COUNT), theirs.mean(COUNT), rtol=1e-4, atol=5e-6)
