"""Our dense kernel: what sparsity is worth once the dense product itself runs at the memory's speed."""

from __future__ import annotations

from pysparse import ops
from rivals.engine import Engine
from rivals.torch_dense import DENSE

PYSPARSE_DENSE = Engine("pysparse dense", DENSE, lambda weight, x: ops.dense_linear(x, weight))
