"""LoSA's sparsities on a model: rates of the blocks by similarity, whole numbers of zeros in their layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pysparse.calib import Calibration
from pysparse.methods.block_features import similarity_of_inputs
from pysparse.methods.losa import block_rates, redundancy
from pysparse.pruning import BlockLayout, Evidence, Recipe, Unstructured, exact_sparsities
from pysparse.pruning.projection import weighted_mean


@dataclass(frozen=True, slots=True)
class LayerBudgets:
    """The allocation of a round: a sparsity for each layer to be pruned, in their order."""

    sparsities: tuple[float, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing: the similarity was measured before."""
        return ()

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return the sparsities, whose mean weighted by parameters is to be ``target``."""
        return list(self.sparsities)


def rates_by_similarity(
    layout: BlockLayout, calibration: Calibration, target: float, half_width: float, sequences: int
) -> list[float]:
    """Return the sparsity of each block with layers to prune; see :func:`pysparse.methods.losa.block_rates`.

    The similarity is that of the first ``sequences`` calibration sequences; no block's sparsity is more than
    ``half_width`` from ``target``, nor below what the block has already.
    """
    shares = redundancy(similarity_of_inputs(layout, calibration, sequences))
    blocks = _blocks(layout)
    sizes, before = [], []
    for block in blocks:
        layers = layout.layers_of(block)
        sizes.append(sum(layer.size for layer in layers))
        zeros = sum(layer.size - int(layer.weight.count_nonzero()) for layer in layers)
        before.append(min(zeros / sizes[-1], target))
    return block_rates([shares[block] for block in blocks], sizes, target, half_width, before)


def with_rates(
    host: Recipe, layout: BlockLayout, rates: Sequence[float], target: float
) -> tuple[Recipe, float]:
    """Return ``host`` with the blocks' ``rates``, and the mean sparsity that these come to in whole weights.

    The zeros of all layers together are exactly as many as ``host`` alone makes at ``target``
    (:func:`pysparse.pruning.exact_sparsities`), and no layer gets back a weight that it lost.

    Differs from the paper: its code rounds each layer down by itself, so that a model ends with a few zeros
    fewer than by the same host at one rate.
    """
    layers, by_block = layout.layers, dict(zip(_blocks(layout), rates, strict=True))
    wishes = [by_block[layer.block] for layer in layers]
    if isinstance(host.structure, Unstructured):
        lost = [layer.size - int(layer.weight.count_nonzero()) for layer in layers]
        wishes = exact_sparsities(layers, host.structure, wishes, target, lost)
    mean = weighted_mean(wishes, [layer.size for layer in layers])
    return dataclasses.replace(host, allocation=LayerBudgets(tuple(wishes))), mean


def _blocks(layout: BlockLayout) -> list[int]:
    return sorted({layer.block for layer in layout.layers})
