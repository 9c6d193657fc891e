"""Erdos-Renyi(-Kernel) densities (Mocanu et al. 2018, SET; Evci et al. 2020, RigL): thin layers keep more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pysparse.pruning import Evidence
from pysparse.pruning.layout import PrunableLayer


@dataclass(frozen=True, slots=True)
class ErdosRenyi:
    """Density of layer l = eps * (sum of the dimensions of W_l / their product) ** power, eps set by the budget.

    With ``kernel`` the dimensions of a convolution count its kernel (ERK), else only the channels (ER). A layer
    whose density would pass 1 stays dense, the densest first, and the others make up for it.
    """

    kernel: bool = True
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.power <= 10.0:
            raise ValueError(f"power is an exponent between 0 (uniform) and 10, got {self.power!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing: shapes alone decide."""
        return ()

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return one sparsity a layer; their mean weighted by parameters is ``target``.

        Raises ValueError when layers that must stay dense leave no room for the target.
        """
        raw = [self._raw(evidence.layer) for evidence in layers]
        sizes = [evidence.layer.size for evidence in layers]
        kept = (1.0 - target) * sum(sizes)
        dense: set[int] = set()
        while True:
            active = [i for i in range(len(layers)) if i not in dense]
            room = kept - sum(sizes[i] for i in dense)
            if not active or (target > 0 and room <= 0):
                raise ValueError(
                    f"ErdosRenyi keeps {len(dense)} of {len(layers)} layers dense, which leaves no room for "
                    f"sparsity {target:g}: use a smaller power"
                )
            eps = room / math.fsum(raw[i] * sizes[i] for i in active)
            densest = max(raw[i] for i in active)
            if eps * densest <= 1.0 + 1e-12:
                return [0.0 if i in dense else max(0.0, 1.0 - eps * raw[i]) for i in range(len(layers))]
            dense |= {i for i in active if raw[i] == densest}

    def _raw(self, layer: PrunableLayer) -> float:
        shape = tuple(layer.stored.shape) if self.kernel else tuple(layer.stored.shape)[:2]
        return float((sum(shape) / math.prod(shape)) ** self.power)
