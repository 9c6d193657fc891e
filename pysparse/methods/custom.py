"""An allocation that is the caller's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pysparse.pruning import Evidence


@dataclass(frozen=True, slots=True)
class Custom:
    """Calls ``function(layers, target)`` for one sparsity a layer.

    ``layers`` are :class:`pysparse.pruning.Evidence`: ``layer.path``, ``layer.block``, ``layer.shape``,
    ``layer.weight``, and the statistics that ``needs`` names. The mean weighted by ``layer.size`` must be the
    target to 1e-6; :func:`pysparse.pruning.project` makes it so. Cannot be saved as YAML.
    """

    function: Callable[[Sequence[Evidence], float], Sequence[float]]
    needs: tuple[str, ...] = ()

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return what the function returns, as floats."""
        return [float(value) for value in self.function(layers, target)]
