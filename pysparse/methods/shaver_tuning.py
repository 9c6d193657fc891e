"""What may follow Shaver's cut: training under the frozen mask and codebook, and fewer bits for the values."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pysparse.calib.clicks import Clicks
from pysparse.methods.ctr_training import CtrScore, CtrTraining, Report, train_ctr
from pysparse.methods.shaver import EntryScores, pack_embedding
from pysparse.nn import SparseEmbedding
from pysparse.nn.ctr import CtrModel

_BITS = (4, 8, 16)


class MaskedEmbedding(nn.Module):
    """A dense table of which only the kept entries are read and trained; the others are the base's."""

    keep: Tensor
    base: Tensor
    field_of: Tensor

    def __init__(self, weight: Tensor, keep: Tensor, scores: EntryScores) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        sizes = torch.tensor(scores.field_sizes)
        self.register_buffer("keep", keep)
        self.register_buffer("base", torch.from_numpy(scores.base))
        self.register_buffer("field_of", torch.repeat_interleave(torch.arange(len(sizes)), sizes))

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., dims] for ids [...]."""
        rows = ids.long()
        kept = nn.functional.embedding(rows, self.weight)
        return torch.where(self.keep[rows], kept, self.base[self.field_of[rows]])


def fine_tune(
    model: CtrModel, scores: EntryScores, sparsity: float, train: Clicks, valid: Clicks,
    training: CtrTraining | None = None, report: Report | None = None,
) -> tuple[CtrModel, CtrScore]:  # fmt: skip
    """Train kept entries and head with mask and codebook frozen; return the packed model and its validation score.

    ``model`` is not changed. The defaults of ``training`` follow the paper's retraining: a tenth of the dense
    learning rate, at most 15 epochs, one without a better AUC ends it.
    """
    keep = scores.keep(sparsity)
    tuned = copy.deepcopy(model)
    masked = MaskedEmbedding(model.table, keep, scores)
    tuned.embedding = masked
    score = train_ctr(tuned, train, valid, training or CtrTraining(learning_rate=1e-4), report)
    dense = nn.Embedding.from_pretrained(masked.weight.detach(), freeze=False)
    tuned.embedding = dense
    return pack_embedding(tuned, keep, scores.base, scores.field_sizes), score


@dataclass(frozen=True, slots=True, eq=False)
class AffineValues:
    """Values on an even grid of 2^bits steps between the smallest and the largest one."""

    codes: NDArray[Any]  # uint8 or uint16 [nnz]; two 4-bit codes a byte, the first in the low half
    scale: float
    zero_point: float
    bits: int
    count: int

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ValueError(f"bits is one of {_BITS}, got {self.bits}")

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and zero point."""
        return self.codes.nbytes + 16

    def values(self) -> NDArray[np.float32]:
        """Return (code - zero_point) * scale, float32 [nnz]."""
        codes = self.codes
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=1).ravel()[: self.count]
        return ((codes.astype(np.float64) - self.zero_point) * self.scale).astype(np.float32)


def affine_values(values: NDArray[np.float32], bits: int) -> AffineValues:
    """Round ``values`` to 4, 8 or 16 bits by one scale and zero point a table: at most one step from where they were.

    Raises ValueError for other bits and for values that are not finite.
    """
    if bits not in _BITS:
        raise ValueError(f"bits is one of {_BITS}, got {bits}")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} values are not finite")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    top = 2**bits - 1
    scale = (high - low) / top if high > low else (abs(low) or 1.0)
    zero_point = float(np.trunc(-low / scale))
    codes = np.clip(np.rint(values.astype(np.float64) / scale + zero_point), 0, top)
    packed = codes.astype(np.uint16 if bits == 16 else np.uint8)
    if bits == 4:
        pairs = np.pad(packed, (0, packed.size % 2)).reshape(-1, 2)
        packed = pairs[:, 0] | (pairs[:, 1] << 4)
    return AffineValues(packed, scale, zero_point, bits, values.size)


def quantise_embedding(model: CtrModel, bits: int) -> tuple[CtrModel, AffineValues]:
    """Return a copy of a packed model whose kept values are those of ``bits`` bits, and the codes."""
    if not isinstance(model.embedding, SparseEmbedding):
        raise TypeError(f"only a packed table is quantised, got {type(model.embedding).__name__}")
    table = model.embedding.table
    codes = affine_values(table.values.float().cpu().numpy(), bits)
    result = copy.deepcopy(model)
    rounded = torch.from_numpy(codes.values()).to(table.values)
    result.embedding = SparseEmbedding(
        type(table)(rounded, table.bitmask, table.codebook, table.field_rows, table.dims)
    )
    return result, codes
