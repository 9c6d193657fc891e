"""Floor 4: layers that hold packed weights, and the conversions of a whole model."""

from pysparse.nn.compact import CompactLinear
from pysparse.nn.convert import ConversionReport, densify_, sparsify_
from pysparse.nn.dense import DenseLinear
from pysparse.nn.embedding import SparseEmbedding, SparseEmbeddingBag
from pysparse.nn.fused import FusionReport, fuse_, unfuse_
from pysparse.nn.linear import SparseLinear
from pysparse.nn.lowrank import Adapter, MaskedLowRank
from pysparse.nn.norm import fuse_norms_, unfuse_norms_
from pysparse.nn.packing import Packing
from pysparse.nn.rotary import fuse_rotary_, unfuse_rotary_

__all__ = [
    "Adapter",
    "CompactLinear",
    "ConversionReport",
    "DenseLinear",
    "FusionReport",
    "MaskedLowRank",
    "Packing",
    "SparseEmbedding",
    "SparseEmbeddingBag",
    "SparseLinear",
    "densify_",
    "fuse_",
    "fuse_norms_",
    "fuse_rotary_",
    "sparsify_",
    "unfuse_",
    "unfuse_norms_",
    "unfuse_rotary_",
]
