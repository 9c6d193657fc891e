"""scipy.sparse.csr_array in fp32: what most people try first. It runs on one thread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysparse.formats import CsrTensor
from rivals.engine import Engine, Storage


def pack(weight: Tensor) -> Any:
    return CsrTensor.from_dense(weight.float()).to_scipy()


CSR = Storage("scipy csr", pack, lambda m: m.data.nbytes + m.indices.nbytes + m.indptr.nbytes, torch.float32)
SCIPY_CSR = Engine(
    "scipy CSR fp32", CSR, lambda matrix, x: matrix @ x,
    prepare=lambda x: (x[0].float() if len(x) == 1 else x.T.float().contiguous()).numpy(),
    finish=lambda y: torch.from_numpy(y)[None] if y.ndim == 1 else torch.from_numpy(y).T,
)  # fmt: skip
