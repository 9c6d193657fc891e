"""Sparse matrices of other libraries: NumPy by DLPack on the CPU, CuPy and torch's two-of-four tensors on a GPU."""

import numpy as np
import pytest
import torch
from scipy.sparse import random_array

from pysparse import backend
from pysparse.formats import BitmapTensor, CsrTensor
from pysparse.formats.interop import (
    check_semi_structured,
    csr_from_dlpack,
    from_cupyx,
    from_semi_structured,
    to_cupyx,
    to_semi_structured,
)

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def scipy_csr(rows=13, cols=29):
    matrix = random_array((rows, cols), density=0.3, rng=np.random.default_rng(3), dtype=np.float32).tocsr()
    matrix.sort_indices()
    return matrix


def test_arrays_come_in_by_dlpack_without_a_copy():
    matrix = scipy_csr()
    csr = csr_from_dlpack(
        matrix.indptr.astype(np.int32), matrix.indices.astype(np.int32), matrix.data, (13, 29)
    )
    assert csr.values.data_ptr() == matrix.data.ctypes.data
    assert torch.equal(csr.to_dense(), torch.from_numpy(matrix.toarray()))
    matrix.data[0] = 77
    assert csr.values[0] == 77


def test_a_matrix_of_cupys_kind_is_three_arrays_and_a_shape():
    """SciPy's matrix has the attributes of CuPy's, so the same code takes it."""
    matrix = scipy_csr()
    matrix.indices = matrix.indices.astype(np.int32)
    csr = from_cupyx(matrix)
    assert torch.equal(csr.to_dense(), torch.from_numpy(matrix.toarray()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.ones(2)}, "float vector"), ({"col_indices": np.zeros(2, np.int64)}, "indices int32"),
        ({"col_indices": np.array([1, 9], np.int32)}, r"must lie in \[0, 3\)"),
        ({"col_indices": np.array([1, 1], np.int32)}, "ascend"),
        ({"row_offsets": np.array([0, 3], np.int32)}, "ascend from 0 to 2"),
    ],
)  # fmt: skip
def test_matrices_that_are_not_sound_are_refused(change, message):
    arrays = {
        "row_offsets": np.array([0, 2], np.int32), "col_indices": np.array([0, 2], np.int32),
        "values": np.ones(2, np.float32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        csr_from_dlpack(**{**arrays, **change}, shape=(1, 3))


def test_cupy_takes_float32_on_a_gpu_only():
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        to_cupyx(CsrTensor.from_dense(torch.eye(3).bfloat16()))
    with pytest.raises(ValueError, match="the matrix is on cpu"):
        to_cupyx(CsrTensor.from_dense(torch.eye(3)))


def pairs(rows, cols, dtype=torch.bfloat16):
    weight = torch.randn(rows, cols).to(dtype)
    weight.view(rows, -1, 4)[:, :, [1, 2]] = 0
    return weight


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (pairs(32, 64).float(), r"not torch\.float32"), (pairs(16, 64), "multiples of 32 x 64, got 16 x 64"),
        (pairs(32, 96), "got 32 x 96"), (torch.ones(32, 64).bfloat16(), "more than two of some four"),
    ],
)  # fmt: skip
def test_what_two_of_four_tensors_cannot_hold_is_said(weight, message):
    with pytest.raises(ValueError, match=message):
        check_semi_structured(BitmapTensor.from_dense(weight))


@pytest.mark.parametrize("wrong", [None, torch.zeros(2, 2), [[1.0]], 3])
def test_what_is_no_matrix_of_cupys_is_said(wrong):
    with pytest.raises(ValueError, match=f"expected a CSR matrix of CuPy's, got a {type(wrong).__name__}"):
        from_cupyx(wrong)


def test_what_speaks_no_dlpack_is_said():
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="expected an array that speaks DLPack, got a list"):
        csr_from_dlpack(offsets, [0], torch.ones(1), (1, 1))
    with pytest.raises(ValueError, match="torch cannot take the array's memory"):
        csr_from_dlpack(offsets, np.array(["a"]), torch.ones(1), (1, 1))


def test_two_of_four_tensors_live_on_a_gpu():
    bitmap = BitmapTensor.from_dense(pairs(32, 64))
    check_semi_structured(bitmap)
    with pytest.raises(ValueError, match="the weight is on cpu"):
        to_semi_structured(bitmap)
    with pytest.raises(ValueError, match="got Tensor"):
        from_semi_structured(torch.zeros(2, 2))


class TestOnAGpu:
    pytestmark = needs_gpu

    def test_cupy_and_back_shares_memory(self):
        pytest.importorskip("cupy", reason="CuPy is not installed")
        csr = CsrTensor.from_dense(torch.randn(33, 70).relu().cuda())
        matrix = to_cupyx(csr)
        assert matrix.data.data.ptr == csr.values.data_ptr()
        back = from_cupyx(matrix)
        assert back.values.data_ptr() == csr.values.data_ptr()
        assert torch.equal(back.to_dense(), csr.to_dense())

    @pytest.mark.skipif(bool(backend.missing_reason()), reason="no compiled core")
    def test_two_of_four_and_back(self):
        weight = pairs(64, 128).cuda()
        tensor = to_semi_structured(BitmapTensor.from_dense(weight))
        assert torch.equal(from_semi_structured(tensor).to_dense(), weight)
        x = torch.randn(128, 64, device="cuda").bfloat16()
        exact = weight.double() @ x.double()
        assert ((tensor @ x).double() - exact).norm() < 4e-3 * exact.norm()
