"""Floor 2: immutable containers for sparse matrices; pack, unpack, validate, no arithmetic."""

from pysparse.formats.bitmap import BitmapTensor
from pysparse.formats.csr import CsrTensor
from pysparse.formats.device import PACKINGS, DeltaRows, FragmentBitmap, NMRows, PairBlocks
from pysparse.formats.embedding import EmbeddingTable
from pysparse.formats.grid import Int8Grid
from pysparse.formats.int8 import Int8Bitmap, TiledInt8
from pysparse.formats.nm import NMInt8, NMTensor
from pysparse.formats.pairs import ColumnPairs
from pysparse.formats.stripe import BlockIndex, StripeIndex
from pysparse.formats.tiled import TiledBitmap

FORMATS: dict[str, type[BitmapTensor] | type[CsrTensor]] = {
    "bitmap": BitmapTensor,
    "csr": CsrTensor,
}

__all__ = [
    "FORMATS",
    "PACKINGS",
    "BitmapTensor",
    "BlockIndex",
    "ColumnPairs",
    "CsrTensor",
    "DeltaRows",
    "EmbeddingTable",
    "FragmentBitmap",
    "Int8Bitmap",
    "Int8Grid",
    "NMInt8",
    "NMRows",
    "NMTensor",
    "PairBlocks",
    "StripeIndex",
    "TiledBitmap",
    "TiledInt8",
]
