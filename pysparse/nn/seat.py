"""What a layer knows of the group that it is computed in: its seat there, and whom to ask."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from torch import Tensor


class Group(Protocol):
    """Layers that are computed together where that is right, each by its *seat*: see :func:`pysparse.nn.fuse_`."""

    stacked: bool  # the layers hold views of the group's arrays, and it is asked under torch.compile, too

    def linear(self, seat: int, layer: Any, x: Tensor) -> Tensor:
        """Return ``layer(x)``."""
        ...

    def forget(self) -> None:
        """Let go of what was made of the layers' weights: one of them is about to change."""
        ...

    def describe(self, seat: int) -> str:
        """Tell with whom the layer at ``seat`` is computed; "" for nobody."""
        ...


Seat: TypeAlias = tuple[Group, int]
