"""Our n:m weights with compact indices, bf16 and int8: one engine for each pattern."""

from __future__ import annotations

from pysparse import ops
from pysparse.formats import NMInt8, NMTensor
from rivals.engine import Engine, Storage


def nm_engines(n: int, m: int) -> tuple[Engine, Engine]:
    """Return the engines of one pattern; they refuse a weight that does not follow it."""
    floats = Storage(f"{n}:{m}", lambda weight: NMTensor.from_dense(weight, n, m), lambda one: one.nbytes)
    int8 = Storage(f"{n}:{m} int8", lambda weight: NMInt8.from_dense(weight, n, m), lambda one: one.nbytes)
    return (
        Engine("pysparse n:m", floats, lambda packed, x: ops.nm_linear(x, packed)),
        Engine("pysparse n:m int8", int8, lambda packed, x: ops.nm_int8_linear(x, packed)),
    )
