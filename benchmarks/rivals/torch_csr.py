"""torch.sparse_csr in fp32, which MKL multiplies; with 32-bit indices, the smaller and faster kind."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pysparse.formats import CsrTensor
from rivals.engine import Engine, Storage


def pack(weight: Tensor) -> Tensor:
    csr = CsrTensor.from_dense(weight.float())
    arrays = csr.row_offsets.int(), csr.col_indices, csr.values
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*arrays, size=csr.shape, check_invariants=True)


def nbytes(matrix: Tensor) -> int:
    return matrix.crow_indices().nbytes + matrix.col_indices().nbytes + matrix.values().nbytes


CSR = Storage("torch csr", pack, nbytes, torch.float32)
TORCH_CSR = Engine(
    "torch CSR fp32", CSR, lambda matrix, x: matrix @ x,
    prepare=lambda x: x[0].float() if len(x) == 1 else x.T.float().contiguous(),  # [in] or [in, tokens]
    finish=lambda y: y[None] if y.dim() == 1 else y.T,
)  # fmt: skip
