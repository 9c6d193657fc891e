"""Statistics of the inputs of weight matrices, gathered by hooks during forward passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.calib.inputs import WEIGHT, Slot, input_rows
from pysparse.calib.ranks import ALONE, Ranks, exchange_order
from pysparse.calib.statistics import STATISTICS, Statistic

Key = tuple[str, Slot]  # a watched layer, and which of its matrices


@dataclass(frozen=True, slots=True)
class Watched:
    """A layer whose inputs are collected."""

    module: nn.Module
    in_features: int
    device: torch.device  # where its sums are kept
    slots: tuple[Slot, ...] = (WEIGHT,)  # the matrices of the module that are meant
    routed: bool = False  # an expert, which sees some of the tokens


@dataclass(slots=True, eq=False)
class _Sums:
    """The statistics of matrices that have seen the same rows so far."""

    statistics: dict[str, Statistic]
    members: set[Key]
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return min((one.tokens for one in self.statistics.values()), default=0)


@dataclass(slots=True, eq=False)
class Measured:
    """What some rows contribute to the sums of the matrices that saw them."""

    keys: list[Key]
    parts: dict[str, Tensor]  # by statistic
    tokens: int
    source: Tensor | None = None
    version: int = -1

    def is_of(self, source: Tensor | None, key: Key) -> bool:
        """Tell whether ``key`` sees these very rows now, for the first time."""
        return (
            source is not None
            and source is self.source
            and source._version == self.version
            and key not in self.keys
        )


class Collector:
    """The statistics ``needs`` of some layers, by path, from every forward pass inside :meth:`watching`.

    Matrices that are always given the same tensor (query, key and value; gate and up) are measured once and
    share one sum, and :meth:`values` gives them one and the same tensor: what is derived from it may be
    cached by identity. A matrix that sees other rows than its companions parts from them at that moment.

    Of several ``ranks`` each measures its own batches. After each batch (:meth:`finish_batch`) every rank adds
    what all of them measured, in the order of the batches: the sums are those of a single process bit by bit.
    """

    def __init__(self, layers: Mapping[str, Watched], needs: Sequence[str], ranks: Ranks = ALONE) -> None:
        self._layers = layers
        self._needs = tuple(needs)
        self._ranks = ranks
        self._kept: list[Measured] = []  # of this batch, for the other ranks
        self._sums: dict[Key, _Sums] = {}  # of matrices that have seen something
        self._pending: Measured | None = None  # the last input, whose company is not complete yet

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the layers for the duration of the block."""
        wanted: dict[nn.Module, dict[Slot, Key]] = {}
        for path, layer in self._layers.items():
            wanted.setdefault(layer.module, {}).update({slot: (path, slot) for slot in layer.slots})
        handles = [
            module.register_forward_pre_hook(self._hook(keys), with_kwargs=True)
            for module, keys in wanted.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._settle()

    def _hook(self, keys: Mapping[Slot, Key]) -> Callable[..., None]:
        def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for one in input_rows(module, args, kwargs):
                if one.slot in keys:
                    self._see(keys[one.slot], one.rows, one.source)

        return collect

    def _see(self, key: Key, rows: Tensor, source: Tensor | None) -> None:
        if self._pending is not None and self._pending.is_of(source, key):
            self._pending.keys.append(key)
            return
        self._settle()
        parts = {name: self._new(name, key).measure(rows) for name in self._needs}
        version = -1 if source is None else source._version
        self._pending = Measured([key], parts, len(rows), source, version)

    def _settle(self) -> None:
        """Add what was held back for further matrices with the same input, or keep it for the other ranks."""
        if self._pending is None:
            return
        self._pending.source = None
        if self._ranks.count > 1:
            self._kept.append(self._pending)
        else:
            self._add(self._pending.keys, self._pending.parts, self._pending.tokens)
        self._pending = None

    def finish_batch(self) -> None:
        """Say that a batch, or with several ranks one batch of each, has passed; all ranks call this together."""
        self._settle()
        if self._ranks.count == 1:
            return
        entries = [
            (one.keys, one.tokens, {name: (part.shape, part.dtype) for name, part in one.parts.items()})
            for one in self._kept
        ]
        for rank, place, (keys, tokens, kinds) in exchange_order(self._ranks, entries):
            device = self._layers[keys[0][0]].device
            parts = {}
            for name, (shape, dtype) in kinds.items():
                mine = self._kept[place].parts.pop(name) if rank == self._ranks.index else (
                    torch.empty(shape, dtype=dtype, device=device)
                )  # fmt: skip
                parts[name] = self._ranks.broadcast(mine, rank)
            self._add(keys, parts, tokens)
        self._kept = []

    def _add(self, keys: Sequence[Key], parts: Mapping[str, Tensor], tokens: int) -> None:
        for sums in self._companies(keys):
            for name, statistic in sums.statistics.items():
                statistic.add(parts[name], tokens)

    def _companies(self, keys: Sequence[Key]) -> list[_Sums]:
        """Return the sums of ``keys``, each once, shared by these keys only."""
        fresh = [key for key in keys if key not in self._sums]
        found = list({id(self._sums[key]): self._sums[key] for key in keys if key in self._sums}.values())
        result = [self._part(sums, keys) for sums in found]
        for key in fresh:  # at first sight matrices of one input and one kind keep company
            kind = self._kind(key)
            same = [
                sums for sums in result if not sums.tokens and self._kind(next(iter(sums.members))) == kind
            ]
            if same:
                same[0].members.add(key)
            else:
                result.append(_Sums({name: self._new(name, key) for name in self._needs}, {key}))
            self._sums[key] = same[0] if same else result[-1]
        return result

    def _part(self, sums: _Sums, keys: Sequence[Key]) -> _Sums:
        """Return ``sums`` as it is when all its members are among ``keys``, else a copy for those that are."""
        here = sums.members.intersection(keys)
        if here == sums.members:
            return sums
        sums.members -= here
        own = _Sums(copy.deepcopy(sums.statistics), here)
        self._sums.update(dict.fromkeys(here, own))
        return own

    def _kind(self, key: Key) -> tuple[int, torch.device]:
        layer = self._layers[key[0]]
        return layer.in_features, layer.device

    def _new(self, name: str, key: Key) -> Statistic:
        return STATISTICS[name](*self._kind(key))

    def tokens(self, path: str) -> int:
        """Return how many input rows the layer has seen."""
        keys = [(path, slot) for slot in self._layers[path].slots]
        return min(self._sums[key].tokens if key in self._sums else 0 for key in keys)

    def values(self, path: str, sequences: int) -> tuple[dict[str, Tensor], ...]:
        """Return the statistics of each matrix of the layer by name, as means over ``sequences`` sequences.

        An expert's are scaled up to the tokens of all experts together, so that its strength does not depend
        on how often it is chosen. Raises ValueError that names the layer when any is NaN or infinite.
        """
        layer, most = self._layers[path], max(map(self.tokens, self._layers))
        values = []
        for slot in layer.slots:
            sums = self._sums.get((path, slot))
            if sums is None:
                sums = _Sums({name: self._new(name, (path, slot)) for name in self._needs}, set())
            share = sums.tokens / most if layer.routed and sums.tokens else 1.0
            if not sums.values:
                sums.values = {name: one.value(sequences * share) for name, one in sums.statistics.items()}
                _require_finite(path, sums.values)
            values.append(sums.values)
        return tuple(values)


def _require_finite(path: str, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        finite = torch.isfinite(value)
        if not finite.all():
            where = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"the calibration inputs of {path} hold NaN or infinity ({name} at channel {where[0]}, "
                f"{int((~finite).sum())} in all): the model overflows in its dtype; load it in bfloat16 "
                "or float32, and check that the dense model gives finite outputs"
            )
