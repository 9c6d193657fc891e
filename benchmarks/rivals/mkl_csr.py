"""MKL's sparse BLAS called directly, with the inspector's optimisation that torch leaves out: CSR in fp32."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ENGINES = {"MKL CSR fp32": "fp32"}
PACKAGES = ("mkl",)
ERROR_BOUND = {"fp32": 1e-4}
NON_TRANSPOSE, COLUMN_MAJOR, ROW_MAJOR, GENERAL = 10, 102, 101, 20  # of mkl_spblas.h


class MatrixDescription(ctypes.Structure):
    """struct matrix_descr: type, and mode and diagonal that a general matrix does not use."""

    _fields_ = (("type", ctypes.c_int), ("mode", ctypes.c_int), ("diagonal", ctypes.c_int))


@cache
def library() -> Any:
    found = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    if not found:
        raise ImportError(f"no libmkl_rt under {sys.prefix}/lib: pip install mkl")
    return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)


def load() -> None:
    """Raise ImportError with the reason when it cannot run here."""
    library()


def check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} failed with sparse_status_t {status}")


def create(weight: np.ndarray) -> tuple[ctypes.c_void_p, tuple[np.ndarray, ...]]:
    """Return MKL's handle of a CSR matrix with 32-bit indices, and the arrays that it points to."""
    rows, cols = np.nonzero(weight)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(weight)))]).astype(np.int32)
    arrays = offsets, cols.astype(np.int32), np.ascontiguousarray(weight[rows, cols], dtype=np.float32)
    handle, ends = ctypes.c_void_p(), ctypes.c_void_p(offsets.ctypes.data + offsets.itemsize)
    shape = map(ctypes.c_int, weight.shape)
    status = library().mkl_sparse_s_create_csr(
        ctypes.byref(handle), 0, *shape, offsets.ctypes, ends, arrays[1].ctypes, arrays[2].ctypes
    )
    check(status, "mkl_sparse_s_create_csr")
    return handle, arrays


def build(
    variant: str, weight: np.ndarray, x: np.ndarray, threads: int
) -> tuple[Callable[[], np.ndarray], int]:
    mkl, general = library(), MatrixDescription(GENERAL)
    mkl.MKL_Set_Num_Threads(threads)
    handle, arrays = create(weight)
    one, zero, tokens, out = ctypes.c_float(1), ctypes.c_float(0), len(x), len(weight)
    entry, y = np.ascontiguousarray(x.T), np.zeros((out, tokens), dtype=np.float32)  # [in, tokens]
    often = ctypes.c_int(1000)
    if tokens == 1:
        check(mkl.mkl_sparse_set_mv_hint(handle, NON_TRANSPOSE, general, often), "mkl_sparse_set_mv_hint")
    else:
        hint = mkl.mkl_sparse_set_mm_hint(
            handle, NON_TRANSPOSE, general, ROW_MAJOR, ctypes.c_int(tokens), often
        )
        check(hint, "mkl_sparse_set_mm_hint")
    check(mkl.mkl_sparse_optimize(handle), "mkl_sparse_optimize")

    def call() -> np.ndarray:
        if tokens == 1:
            status = mkl.mkl_sparse_s_mv(NON_TRANSPOSE, one, handle, general, entry.ctypes, zero, y.ctypes)
        else:
            status = mkl.mkl_sparse_s_mm(
                NON_TRANSPOSE, one, handle, general, ROW_MAJOR, entry.ctypes, tokens, tokens, zero, y.ctypes, tokens
            )  # fmt: skip
        check(status, "mkl_sparse_s_mv or mm")
        return y.T

    return call, sum(array.nbytes for array in arrays)
