"""Sparse matrices of other libraries on the same memory: CuPy's CSR, DLPack arrays, torch's 2:4 tensors."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pysparse.formats.bitmap import BitmapTensor
from pysparse.formats.csr import CsrTensor
from pysparse.formats.device import keeps_pairs

_LIMIT = 2**31  # CuPy's indices are int32
# Rows and columns that torch's kernels for two of four want multiples of, by dtype.
_TILES = {torch.bfloat16: (32, 64), torch.float16: (32, 64)}


def csr_from_dlpack(row_offsets: Any, col_indices: Any, values: Any, shape: tuple[int, int]) -> CsrTensor:
    """Take a CSR matrix as three arrays of any library that speaks DLPack, on any device.

    int32 ``col_indices`` and ``values`` (float32 | bfloat16 | float16) share their memory; int32 ``row_offsets`` are
    widened, which copies R + 1 numbers. ValueError for other types, arrays on different devices, and a matrix that
    :meth:`CsrTensor.validate` refuses (unsorted or repeated columns, indices outside).
    """
    offsets, indices, data = (_taken(array) for array in (row_offsets, col_indices, values))
    if indices.dtype != torch.int32 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets are int32 or int64, indices int32; got {offsets.dtype} and {indices.dtype}"
        )
    devices = {str(tensor.device) for tensor in (offsets, indices, data)}
    if len(devices) > 1:
        raise ValueError(f"the arrays of a matrix must be on one device, got {sorted(devices)}")
    result = CsrTensor(offsets.long(), indices, data, (int(shape[0]), int(shape[1])))
    result.validate()
    return result


def _taken(array: Any) -> Tensor:
    if not hasattr(array, "__dlpack__"):
        raise ValueError(f"expected an array that speaks DLPack, got a {type(array).__name__}")
    try:
        return from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:  # a dtype or a device that torch does not know
        raise ValueError(f"torch cannot take the array's memory: {error}") from error


def from_cupyx(matrix: Any) -> CsrTensor:
    """Take a ``cupyx.scipy.sparse.csr_matrix`` of float32 without copying values or columns.

    Raises as :func:`csr_from_dlpack`; for float64 or complex values, convert first: rounding would need a copy.
    """
    missing = [name for name in ("indptr", "indices", "data", "shape") if not hasattr(matrix, name)]
    if missing or not hasattr(matrix.indptr, "__dlpack__"):
        raise ValueError(f"expected a CSR matrix of CuPy's, got a {type(matrix).__name__}")
    return csr_from_dlpack(matrix.indptr, matrix.indices, matrix.data, matrix.shape)


def to_cupyx(csr: CsrTensor) -> Any:
    """Return a ``cupyx.scipy.sparse.csr_matrix`` that shares values and columns with ``csr``, on its CUDA device.

    ValueError for values that are not float32 (CuPy's matrices know no 16-bit types), for 2^31 values and more, and
    for a matrix on the CPU (use :meth:`CsrTensor.to_scipy`); ImportError without CuPy.
    """
    if csr.values.dtype != torch.float32:
        raise ValueError(f"CuPy's sparse matrices hold float32 or float64, not {csr.values.dtype}")
    if csr.nnz >= _LIMIT:
        raise ValueError(f"CuPy's offsets are int32: {csr.nnz} values do not fit")
    if not csr.values.is_cuda:
        raise ValueError(f"the matrix is on {csr.values.device}; to_cupyx needs one on a CUDA device")
    try:
        cupy, sparse = import_module("cupy"), import_module("cupyx.scipy.sparse")
    except ImportError as error:
        raise ImportError(f"CuPy is not installed ({error}): pip install 'pysparse[cupy]'") from error
    arrays = (csr.values.detach(), csr.col_indices, csr.row_offsets.to(torch.int32))
    with cupy.cuda.Device(csr.values.device.index):
        return sparse.csr_matrix(tuple(cupy.from_dlpack(x) for x in arrays), shape=csr.shape)


def check_semi_structured(bitmap: BitmapTensor) -> None:
    """Raise ValueError, saying what does not fit, unless torch's two-of-four tensors can hold ``bitmap``."""
    dtype, (rows, cols) = bitmap.values.dtype, bitmap.shape
    if dtype not in _TILES:
        raise ValueError(f"torch's two-of-four tensors take bfloat16 or float16 here, not {dtype}")
    by_row, by_col = _TILES[dtype]
    if rows % by_row or cols % by_col or not rows or not cols:
        raise ValueError(
            f"torch's two-of-four tensors want multiples of {by_row} x {by_col}, got {rows} x {cols}"
        )
    if not keeps_pairs(bitmap):
        raise ValueError("the weight keeps more than two of some four columns")


def to_semi_structured(bitmap: BitmapTensor) -> Tensor:
    """Return a ``torch.sparse.SparseSemiStructuredTensor`` of the same weight, on its CUDA device.

    For torch's and cuSPARSELt's products with many tokens. ValueError as :func:`check_semi_structured`, and for a
    weight that is not on a CUDA device.
    """
    check_semi_structured(bitmap)
    if not bitmap.values.is_cuda:
        raise ValueError(
            f"torch's two-of-four tensors live on CUDA devices, the weight is on {bitmap.device}"
        )
    result: Tensor = torch.sparse.to_sparse_semi_structured(bitmap.to_dense())
    return result


def from_semi_structured(weight: Tensor) -> BitmapTensor:
    """Take a ``torch.sparse.SparseSemiStructuredTensor``; what it stores as zero is pruned.

    ValueError for any other tensor.
    """
    if not isinstance(weight, torch.sparse.SparseSemiStructuredTensor):
        raise ValueError(f"expected a SparseSemiStructuredTensor, got {type(weight).__name__}")
    return BitmapTensor.from_dense(weight.to_dense())
