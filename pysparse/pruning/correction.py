"""What a mask shifts, put back in closed form: the spread and mean of a row's weights, the mean of its outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.pruning.recipe import Importance, MaskStructure, Pruned, Stats

_TINY = 1e-9  # added to a standard deviation before it divides


@dataclass(frozen=True, slots=True)
class Correct:
    """Masks once by score and then corrects the survivors (``weight``) and the bias (``bias``), as POT does.

    Weight correction, per output channel c: scale = std(W_c) / (std(W_c * M_c) + 1e-9) and shift = mean(W_c) -
    mean(scale * W_c * M_c), deviations unbiased over all entries, zeros included; survivors become scale * w +
    shift. As in the released code (PTSBench) the mask hits the shift too, so a mean is restored by the factor of
    the density only.

    Bias correction: b <- b + (W - W_sparse) E[x]; the mean output of every channel on the calibration data is
    then the dense layer's. Only layers that have a bias are corrected (a convolution before batch normalisation
    has one once that is folded, see :func:`pysparse.pruning.batchnorm.fold_batch_norm_`).
    """

    weight: bool = True
    bias: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """The mean input, for the bias."""
        return ("mean",) if self.bias else ()

    def solve(
        self, weight: Tensor, stats: Stats, importance: Importance, structure: MaskStructure, sparsity: float
    ) -> Pruned:
        """Prune ``weight`` [out_features, in_features] and correct it; the result says how the bias moves."""
        keep = structure.keep(importance(weight, stats), sparsity)
        sparse = weight.masked_fill(~keep, 0)
        if self.weight:
            sparse = corrected_weight(weight, sparse, keep)
        shift = (weight.double() - sparse.double()) @ stats["mean"].double() if self.bias else None
        return Pruned(sparse, keep, bias_shift=shift)


def corrected_weight(dense: Tensor, sparse: Tensor, keep: Tensor) -> Tensor:
    """Return ``sparse`` [R, C] with each row's deviation and mean corrected towards ``dense``, in its dtype.

    Rows that keep nothing, and single columns, which have no deviation, come back unchanged.
    """
    if dense.shape[1] < 2:
        return sparse
    wide, masked = dense.float(), sparse.float() * keep
    scale = wide.std(dim=1, keepdim=True) / (masked.std(dim=1, keepdim=True) + _TINY)
    shift = wide.mean(dim=1, keepdim=True) - (scale * masked).mean(dim=1, keepdim=True)
    empty = ~keep.any(dim=1, keepdim=True)
    result = torch.where(empty, masked, scale * masked + shift) * keep
    return result.to(sparse.dtype)
