"""In which order a block calls its layers, and which of them on the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pysparse.calib.collector import Watched
from pysparse.calib.inputs import is_fused_experts


class CallOrder:
    """Watches the first call of each layer: what is given one and the same tensor in a row is one group.

    Query, key and value are a group, gate and up another. The first matrices of fused experts are one group,
    their second ones the next.
    """

    def __init__(self, layers: Mapping[str, Watched]) -> None:
        self._layers = layers
        self._groups: list[list[str]] = []
        self._last: tuple[Tensor | None, int] = (None, -1)  # input of the last group, and its version

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the layers for the duration of the block."""
        paths: dict[nn.Module, list[str]] = {}
        for path, layer in self._layers.items():
            paths.setdefault(layer.module, []).append(path)
        handles = [
            module.register_forward_pre_hook(self._hook(names), with_kwargs=True)
            for module, names in paths.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = (None, -1)

    def _hook(self, paths: list[str]) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(path in group for group in self._groups for path in paths):
                return
            if is_fused_experts(module):
                names = [self._layers[path].slots[0][0] for path in paths]
                for name in dict.fromkeys(names):
                    self._groups.append([path for path, one in zip(paths, names, strict=True) if one == name])
                self._last = (None, -1)
                return
            source: Tensor = args[0] if args else next(iter(kwargs.values()))
            if self._groups and self._last[0] is source and self._last[1] == source._version:
                self._groups[-1] += paths
            else:
                self._groups.append(list(paths))
                self._last = (source, source._version)

        return note

    def groups(self) -> list[list[str]]:
        """Return the paths by group in the order of their calls; layers that were not called come last, together."""
        called = {path for group in self._groups for path in group}
        rest = [path for path in self._layers if path not in called]
        return [*self._groups, *([rest] if rest else [])]
