"""The CUDA embedding kernels' own source on host threads (cuda_shim/shim.h), against the CPU's, bit for bit."""

import ctypes
import shutil

import pytest
import torch
from cuda_host_library import BOOL, INT, LONG, POINTER, build, check_sizes, structure

from pysparse import backend
from pysparse.formats.embedding import EmbeddingTable
from pysparse.ops import embedding as ops

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]
Table = structure(
    values=POINTER, records=POINTER, codebook=POINTER, field_rows=POINTER, dims=INT, fields=INT, entry=INT
)
Ids = structure(values=POINTER, count=LONG, columns=INT)
Bags = structure(offsets=POINTER, weights=POINTER, count=LONG, mean=BOOL)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = list(CODES)
SIZES = [5, 0, 12, 4]  # rows of the fields; one has none


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = build(tmp_path_factory.mktemp("embedding"), "embedding", ("entry.cuh",))
    check_sizes(found, Table, Ids, Bags)
    return found


class Case:
    """A random table, its arrays as the kernels take them, and the plain-torch rows that it stands for."""

    def __init__(self, dims, dtype, sizes=SIZES):
        torch.manual_seed(dims)
        weight = torch.randn(sum(sizes), dims).to(dtype)
        keep = torch.rand(weight.shape) < 0.4
        keep[1], keep[2] = True, False
        codebook = torch.randn(len(sizes), dims).to(dtype)
        table = EmbeddingTable.from_dense(weight, keep, field_sizes=sizes, codebook=codebook)
        self.arrays = (
            table.values, ops.pack_records(table.bitmask, dims), table.codebook.contiguous(), table.field_rows
        )  # fmt: skip
        self.dense, self.field_rows, self.dims = table.to_dense(), table.field_rows, dims
        self.view = Table(*(x.data_ptr() for x in self.arrays), dims, len(sizes), CODES[dtype])

    def empty(self, rows):
        return torch.full((rows, self.dims), 7.0).to(self.dense.dtype)


def look_up(library, case, ids, columns=0):
    out = case.empty(ids.numel())
    where = Ids(ids.data_ptr(), ids.numel(), columns)
    assert library.look_up(ctypes.byref(case.view), ctypes.byref(where), ctypes.c_void_p(out.data_ptr())) == 0
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [1, 7, 8, 13, 16, 33, 70, 256])
def test_rows_are_exact(library, dims, dtype):
    case = Case(dims, dtype)
    ids = torch.randint(0, sum(SIZES), (37,))
    assert torch.equal(look_up(library, case, ids), case.dense[ids])


def test_ids_by_field(library):
    case = Case(16, torch.bfloat16, [3, 9, 1])
    ids = torch.stack([torch.randint(0, size, (11,)) for size in (3, 9, 1)], dim=1)
    expected = case.dense[(ids + case.field_rows[:-1]).flatten()]
    assert torch.equal(look_up(library, case, ids, columns=3), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_id_outside_reads_nothing(library, dtype):
    case = Case(9, dtype)
    ids = torch.tensor([3, -1, sum(SIZES), 1 << 40, 5])
    out = look_up(library, case, ids)
    assert out[[1, 2, 3]].isnan().all()
    assert torch.equal(out[[0, 4]], case.dense[[3, 5]])


def bags_of(library, case, ids, offsets, weights, mean):
    out = case.empty(offsets.numel() - 1)
    where = Ids(ids.data_ptr(), ids.numel(), 0)
    bags = Bags(
        offsets.data_ptr(), None if weights is None else weights.data_ptr(), offsets.numel() - 1, mean
    )
    pointers = (ctypes.byref(case.view), ctypes.byref(where), ctypes.byref(bags))
    assert library.add_bags(*pointers, ctypes.c_void_p(out.data_ptr())) == 0
    return out


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dims", [5, 16, 40])
def test_bags_have_the_bits_of_the_cpu(library, dims, weighted, mean):
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(dims, dtype)
        ids = torch.randint(0, sum(SIZES), (60,))
        offsets = torch.tensor([0, 0, 1, 20, 20, 33, 60])
        weights = torch.randn(60) if weighted else None
        expected = ops.sparse_embedding_bag(ids, offsets, weights, mean, *padded(case), 0)
        assert torch.equal(bags_of(library, case, ids, offsets, weights, mean), expected)


def padded(case):
    values = torch.cat([case.arrays[0], case.arrays[0].new_zeros(32)])
    return values, *case.arrays[1:]


def test_bags_of_float16_are_rounded_once(library):
    case = Case(16, torch.float16)
    ids, offsets = torch.randint(0, sum(SIZES), (9,)), torch.tensor([0, 4, 9])
    exact = torch.stack([case.dense[ids[:4]].double().sum(0), case.dense[ids[4:]].double().sum(0)])
    # Nine float32 sums before one rounding to half.
    assert (bags_of(library, case, ids, offsets, None, False).double() - exact).abs().max() <= 2**-10 * max(
        1.0, float(exact.abs().max())
    )


def test_a_bag_with_an_id_outside_is_nan(library):
    case = Case(8, torch.float32)
    ids, offsets = torch.tensor([1, 2, 99, 3]), torch.tensor([0, 2, 4])
    out = bags_of(library, case, ids, offsets, None, False)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize(
    ("ids", "offsets", "faults"),
    [
        ([1, 2, 3], [0, 3], (-1, -1)), ([1, -5, 99], [0, 2], (1, -1)), ([1, 1, 1], [0, 2, 1, 3], (-1, 1)),
        ([1], [0, 2], (-1, 0)),
    ],
)  # fmt: skip
def test_the_first_fault_is_found(library, ids, offsets, faults):
    case = Case(8, torch.float32)
    ids, offsets = torch.tensor(ids), torch.tensor(offsets)
    found = torch.full((2,), -1, dtype=torch.int64)
    where, bags = Ids(ids.data_ptr(), ids.numel(), 0), Bags(offsets.data_ptr(), None, len(offsets) - 1, False)
    pointers = [ctypes.byref(x) for x in (case.view, where, bags)]
    assert library.check(*pointers, ctypes.c_void_p(found.data_ptr())) == 0
    assert tuple(found.tolist()) == faults
