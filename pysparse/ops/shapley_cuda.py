"""Shapley values of embedding entries on a GPU: the random orders, walks and exact sums of the CPU.

Samples come and totals go as NumPy arrays, as for the CPU's kernels; a call moves only the rows that its samples read.
The bits of a walk are those of the CPU's AVX-512 kernel, and those of the sums do not depend on any order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysparse import backend
from pysparse.ops.shapley_entries import (
    EntryDraw,
    EntrySamples,
    EntryTotals,
    Floats,
    check_array,
    check_totals,
)

_TILE = 1 << 25  # marginals that are held at once: 128 MB
_SUM_SCALE, _SQUARE_SCALE = 2.0**36, 2.0**40
_LARGEST = 1024.0
_EXACT = 2.0**61  # so much fits beside as much again
_SAMPLES, _VISITS, _COLUMNS = 1 << 40, 1 << 23, 256


def draw_permutations_cuda(
    seed: int, first: int, rows: int, players: int, *, visit: int = 0, purpose: int = 0, device: int = 0
) -> Tensor:
    """Return int32 [rows, players] on a GPU: the permutations of :func:`pysparse.ops.draw_permutations`."""
    _check_gate()
    _check_draw(EntryDraw(seed, first, visit), rows)
    orders = torch.empty((rows, players), dtype=torch.int32, device=f"cuda:{device}")
    room = torch.empty_like(orders)
    backend.cuda().shapley_permutations(
        (seed, first, visit, purpose, rows, players), room.data_ptr(), orders.data_ptr(), *_target(orders)
    )
    return orders


def fm_shapley_cuda(samples: EntrySamples, draw: EntryDraw, totals: EntryTotals, device: int = 0) -> None:
    """Add a factorisation machine's marginals to ``totals``, as :func:`pysparse.ops.fm_shapley` does on the CPU.

    Raises ValueError for ids, labels, counters or shapes out of range before anything is added, for a marginal that
    is not finite or at least 1024, after which ``totals`` must not be used; RuntimeError where no GPU report vouches
    for the kernels and PYSPARSE_EXPERIMENTAL=1 is not set.
    """
    check_totals(samples, draw, totals)
    _check(samples, draw)
    _check_room(samples)
    if len(samples.ids) == 0:
        return
    held, at = _compact(samples, device)
    add_tiles(held, at, totals, _TILE // samples.base.size, lambda begin, end: held.walk(draw, begin, end))


def _compact(samples: EntrySamples, device: int) -> tuple[_Device, NDArray[np.int64]]:
    """Return the samples on the device with only the rows that they read, and which rows these are."""
    rows, local = torch.unique(torch.from_numpy(samples.ids).to(f"cuda:{device}"), return_inverse=True)
    at = rows.cpu().numpy().astype(np.int64)
    table = torch.from_numpy(samples.table[at]).to(rows.device)
    return _Device(samples, table, local.to(torch.int32).contiguous()), at


def add_entries(
    samples: EntrySamples, draw: EntryDraw, totals: EntryTotals, device: int, size: int,
    marginals: Callable[[int, int], Tensor],
) -> None:  # fmt: skip
    """Add ``marginals(begin, end)`` [end - begin, players] of all samples, ``size`` at a time, to ``totals``."""
    check_totals(samples, draw, totals)
    _check(samples, draw)
    if len(samples.ids) == 0:
        return
    held, at = _compact(samples, device)

    def walk(begin: int, end: int) -> tuple[Tensor, float]:
        found = marginals(begin, end).contiguous()
        return found, float(found.abs().max())  # NaN where one is

    add_tiles(held, at, totals, size, walk)


def add_tiles(
    held: _Device, at: NDArray[np.int64], totals: EntryTotals, size: int,
    walk: Callable[[int, int], tuple[Tensor, float]],
) -> None:  # fmt: skip
    """Walk ``size`` samples at a time and add what was found; ValueError for a marginal out of range."""
    count = len(held.ids)
    for begin in range(0, count, max(1, size)):
        end = min(begin + max(1, size), count)
        marginals, peak = walk(begin, end)
        if not peak < _LARGEST:
            raise ValueError(
                f"a marginal of samples {begin} to {end - 1} is {peak}; they must be finite and below {_LARGEST} nats"
            )
        _add(held, marginals, (begin, end), peak, at, totals)


def fm_marginals_cuda(
    samples: EntrySamples, draw: EntryDraw, orders: NDArray[np.int32] | None = None, device: int = 0
) -> Floats:
    """Return each sample's marginals by player, as :func:`pysparse.ops.fm_marginals`."""
    _check(samples, draw)
    _check_room(samples)
    given = None
    if orders is not None:
        check_array("orders", orders, np.int32, (len(samples.ids), samples.base.size))
        if not np.array_equal(
            np.sort(orders, axis=1), np.broadcast_to(np.arange(samples.base.size), orders.shape)
        ):
            raise ValueError(f"orders are not all permutations of {samples.base.size} players")
        given = torch.from_numpy(orders).to(f"cuda:{device}")
    where = torch.device("cuda", device)
    held = _Device(
        samples, torch.from_numpy(samples.table).to(where), torch.from_numpy(samples.ids).to(where)
    )
    marginals, _ = held.walk(draw, 0, len(samples.ids), given)
    result: Floats = marginals.cpu().numpy()
    return result


class _Device:
    """The arrays of a call on the GPU, alive until its kernels have been launched."""

    def __init__(self, samples: EntrySamples, table: Tensor, ids: Tensor) -> None:
        def moved(array: Floats) -> Tensor:
            return torch.from_numpy(array).to(table.device)

        self.table, self.ids = table, ids
        self.base, self.labels = moved(samples.base), moved(samples.labels)
        self.offset = None if samples.offset is None else moved(samples.offset)
        self.fields, self.cols = samples.base.shape
        ordered = ids.sort(dim=1).values  # a row that stands in several fields of a sample is added as often
        self.often = self.fields if bool((ordered.diff(dim=1) == 0).any()) else 1

    def walk(
        self, draw: EntryDraw, begin: int, end: int, orders: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """Return the marginals [end - begin, players] and the largest of them."""
        out = torch.empty((end - begin, self.fields * self.cols), device=self.table.device)
        peak = torch.zeros(1, device=self.table.device)
        part = [None if x is None else x[begin:end] for x in (self.ids, self.offset, self.labels)]
        addresses = [0 if x is None else x.data_ptr() for x in (self.table, self.base, *part)]
        how = (
            draw.seed,
            draw.first + begin,
            draw.visit,
            draw.antithetic,
            0 if orders is None else orders.data_ptr(),
        )
        backend.cuda().fm_marginals(
            addresses,
            (end - begin, self.fields, self.cols),
            how,
            out.data_ptr(),
            peak.data_ptr(),
            *_target(out),
        )
        return out, float(peak)


def _add(
    held: _Device, marginals: Tensor, span: tuple[int, int], peak: float, rows: NDArray[np.int64], totals: EntryTotals
) -> None:  # fmt: skip
    """Add a tile's marginals to ``totals``, in so many pieces that no sum on the device can overflow."""
    often = held.often
    each = often * max(peak * _SUM_SCALE + 1, peak * peak * _SQUARE_SCALE + 1)
    size = max(1, int(_EXACT / each))
    for first in range(0, len(marginals), size):
        part = marginals[first : first + size]
        ids = held.ids[span[0] + first : span[0] + first + len(part)]
        sums, squares = (
            torch.zeros(held.table.shape, dtype=torch.int64, device=part.device) for _ in range(2)
        )
        backend.cuda().add_marginals(
            part.data_ptr(), ids.data_ptr(), (len(part), held.fields, held.cols), sums.data_ptr(), squares.data_ptr(),
            *_target(part),
        )  # fmt: skip
        count = len(part) * often
        growth = (count * (peak * _SUM_SCALE + 1), count * (peak * peak * _SQUARE_SCALE + 1))
        totals.add(rows, sums.cpu().numpy(), squares.cpu().numpy(), growth)


def _target(tensor: Tensor) -> tuple[int | None, int]:
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _check_draw(draw: EntryDraw, rows: int) -> None:
    draw.arguments()  # refuses negative numbers and seeds out of range
    if draw.players != "entry" or draw.twice:
        raise ValueError(
            "players 'field' and draws made twice (standard errors 'permutation') are for the CPU"
        )
    if draw.first + rows > _SAMPLES or draw.visit >= _VISITS:
        raise ValueError(
            f"samples {draw.first} + {rows} or visit {draw.visit} are beyond {_SAMPLES} and {_VISITS}"
        )


def _check(samples: EntrySamples, draw: EntryDraw) -> None:
    """Raise for what the kernels must not see, and where they may not be used."""
    _check_gate()
    _check_draw(draw, len(samples.ids))
    check_values(samples)
    if samples.base.shape[1] > _COLUMNS:
        raise ValueError(f"{samples.base.shape[1]} columns are more than {_COLUMNS}")


def _check_room(samples: EntrySamples) -> None:
    """Raise ValueError for more players than a thread block's shared memory holds."""
    room = backend.cuda().shared_bytes(torch.cuda.current_device())
    wanted = backend.cuda().fm_walk_bytes(*samples.base.shape)
    if wanted > room:
        raise ValueError(
            f"{samples.base.size} players take {wanted} bytes of shared memory, the GPU has {room}; use the CPU"
        )


def _check_gate() -> None:
    closed = backend.cuda_gate("shapley")
    if closed:
        raise RuntimeError(f"no Shapley kernels on a GPU: {closed}")


def check_values(samples: EntrySamples) -> None:
    """Raise ValueError, naming the first offence, for ids outside the table and labels outside [0, 1]."""
    bad = (samples.ids < 0) | (samples.ids >= len(samples.table))
    if bad.any():
        sample, field = np.argwhere(bad)[0]
        raise ValueError(
            f"id {samples.ids[sample, field]} of sample {sample}, field {field} is not in [0, {len(samples.table)})"
        )
    wrong = ~((samples.labels >= 0) & (samples.labels <= 1))  # true for NaN
    if wrong.any():
        sample = int(wrong.argmax())
        raise ValueError(f"label {samples.labels[sample]} of sample {sample} is not in [0, 1]")
