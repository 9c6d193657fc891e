"""Our kernel for many tokens, on pair blocks."""

from __future__ import annotations

from torch import Tensor

from pysparse import ops
from pysparse.formats import ColumnPairs
from rivals import pysparse_sparse
from rivals.engine import Engine, Storage


def pack(weight: Tensor) -> ColumnPairs:
    return ColumnPairs.from_tiled(pysparse_sparse.pack(weight))


PAIRS = Storage("pair blocks", pack, lambda packed: packed.nbytes)
PYSPARSE_PAIRS = Engine("pysparse pairs", PAIRS, lambda packed, x: ops.pairs_linear(x, packed))
