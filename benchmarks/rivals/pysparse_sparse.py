"""Our sparse kernel on the tiled bitmap."""

from __future__ import annotations

from torch import Tensor

from pysparse import ops
from pysparse.formats import BitmapTensor, TiledBitmap
from rivals.engine import Engine, Storage


def pack(weight: Tensor) -> TiledBitmap:
    return TiledBitmap.from_bitmap(BitmapTensor.from_dense(weight))


TILED_BITMAP = Storage("tiled bitmap", pack, lambda packed: packed.nbytes)
PYSPARSE_SPARSE = Engine("pysparse sparse", TILED_BITMAP, lambda packed, x: ops.bitmap_linear(x, packed))
