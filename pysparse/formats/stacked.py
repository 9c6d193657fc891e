"""Rows of several device packings one after the other as one packing, each part a view of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pysparse.formats.device import (
    CHUNK_GROUPS,
    STRIP_ROWS,
    UNIT_BYTES,
    DeltaRows,
    FragmentBitmap,
    NMRows,
    PairBlocks,
    chunk_slots,
)

Packing = DeltaRows | FragmentBitmap | PairBlocks | NMRows


def stack_rows(parts: Sequence[Packing]) -> tuple[Packing, list[Packing]]:
    """Return the packing of all rows of ``parts`` in their order, and the parts anew as views of its values.

    Each of them may be used as before; a value is in memory once. The parts are of one kind, dtype, number of columns
    and, for nm, pattern, on one device. ValueError where they are not, or where the kind's layout cannot be cut at
    their bounds: blocks hold 16 rows, and nm with m = 8 keeps the third bits of all places behind the others.
    """
    why = unstackable(parts)
    if why:
        raise ValueError(f"these packings cannot be stacked: {why}")
    shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
    first = parts[0]
    if isinstance(first, DeltaRows):
        return _stack_delta([p for p in parts if isinstance(p, DeltaRows)], shape)
    if isinstance(first, FragmentBitmap):
        return _stack_fragment([p for p in parts if isinstance(p, FragmentBitmap)], shape)
    if isinstance(first, PairBlocks):
        stream, streams = join([p.stream for p in parts if isinstance(p, PairBlocks)])
        return PairBlocks(stream, shape), [
            PairBlocks(own, part.shape) for own, part in zip(streams, parts, strict=True)
        ]
    return _stack_nm([p for p in parts if isinstance(p, NMRows)], shape)


def unstackable(parts: Sequence[Packing]) -> str:
    """Return why :func:`stack_rows` would refuse ``parts``; "" where it would not."""
    if not parts:
        return "there are none"
    kinds = sorted({part.name for part in parts})
    if len(kinds) > 1:
        return f"they are {' and '.join(kinds)}"
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        return f"they have {', '.join(map(str, widths))} columns"
    held = [part.stream if isinstance(part, FragmentBitmap | PairBlocks) else part.values for part in parts]
    if len({(array.dtype, array.device) for array in held}) > 1:
        return "they differ in dtype or device"
    if isinstance(parts[0], NMRows):
        patterns = sorted({(part.n, part.m) for part in parts if isinstance(part, NMRows)})
        if len(patterns) > 1:
            return f"their patterns are {', '.join(f'{n}:{m}' for n, m in patterns)}"
        if parts[0].m == 8:
            return "with m = 8 the third bits of all places lie behind the others"
    ragged = [part.shape[0] for part in parts[:-1] if part.shape[0] % STRIP_ROWS]
    if ragged and isinstance(parts[0], FragmentBitmap | PairBlocks):
        return f"{ragged[0]} rows are no multiple of {STRIP_ROWS}"
    return ""


def join(arrays: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return ``arrays`` one after the other along the first dimension, and each of them as a view of that."""
    whole = torch.cat(list(arrays))
    return whole, list(whole.split([len(array) for array in arrays]))


def _stack_delta(parts: list[DeltaRows], shape: tuple[int, int]) -> tuple[DeltaRows, list[Packing]]:
    counts = [part.deltas.numel() for part in parts]
    if sum(counts) >= 1 << 31:
        raise ValueError(f"{sum(counts)} groups of 8 weights are more than 32 bits count")
    values, own_values = join([part.values for part in parts])
    deltas, own_deltas = join([part.deltas for part in parts])
    row_groups = torch.empty(shape[0] + 1, dtype=torch.int32, device=values.device)
    chunk_cols = torch.zeros(chunk_slots(shape[0], sum(counts)), dtype=torch.int32, device=values.device)
    row = group = 0
    for part, count in zip(parts, counts, strict=True):
        rows = part.shape[0]
        row_groups[row : row + rows + 1] = part.row_groups + group
        # A row's slots follow from where it starts: as in the part, but for the rows and groups before it.
        chunk_cols[_slots(row_groups[row : row + rows + 1], row)] = part.chunk_cols[
            _slots(part.row_groups, 0)
        ]
        row, group = row + rows, group + count
    whole = DeltaRows(values, deltas, row_groups, chunk_cols, shape)
    views: list[Packing] = [
        DeltaRows(v, d, part.row_groups, part.chunk_cols, part.shape)
        for v, d, part in zip(own_values, own_deltas, parts, strict=True)
    ]
    return whole, views


def _slots(row_groups: Tensor, first_row: int) -> Tensor:
    """Return the slots of all chunks, row after row: ``chunk_slot`` of device_layout.h."""
    begin, end = row_groups[:-1].long(), row_groups[1:].long()
    chunks = (end - begin + CHUNK_GROUPS - 1) // CHUNK_GROUPS
    start = begin // CHUNK_GROUPS + torch.arange(len(begin), device=begin.device) + first_row
    before = chunks.cumsum(0) - chunks
    return (start - before).repeat_interleave(chunks) + torch.arange(int(chunks.sum()), device=begin.device)


def _stack_fragment(
    parts: list[FragmentBitmap], shape: tuple[int, int]
) -> tuple[FragmentBitmap, list[Packing]]:
    stream, streams = join([part.stream for part in parts])
    units = [part.stream.numel() * part.stream.element_size() // UNIT_BYTES for part in parts]
    if sum(units) >= 1 << 31:
        raise ValueError(f"{sum(units)} units of {UNIT_BYTES} bytes are more than 32 bits count")
    pieces, before = [], 0
    for part, count in zip(parts, units, strict=True):
        pieces.append(part.offsets[:-1] + before)
        before += count
    pieces.append(torch.full_like(parts[0].offsets[:1], before))
    whole = FragmentBitmap(stream, torch.cat(pieces), max(part.largest_block for part in parts), shape)
    views: list[Packing] = [
        FragmentBitmap(own, part.offsets, part.largest_block, part.shape)
        for own, part in zip(streams, parts, strict=True)
    ]
    return whole, views


def _stack_nm(parts: list[NMRows], shape: tuple[int, int]) -> tuple[NMRows, list[Packing]]:
    n, m = parts[0].n, parts[0].m
    values, own_values = join([part.values for part in parts])
    places, own_places = join([part.places for part in parts])
    views: list[Packing] = [
        NMRows(v, p, n, m, part.shape) for v, p, part in zip(own_values, own_places, parts, strict=True)
    ]
    return NMRows(values, places, n, m, shape), views
