"""The CUDA pruning kernels' own source on host threads (cuda_shim/shim.h), against the CPU's, bit for bit."""

import ctypes
import shutil

import pytest
import torch
from cuda_host_library import BOOL, INT, LONG, POINTER, build, check_sizes, structure

from pysparse import backend, ops
from pysparse.ops.select import select_nm, select_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]
Matrix = structure(weight=POINTER, scale=POINTER, rows=LONG, cols=LONG, stride=LONG, entry=INT)
Chosen = structure(keep=POINTER, pruned=POINTER, stride=LONG)
Sweep = structure(
    weight=POINTER, upper=POINTER, scale=POINTER, keep=POINTER, rows=LONG, cols=LONG, block=LONG, joint=BOOL,
    counts=POINTER, n=INT, m=INT,
)  # fmt: skip
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = build(tmp_path_factory.mktemp("pruning"), "pruning", ("entry.cuh",))
    check_sizes(found, Matrix, Chosen, Sweep)
    return found


def select(library, weight, scale, *, count=0, joint=False, n=0, m=0):
    """Return (keep, pruned weight, [NaN scores, negative scales])."""
    keep, pruned = torch.full(weight.shape, 9, dtype=torch.uint8), torch.full_like(weight, 5)
    rows, cols = weight.shape
    matrix = Matrix(
        weight.data_ptr(), None if scale is None else scale.data_ptr(), rows, cols, cols, CODES[weight.dtype]
    )
    chosen = Chosen(keep.data_ptr(), pruned.data_ptr(), cols)
    damage = torch.zeros(2, dtype=torch.int32)
    pointers = ctypes.byref(chosen), ctypes.c_void_p(damage.data_ptr())
    if m:
        assert library.groups(ctypes.byref(matrix), n, m, *pointers) == 0
    else:
        assert library.rows(ctypes.byref(matrix), ctypes.c_int64(count), joint, *pointers) == 0
    return keep.bool(), pruned, damage.tolist()


def draw(rows, cols, dtype):
    """Return weights with many equal scores, zeros of both signs and an infinity."""
    torch.manual_seed(rows * cols)
    weight = (torch.randint(-40, 40, (rows, cols)) / 8).to(dtype)
    weight[0, 0], weight[-1, -1] = -0.0, float("inf")
    return weight, torch.rand(cols) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 31), (2, 300), (4, 257)])
def test_rows_lose_the_same_weights_as_on_the_cpu(library, rows, cols, dtype):
    weight, scale = draw(rows, cols, dtype)
    for count in {0, 1, cols // 2, cols}:
        keep, pruned = select_rows(weight, scale, count)
        found_keep, found_pruned, damage = select(library, weight, scale, count=count)
        assert torch.equal(found_keep, keep)
        assert torch.equal(found_pruned, pruned)
        assert damage == [0, 0]


def test_signs_count_without_a_scale(library):
    weight, _ = draw(3, 70, torch.float32)
    keep, *_ = select(library, weight, None, count=30)
    assert torch.equal(keep, ops.row_mask(weight, 30))


def test_float16_rows(library):
    weight, scale = draw(3, 90, torch.float16)
    keep, pruned, _ = select(library, weight, scale, count=40)
    assert torch.equal(keep, select_rows(weight.float(), scale, 40)[0])  # the scores are the same numbers
    assert torch.equal(pruned, weight * keep)


def test_all_rows_compete(library):
    weight, scale = draw(5, 301, torch.float32)
    keep, _, _ = select(library, weight, scale, count=700, joint=True)
    scores = (weight.abs() * scale).view(1, -1)
    assert torch.equal(keep.view(1, -1), ops.row_mask(scores, 700))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8), (3, 16), (8, 32), (2, 6), (31, 64)])
def test_groups_keep_the_same_weights_as_on_the_cpu(library, n, m, dtype):
    for cols in (m, 3 * m + 1, 130):
        weight, scale = draw(3, cols, dtype)
        keep, pruned = select_nm(weight, scale, n, m)
        found_keep, found_pruned, damage = select(library, weight, scale, n=n, m=m)
        assert torch.equal(found_keep, keep)
        assert torch.equal(found_pruned, pruned)
        assert damage == [0, 0]


@pytest.mark.parametrize("pattern", [{"count": 3}, {"n": 2, "m": 4}, {"n": 2, "m": 6}])
def test_damage_is_counted(library, pattern):
    weight, scale = torch.randn(3, 12), torch.ones(12)
    weight[1, 3] = weight[2, 7] = float("nan")
    scale[5] = -1.0
    assert select(library, weight, scale, **pattern)[2] == [2, 1]


def test_impossible_sizes_are_refused(library):
    weight = torch.randn(2, 8)
    matrix = Matrix(weight.data_ptr(), None, 2, 8, 8, 0)
    chosen = Chosen(None, None, 8)
    for count in (-1, 9):
        assert (
            library.rows(ctypes.byref(matrix), ctypes.c_int64(count), False, ctypes.byref(chosen), None) == 1
        )
    for n, m in ((0, 4), (4, 4), (1, 65)):
        assert library.groups(ctypes.byref(matrix), n, m, ctypes.byref(chosen), None) == 1


def problem(rows, cols):
    """Return weights, an upper factor as of a damped Gram matrix, and scales."""
    torch.manual_seed(cols)
    weight = torch.randn(rows, cols)
    x = torch.randn(2 * cols, cols, dtype=torch.float64) + torch.randn(2 * cols, 1, dtype=torch.float64)
    inverse = torch.linalg.inv(x.T @ x / (2 * cols) + 0.1 * torch.eye(cols, dtype=torch.float64))
    upper = torch.linalg.cholesky(inverse, upper=True).float().contiguous()
    return weight, upper, (1 / upper.diagonal()).contiguous()


def sweep(library, weight, upper, scale, pattern):
    rows, cols = weight.shape
    work, keep = weight.clone(), torch.full(weight.shape, 9, dtype=torch.uint8)
    errors = torch.full((rows, 128), float("nan"))
    damage = torch.zeros(2, dtype=torch.int32)
    counts = torch.tensor(pattern.counts, dtype=torch.int64)
    task = Sweep(
        work.data_ptr(), upper.data_ptr(), scale.data_ptr(), keep.data_ptr(), rows, cols, pattern.block, pattern.joint,
        counts.data_ptr() if len(counts) else None, pattern.n, pattern.m,
    )  # fmt: skip
    done = library.sweep(
        ctypes.byref(task), ctypes.c_void_p(errors.data_ptr()), ctypes.c_void_p(damage.data_ptr())
    )
    assert done == 0
    assert damage.tolist() == [0, 0]
    return work, keep.bool()


PATTERNS = [
    (5, 70, ops.SweepPattern(70, (30,))), (9, 150, ops.SweepPattern(64, (32, 20, 0))),
    (3, 300, ops.SweepPattern(150, (75, 75))), (5, 90, ops.SweepPattern(45, (100, 112), joint=True)),
    (9, 130, ops.SweepPattern(64, n=2, m=4)), (3, 140, ops.SweepPattern(132, n=5, m=12)),
    (3, 200, ops.SweepPattern(192, n=20, m=64)),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "cols", "pattern"), PATTERNS, ids=str)
def test_the_sweep_is_the_cpu_sweep(library, rows, cols, pattern):
    weight, upper, scale = problem(rows, cols)
    found, keep = sweep(library, weight, upper, scale, pattern)
    expected, expected_keep = ops.obs_sweep(weight, upper, scale, pattern)
    assert torch.equal(keep, expected_keep)
    # Equal bits where the CPU fuses products and sums, too.
    if dict(backend.isa_levels()).get("avx512"):
        assert torch.equal(found, expected)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[~keep] == 0).all()
