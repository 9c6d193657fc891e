"""Marginals of embedding entries by compiled walks, and the exact totals that they are added to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pysparse import backend
from pysparse.ops.shapley import SEEDS

Floats = NDArray[np.float32]
Players = Literal["entry", "field"]
_LOW_BITS = 48
_SUM_SCALE, _SQUARE_SCALE = 2.0**36, 2.0**40
_EXACT = 2.0**62


@dataclass(frozen=True, slots=True, eq=False)
class EntrySamples:
    """Samples of a table of embeddings, one row a field; contiguous arrays, not copied."""

    table: Floats  # [rows, cols]
    base: Floats  # [fields, cols], what an absent entry is replaced by
    ids: NDArray[np.int32]  # [samples, fields], rows of the table
    labels: Floats  # [samples], in [0, 1]
    offset: Floats | None = None  # [samples], added to the logit; None for zero

    def __post_init__(self) -> None:
        samples, fields = self.ids.shape if self.ids.ndim == 2 else (-1, -1)
        cols = self.table.shape[1] if self.table.ndim == 2 else -1
        check_array("table", self.table, np.float32, (len(self.table), cols))
        check_array("base", self.base, np.float32, (fields, cols))
        check_array("ids", self.ids, np.int32, (samples, fields))
        check_array("labels", self.labels, np.float32, (samples,))
        if self.offset is not None:
            check_array("offset", self.offset, np.float32, (samples,))
        for name, array in (("table", self.table), ("base", self.base)):
            if not np.isfinite(array).all():
                raise ValueError(f"{int((~np.isfinite(array)).sum())} entries of {name} are not finite")

    def part(self, begin: int, end: int) -> EntrySamples:
        """Return samples ``begin`` to ``end``, sharing memory."""
        offset = None if self.offset is None else self.offset[begin:end]
        return EntrySamples(self.table, self.base, self.ids[begin:end], self.labels[begin:end], offset)

    def arguments(self) -> tuple[list[int], tuple[int, int, int, int]]:
        """Return the addresses and the shape, as the compiled functions take them."""
        offset = 0 if self.offset is None else self.offset.ctypes.data
        arrays = (self.table, self.base, self.ids)
        addresses = [*(array.ctypes.data for array in arrays), offset, self.labels.ctypes.data]
        return addresses, (len(self.table), len(self.ids), self.ids.shape[1], self.table.shape[1])


@dataclass(frozen=True, slots=True)
class EntryDraw:
    """Which removals: the order of sample i of a call is drawn for the data set's sample ``first + i``."""

    seed: int
    first: int = 0
    visit: int = 0  # passes over the data so far
    antithetic: bool = True  # the mean of an order and its reverse, in one walk
    players: Players = "entry"  # "field": a field's whole row goes at once, and totals are [rows, 1]
    twice: bool = False  # visit and visit + 1 together, and the totals square their differences

    def __post_init__(self) -> None:
        check_players(self.players)

    def per_field(self, cols: int) -> int:
        """Return the players of a field whose rows have ``cols`` entries: the columns of the totals."""
        return 1 if self.players == "field" else cols

    def arguments(
        self, orders: NDArray[np.int32] | None = None
    ) -> tuple[int, int, int, bool, bool, bool, int]:
        """Return the values as the compiled functions take them. Raises ValueError for those out of range."""
        if not 0 <= self.seed < SEEDS or self.first < 0 or self.visit < 0:
            raise ValueError(f"seed is in [0, 2^64), first and visit are not negative, got {self}")
        address = 0 if orders is None else orders.ctypes.data
        rows = self.players == "field"
        return self.seed, self.first, self.visit, self.antithetic, rows, self.twice, address


class EntryTotals:
    """Sums of marginals and of squares, exact: the order of additions and of merges changes no bit.

    The squares are those of the marginals, or of a draw that is made twice those of the two marginals' differences.

    A marginal is rounded to 2^-36 once, its square to 2^-40, and then only whole numbers are added: int64 [rows,
    cols], with upper halves in int32 that are filled before the lower ones could overflow. 24 bytes an entry.
    """

    def __init__(self, rows: int, cols: int) -> None:
        shape = (rows, cols)
        self.sums, self.squares = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.sums_high, self.squares_high = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self.bound = np.zeros(2)  # what the largest |sums| and squares cannot exceed

    def arguments(self) -> list[int]:
        """Return the addresses, as the compiled functions take them."""
        return [array.ctypes.data for array in self.arrays().values()]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all that has to be kept on disk."""
        names = ("sums", "squares", "sums_high", "squares_high", "bound")
        return {name: getattr(self, name) for name in names}

    def load(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over arrays of the shapes and types of :meth:`arrays`; ValueError that names the first other one."""
        for name, mine in self.arrays().items():
            other = arrays.get(name)
            if other is None or other.shape != mine.shape or other.dtype != mine.dtype:
                found = "missing" if other is None else f"{other.dtype} {other.shape}"
                raise ValueError(f"totals '{name}' are {found}, expected {mine.dtype} {mine.shape}")
        bound = arrays["bound"]
        if not ((bound >= 0.0) & (bound <= _EXACT)).all():  # false for NaN
            raise ValueError(f"the bound {bound.tolist()} of the totals is not in [0, 2^62]")
        for name, mine in self.arrays().items():
            mine[...] = arrays[name]

    def merge(self, other: EntryTotals) -> None:
        """Add ``other``, of the same shape: totals of shards in any order are those of one process, bit for bit."""
        if other.sums.shape != self.sums.shape:
            raise ValueError(f"totals of shape {other.sums.shape} do not fit {self.sums.shape}")
        for totals in (self, other):
            totals._spill()
        for name in ("sums", "squares", "sums_high", "squares_high"):
            mine = getattr(self, name)
            mine += getattr(other, name)
        self.bound[:] = 2.0 ** (_LOW_BITS + 1)
        self._spill()

    def add(
        self,
        rows: NDArray[np.int64],
        sums: NDArray[np.int64],
        squares: NDArray[np.int64],
        growth: tuple[float, float],
    ) -> None:
        """Add whole numbers [len(rows), cols] to these rows, no row twice; none exceeds ``growth`` (2^61 at most)."""
        if max(self.bound[0] + growth[0], self.bound[1] + growth[1]) > _EXACT:
            self._spill()
        self.sums[rows] += sums
        self.squares[rows] += squares
        self.bound += growth

    def _spill(self) -> None:
        """Leave the lowest 48 bits in the lower halves: totals that are equal then have equal arrays."""
        for low, high in ((self.sums, self.sums_high), (self.squares, self.squares_high)):
            carried = low >> _LOW_BITS
            high += carried.astype(np.int32)
            low -= carried << _LOW_BITS
        self.bound[:] = 2.0**_LOW_BITS

    def mean(self, count: int) -> NDArray[np.float64]:
        """Return the sums over ``count`` samples, divided by it: float64 [rows, cols]."""
        return _whole(self.sums, self.sums_high) / (_SUM_SCALE * count)

    def mean_square(self, count: int) -> NDArray[np.float64]:
        """Return the sums of squares, divided by ``count``: float64 [rows, cols]."""
        return _whole(self.squares, self.squares_high) / (_SQUARE_SCALE * count)


def _whole(low: NDArray[np.int64], high: NDArray[np.int32]) -> NDArray[np.float64]:
    carried = low >> _LOW_BITS  # first the same split for equal numbers, so that they round alike
    upper = (high.astype(np.int64) + carried).astype(np.float64)
    result: NDArray[np.float64] = upper * 2.0**_LOW_BITS + (low - (carried << _LOW_BITS)).astype(np.float64)
    return result


def fm_shapley(samples: EntrySamples, draw: EntryDraw, totals: EntryTotals) -> None:
    """Add a factorisation machine's marginals to ``totals``, one random order of removals a sample.

    The logit is offset + sum over columns of the products of all pairs of entries (Rendle 2010); a marginal is what
    the log loss grows by when an entry is replaced by its base value (Tran et al. 2024, Shaver). O(1) a removal.
    Raises ValueError for ids, labels or counters out of range, before anything is added; for a marginal that is not
    finite or at least 1024, after which ``totals`` must not be used.
    """
    check_totals(samples, draw, totals)
    backend.core().shapley_fm(*samples.arguments(), draw.arguments(), totals.arguments())


def fm_marginals(samples: EntrySamples, draw: EntryDraw, orders: NDArray[np.int32] | None = None) -> Floats:
    """Return each sample's marginals by player, float32 [samples, fields * cols]; player f * cols + k is entry k of
    field f, or with players "field" float32 [samples, fields]. Of ``draw.visit`` alone. ``orders``, int32 of that
    shape, are the removals to make instead of drawn ones.
    """
    players = len(samples.base) * draw.per_field(samples.base.shape[1])
    if orders is not None:
        check_array("orders", orders, np.int32, (len(samples.ids), players))
    marginals = np.empty((len(samples.ids), players), np.float32)
    backend.core().shapley_fm_marginals(*samples.arguments(), draw.arguments(orders), marginals.ctypes.data)
    return marginals


def check_players(players: str) -> None:
    """Raise ValueError for an unknown kind of players."""
    if players not in ("entry", "field"):
        raise ValueError(f"players is 'entry' or 'field', got {players!r}")


def check_totals(samples: EntrySamples, draw: EntryDraw, totals: EntryTotals) -> None:
    """Raise ValueError for totals of another shape than this draw's marginals go to."""
    rows, cols = samples.table.shape
    if totals.sums.shape != (rows, draw.per_field(cols)):
        raise ValueError(
            f"totals of shape {totals.sums.shape} for a table {samples.table.shape} and players {draw.players!r}"
        )


def check_array(name: str, array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError that names ``name`` unless the array is contiguous and of this type and shape."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} is contiguous {np.dtype(dtype).name} {list(shape)}, got {array.dtype} {list(array.shape)}"
            + ("" if array.flags.c_contiguous else ", not contiguous")
        )
