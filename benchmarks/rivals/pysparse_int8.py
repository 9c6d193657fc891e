"""Our int8 weights under a bitmap, with tokens quantised to one and to two bytes a value."""

from __future__ import annotations

from torch import Tensor

from pysparse import ops
from pysparse.formats import Int8Bitmap, TiledInt8
from rivals.engine import Engine, Storage

GROUP = 128


def pack(weight: Tensor, group_size: int | None = None) -> TiledInt8:
    return TiledInt8.from_int8(Int8Bitmap.from_dense(weight, group_size=group_size))


INT8 = Storage("tiled int8", pack, lambda packed: packed.nbytes)
INT8_GROUPS = Storage("tiled int8 g128", lambda weight: pack(weight, GROUP), lambda packed: packed.nbytes)
PYSPARSE_INT8 = Engine("pysparse int8", INT8, lambda packed, x: ops.int8_linear(x, packed))
PYSPARSE_INT8_A16 = Engine(
    "pysparse int8, 16-bit tokens", INT8, lambda packed, x: ops.int8_linear(x, packed, None, 16)
)
PYSPARSE_INT8_G128 = Engine("pysparse int8 g128", INT8_GROUPS, lambda packed, x: ops.int8_linear(x, packed))
