"""Embedding, Shapley and pruning kernels on a GPU, against the CPU's: bits, poisoned results, bad input, graphs."""

import numpy as np
import pytest
import torch
from test_cuda_pruning import PATTERNS, problem
from test_cuda_shapley import game

from pysparse import backend, ops
from pysparse.nn.embedding import SparseEmbedding, SparseEmbeddingBag
from pysparse.ops import pruning_cuda

reason = backend.missing_reason() or backend.cuda_missing_reason()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(reason), reason=f"no CUDA kernels: {reason}"),
]


@pytest.fixture(autouse=True)
def unvalidated(monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")


def poison(shape=(1 << 20,)):
    """Leave NaN in the memory that the allocator hands out next."""
    torch.full(shape, float("nan"), device="cuda")


def table(rows, dims, dtype, kind=SparseEmbedding):
    torch.manual_seed(rows * dims)
    weight = torch.randn(rows, dims).to(dtype)
    codebook = torch.randn(2, dims).to(dtype)
    sizes = [rows // 3, rows - rows // 3]
    return kind.from_dense(weight, torch.rand(weight.shape) < 0.2, field_sizes=sizes, codebook=codebook)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [1, 13, 16, 40, 256])
def test_lookups_and_bags_have_the_bits_of_the_cpu(dims, dtype):
    layer, bags = table(5000, dims, dtype), table(5000, dims, dtype, SparseEmbeddingBag)
    ids = torch.randint(0, 5000, (333, 7))
    expected = layer(ids)
    poison()
    assert torch.equal(layer.cuda()(ids.cuda()).cpu(), expected)
    if dtype != torch.float16:  # the CPU sums float16 in an order of torch's
        weights, bags.mode = torch.randn(ids.shape), "sum"
        assert torch.equal(
            bags.cuda()(ids.cuda(), None, weights.cuda()).cpu(), bags.cpu()(ids, None, weights)
        )


def test_ids_and_bags_outside_are_refused_before_a_row_is_read():
    layer, bags = (
        table(100, 8, torch.bfloat16).cuda(),
        table(100, 8, torch.bfloat16, SparseEmbeddingBag).cuda(),
    )
    with pytest.raises(IndexError, match=r"id 100 at position 2 is outside the table: \[0, 100\)"):
        layer(torch.tensor([1, 2, 100], device="cuda"))
    with pytest.raises(ValueError, match="bag 1 is"):
        bags(torch.tensor([1, 2], device="cuda"), torch.tensor([0, 2, 1], device="cuda"))
    with pytest.raises(ValueError, match="ids is on cpu"):
        layer(torch.tensor([1]))


def test_a_lookup_in_a_graph():
    layer = table(1000, 16, torch.bfloat16).cuda()
    ids = torch.zeros(64, dtype=torch.int64, device="cuda")
    layer(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(ids)
    ids.copy_(torch.arange(64) * 15)
    ids[3] = 5000  # nothing can be refused in a graph
    graph.replay()
    assert out[3].isnan().all()
    good = torch.arange(64, device="cuda") != 3
    assert torch.equal(out[good], layer(ids[good]))


def test_permutations_are_those_of_the_cpu():
    found = ops.draw_permutations_cuda(77, (1 << 39) + 3, 513, 624, visit=9)
    assert np.array_equal(found.cpu().numpy(), ops.draw_permutations(77, (1 << 39) + 3, 513, 624, visit=9))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shape", [(39, 16, 700), (3, 100, 50), (7, 5, 1)], ids=str)
def test_walks_and_sums_are_those_of_the_cpu(shape, antithetic):
    samples, draw = game(*shape, rows_each=50), ops.EntryDraw(5, 11, 1, antithetic)
    poison()
    found = ops.fm_marginals_cuda(samples, draw)
    if not dict(backend.isa_levels()).get("avx512"):
        assert np.allclose(found, ops.fm_marginals(samples, draw), rtol=1e-3, atol=1e-5)
        return
    assert np.array_equal(found.view(np.int32), ops.fm_marginals(samples, draw).view(np.int32))
    mine, theirs = (ops.EntryTotals(*samples.table.shape) for _ in range(2))
    ops.fm_shapley_cuda(samples, draw, mine)
    ops.fm_shapley_cuda(samples, draw, mine)
    for _ in range(2):
        ops.fm_shapley(samples, draw, theirs)
    assert np.array_equal(mine.sums, theirs.sums)
    assert np.array_equal(mine.squares, theirs.squares)


def test_a_walk_that_overflows_is_refused():
    samples = game(4, 4, 9)
    samples.table[samples.ids[3, 2], 1] = 3e38
    with pytest.raises(ValueError, match="must be finite and below 1024"):
        ops.fm_shapley_cuda(samples, ops.EntryDraw(1), ops.EntryTotals(*samples.table.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (513, 4096), (64, 11008), (100, 77)])
def test_selections_are_those_of_the_cpu(rows, cols, dtype):
    torch.manual_seed(cols)
    weight, scale = torch.randn(rows, cols).to(dtype), torch.rand(cols)
    poison()
    for count in (0, cols // 2, cols):
        expected = ops.select_rows(weight, scale, count)
        found = ops.select_rows(weight.cuda(), scale.cuda(), count)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    for n, m in ((2, 4), (4, 8), (3, 12)):
        expected = ops.select_nm(weight, scale, n, m)
        found = ops.select_nm(weight.cuda(), scale.cuda(), n, m)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_a_damaged_weight_is_refused():
    weight = torch.randn(5, 64, device="cuda")
    weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="1 of 320 scores are NaN"):
        ops.select_rows(weight, torch.ones(64, device="cuda"), 3)
    scale = torch.ones(64, device="cuda")
    scale[2] = -1
    with pytest.raises(ValueError, match=r"scale -1\.0 of column 2 is negative"):
        ops.select_nm(torch.randn(5, 64, device="cuda"), scale, 2, 4)
    with pytest.raises(ValueError, match="scale is on cpu"):
        pruning_cuda.select(torch.randn(5, 64, device="cuda"), torch.ones(64), count=3)


SWEEPS = [*PATTERNS, (257, 640, ops.SweepPattern(128, (64,) * 5)), (64, 512, ops.SweepPattern(128, n=2, m=4))]


@pytest.mark.parametrize(("rows", "cols", "pattern"), SWEEPS, ids=str)
def test_the_sweep_is_the_cpu_sweep(rows, cols, pattern):
    weight, upper, scale = problem(rows, cols)
    expected, keep = ops.obs_sweep(weight, upper, scale, pattern)
    poison()
    found, found_keep = ops.obs_sweep(weight.cuda(), upper.cuda(), scale.cuda(), pattern)
    assert torch.equal(found_keep.cpu(), keep)
    if dict(backend.isa_levels()).get("avx512"):
        assert torch.equal(found.cpu(), expected)
    assert torch.allclose(found.cpu(), expected, rtol=1e-4, atol=1e-5)
