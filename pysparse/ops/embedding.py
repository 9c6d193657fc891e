"""Lookups in a pruned embedding table: ``torch.library`` ops over the compiled kernels, and the same in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.bitmap import unpack_bits

GROUP = 8  # rows that share an offset; csrc/include/pysparse/embedding.h
# The kernels copy 16-bit values without looking at them, so float16 goes by the name of bfloat16.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 1}
_TABLE = "Tensor values, Tensor records, Tensor codebook, Tensor field_rows, int columns"

_library = torch.library.Library("pysparse", "FRAGMENT")
_library.define(f"sparse_embedding(Tensor ids, {_TABLE}) -> Tensor")
_library.define(
    f"sparse_embedding_bag(Tensor ids, Tensor offsets, Tensor? weights, bool mean, {_TABLE}) -> Tensor"
)


def pack_records(bitmask: Tensor, dims: int) -> Tensor:
    """Return uint8 [ceil(rows/8), 8 + 8 ceil(dims/8)]: for 8 rows the index of their first value, then their masks.

    ``bitmask`` is uint8 [rows, ceil(dims/8)]. Raises ValueError for bits beyond the last column.
    """
    rows, row_bytes = bitmask.shape
    groups = -(-rows // GROUP)
    if backend.available() and bitmask.is_cpu:
        records = torch.empty((groups, 8 + GROUP * row_bytes), dtype=torch.uint8)
        backend.core().embedding_pack(bitmask.contiguous().data_ptr(), rows, dims, records.data_ptr())
        return records
    bits = unpack_bits(bitmask, 8 * row_bytes)
    if bool(bits[:, dims:].any()):
        raise ValueError(f"mask bits are set beyond column {dims - 1}")
    padded = torch.nn.functional.pad(bitmask, (0, 0, 0, -rows % GROUP)).view(groups, GROUP * row_bytes)
    counts = torch.nn.functional.pad(bits.sum(1), (0, -rows % GROUP)).view(groups, GROUP).sum(1)
    firsts = (counts.cumsum(0) - counts).view(groups, 1).view(torch.uint8)
    return torch.cat([firsts, padded], dim=1)


def record_masks(records: Tensor, rows: int) -> Tensor:
    """Return the bitmask uint8 [rows, ceil(dims/8)] that :func:`pack_records` was given."""
    return records[:, 8:].reshape(records.shape[0] * GROUP, -1)[:rows].clone()


def sparse_embedding(
    ids: Tensor, values: Tensor, records: Tensor, codebook: Tensor, field_rows: Tensor, columns: int
) -> Tensor:
    """Return rows [..., dims] of the table for int64 or int32 ``ids`` [...].

    With ``columns`` fields the last dimension of ``ids`` is the field and ids count from its first row; with 0 they
    are rows of the table. ``values`` must have room for 32 more entries behind them (as SparseEmbedding keeps them).
    Raises IndexError naming the first id that lies outside, before anything is read by it.
    """
    result: Tensor = torch.ops.pysparse.sparse_embedding(ids, values, records, codebook, field_rows, columns)
    return result


def sparse_embedding_bag(
    ids: Tensor, offsets: Tensor, weights: Tensor | None, mean: bool, values: Tensor, records: Tensor,
    codebook: Tensor, field_rows: Tensor, columns: int,
) -> Tensor:  # fmt: skip
    """Return sums (or means) [bags, dims] of the rows of each bag; bag b is ids[offsets[b] : offsets[b + 1]].

    ``ids`` [N], ``offsets`` int64 [bags + 1], ``weights`` float32 [N] or None; sums are float32, rounded once. An
    empty bag is zero. Raises as :func:`sparse_embedding`, and ValueError for offsets that do not rise from 0 to at
    most N.
    """
    result: Tensor = torch.ops.pysparse.sparse_embedding_bag(
        ids, offsets, weights, mean, values, records, codebook, field_rows, columns
    )
    return result


def _checked_ids(ids: Tensor, field_rows: Tensor, columns: int) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids are int64 or int32, got {ids.dtype}")
    if columns and (columns != field_rows.numel() - 1 or ids.shape[-1:] != (columns,)):
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} must end in the number of fields, {field_rows.numel() - 1}"
        )
    return ids.to(torch.int64).contiguous()


def _call(
    kernel: str, table: tuple[Tensor, Tensor, Tensor, Tensor], ids: Tensor, columns: int, *rest: int
) -> None:
    values, _, codebook, field_rows = table
    sizes = (int(field_rows[-1]), codebook.shape[1], codebook.shape[0])
    addresses = tuple(x.data_ptr() for x in table)
    try:
        getattr(backend.core(), kernel)(
            _CODES[values.dtype], addresses, sizes, ids.data_ptr(), ids.numel(), columns, *rest
        )
    except ValueError as error:
        if str(error).startswith("id "):
            raise IndexError(str(error)) from None
        raise


def _lookup(
    ids: Tensor, values: Tensor, records: Tensor, codebook: Tensor, field_rows: Tensor, columns: int
) -> Tensor:
    ids = _checked_ids(ids, field_rows, columns)
    if not (values.is_cpu and backend.available()):
        return _torch_lookup(ids, values, records, codebook, field_rows, columns)
    out = values.new_empty((*ids.shape, codebook.shape[1]))
    _call("embedding_lookup", (values, records, codebook, field_rows), ids, columns, out.data_ptr())
    return out


def _torch_lookup(
    ids: Tensor, values: Tensor, records: Tensor, codebook: Tensor, field_rows: Tensor, columns: int
) -> Tensor:
    """The same in plain torch, on any device: the oracle, and what CUDA tensors take."""
    starts, dims = field_rows.to(ids.device), codebook.shape[1]
    limit = starts.diff() if columns else starts[-1:]
    if bool(((ids < 0) | (ids >= limit)).any()):
        bad = int(ids[(ids < 0) | (ids >= limit)][0])
        raise IndexError(f"id {bad} is outside the table or its field: sizes {limit.tolist()[:8]}")
    rows = (ids + starts[:-1] if columns else ids).flatten()
    fields = torch.searchsorted(starts, rows, right=True) - 1
    record = records[rows // GROUP]
    bits = unpack_bits(record[:, 8:].reshape(len(rows) * GROUP, -1), dims).view(len(rows), GROUP, dims)
    before = torch.arange(GROUP, device=ids.device) < (rows % GROUP)[:, None]
    first = record[:, :8].contiguous().view(torch.int64)[:, 0] + (bits.sum(-1) * before).sum(-1)
    own = bits[torch.arange(len(rows), device=ids.device), rows % GROUP]
    at = first[:, None] + own.cumsum(1) - own.to(torch.int64)
    result = torch.where(own, values[at.clamp(max=max(0, values.numel() - 1))], codebook[fields])
    return result.view(*ids.shape, dims)


def _check_bags(ids: Tensor, offsets: Tensor, weights: Tensor | None) -> None:
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"offsets are int64 [bags + 1], got {offsets.dtype} {tuple(offsets.shape)}")
    capturing = offsets.is_cuda and torch.cuda.is_current_stream_capturing()
    if len(offsets) > 1 and not capturing and int(offsets[0]):
        raise ValueError(f"offsets begin with 0, got {int(offsets[0])}: ids before it would be in no bag")
    if weights is not None and (weights.dtype != torch.float32 or weights.numel() != ids.numel()):
        raise ValueError(
            f"weights are float32, one for each of {ids.numel()} ids; got {weights.dtype} {tuple(weights.shape)}"
        )


def _bag(
    ids: Tensor, offsets: Tensor, weights: Tensor | None, mean: bool, values: Tensor, records: Tensor,
    codebook: Tensor, field_rows: Tensor, columns: int,
) -> Tensor:  # fmt: skip
    ids = _checked_ids(ids, field_rows, columns)
    bags = offsets.numel() - 1
    _check_bags(ids, offsets, weights)
    if values.is_cpu and backend.available() and values.dtype != torch.float16:
        out = values.new_empty((bags, codebook.shape[1]))
        offsets, weights = offsets.contiguous(), None if weights is None else weights.contiguous()
        _call(
            "embedding_bag", (values, records, codebook, field_rows), ids, columns, offsets.data_ptr(),
            0 if weights is None else weights.data_ptr(), bags, mean, out.data_ptr(),
        )  # fmt: skip
        return out
    return _torch_bag(_lookup(ids, values, records, codebook, field_rows, columns), offsets, weights, mean)


def _torch_bag(rows: Tensor, offsets: Tensor, weights: Tensor | None, mean: bool) -> Tensor:
    sizes = offsets.diff()
    if bool((sizes < 0).any()) or (
        len(offsets) and not 0 <= int(offsets[0]) <= int(offsets[-1]) <= len(rows)
    ):
        raise ValueError(f"offsets must rise within [0, {len(rows)}], got {offsets.tolist()[:8]}")
    rows = rows[int(offsets[0]) : int(offsets[-1])].float()
    if weights is not None:
        rows = rows * weights[int(offsets[0]) : int(offsets[-1]), None].to(rows.device)
    bag = torch.repeat_interleave(torch.arange(len(sizes), device=rows.device), sizes.to(rows.device))
    sums = rows.new_zeros((len(sizes), rows.shape[1])).index_add_(0, bag, rows)
    return sums / sizes.clamp(min=1)[:, None].to(sums) if mean else sums


_library.impl("sparse_embedding", _lookup, "CompositeExplicitAutograd")
_library.impl(
    "sparse_embedding_bag",
    lambda ids, offsets, weights, mean, values, *rest: _bag(ids, offsets, weights, mean, values, *rest).to(
        values.dtype
    ),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "pysparse::sparse_embedding",
    lambda ids, values, records, codebook, field_rows, columns: values.new_empty(
        (*ids.shape, codebook.shape[1])
    ),
    lib=_library,
)
torch.library.register_fake(
    "pysparse::sparse_embedding_bag",
    lambda ids, offsets, weights, mean, values, records, codebook, field_rows, columns: values.new_empty(
        (offsets.numel() - 1, codebook.shape[1])
    ),
    lib=_library,
)
