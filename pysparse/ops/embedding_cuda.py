"""Lookups in a pruned table on CUDA tensors: the compiled kernels where a GPU report vouches for them, torch elsewhere.

Everything runs on torch's current stream. Outside a graph's capture the ids are checked before a row is read, which
waits for one small kernel; in a capture nothing may wait, and the rows of ids outside the table become NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend
from pysparse.ops import embedding as common

_ENTRIES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NONE = -1  # what no fault leaves: all ones

Table = tuple[Tensor, Tensor, Tensor, Tensor]


def why_portable(values: Tensor) -> str:
    """Return why the kernels do not take a table with ``values``, or an empty string when they do."""
    if values.dtype not in _ENTRIES:
        return f"the kernels take float32, bfloat16 and float16 entries, not {values.dtype}"
    return backend.cuda_gate("embedding")


def _arguments(
    table: Table, ids: Tensor, columns: int
) -> tuple[int, tuple[int, ...], tuple[int, int], tuple[int, int, int]]:
    values, records, codebook, field_rows = table
    for name, tensor in (
        ("records", records),
        ("codebook", codebook),
        ("field_rows", field_rows),
        ("ids", ids),
    ):
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}, the table's values on {values.device}")
    if codebook.dtype != values.dtype or field_rows.dtype != torch.int64:
        raise ValueError(f"codebook and field_rows are {codebook.dtype} and {field_rows.dtype}")
    addresses = tuple(tensor.data_ptr() for tensor in table)
    sizes = (codebook.shape[1], codebook.shape[0])
    return _ENTRIES[values.dtype], addresses, sizes, (ids.data_ptr(), ids.numel(), columns)


def _stream(tensor: Tensor) -> tuple[int | None, int]:
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _check(
    table: Table, ids: Tensor, columns: int, bags: tuple[int, int, int] = (0, 0, 0)
) -> tuple[int, int]:
    """Return the positions of the first id outside and of the first bag that is none, below 0 where there is none."""
    if torch.cuda.is_current_stream_capturing():
        return _NONE, _NONE
    faults = torch.full((2,), _NONE, dtype=torch.int64, device=ids.device)
    arguments = _arguments(table, ids, columns)
    backend.cuda().embedding_check(*arguments, bags, faults.data_ptr(), *_stream(ids))
    first_id, first_bag = faults.tolist()
    return int(first_id), int(first_bag)


def _refuse_id(table: Table, ids: Tensor, columns: int, position: int) -> None:
    if position >= 0:
        starts, value = table[3].tolist(), int(ids.flatten()[position])
        field = position % columns if columns else 0
        end = starts[field + 1] - starts[field] if columns else starts[-1]
        where = f"field {field}" if columns else "the table"
        raise IndexError(f"id {value} at position {position} is outside {where}: [0, {end})")


def _lookup(
    ids: Tensor, values: Tensor, records: Tensor, codebook: Tensor, field_rows: Tensor, columns: int
) -> Tensor:
    table = (values, records, codebook, field_rows)
    ids = common._checked_ids(ids, field_rows, columns)
    if why_portable(values):
        return common._torch_lookup(ids, *table, columns)
    arguments = _arguments(table, ids, columns)
    _refuse_id(table, ids, columns, _check(table, ids, columns)[0])
    out = values.new_empty((*ids.shape, codebook.shape[1]))
    backend.cuda().embedding_lookup(*arguments, out.data_ptr(), *_stream(ids))
    return out


def _bag(
    ids: Tensor, offsets: Tensor, weights: Tensor | None, mean: bool, values: Tensor, records: Tensor,
    codebook: Tensor, field_rows: Tensor, columns: int,
) -> Tensor:  # fmt: skip
    table = (values, records, codebook, field_rows)
    if why_portable(values):
        return common._bag(ids, offsets, weights, mean, *table, columns).to(values.dtype)
    ids, bags = common._checked_ids(ids, field_rows, columns), offsets.numel() - 1
    common._check_bags(ids, offsets, weights)
    for name, tensor in (("offsets", offsets), ("weights", weights)):
        if tensor is not None and tensor.device != values.device:
            raise ValueError(f"{name} are on {tensor.device}, the table on {values.device}")
    offsets, weights = offsets.contiguous(), None if weights is None else weights.contiguous()
    lists = (offsets.data_ptr(), 0 if weights is None else weights.data_ptr(), bags)
    bad_id, bad_bag = _check(table, ids, columns, lists)
    _refuse_id(table, ids, columns, bad_id)
    if bad_bag >= 0:
        begin, end = offsets[bad_bag : bad_bag + 2].tolist()
        raise ValueError(f"bag {bad_bag} is [{begin}, {end}), offsets must rise within [0, {ids.numel()}]")
    out = values.new_empty((bags, codebook.shape[1]))
    backend.cuda().embedding_bag(*_arguments(table, ids, columns), lists, mean, out.data_ptr(), *_stream(ids))
    return out


_library = torch.library.Library("pysparse", "IMPL", "CUDA")
_library.impl("sparse_embedding", _lookup)
_library.impl("sparse_embedding_bag", _bag)
