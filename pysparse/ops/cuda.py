"""``y = x W^T + b`` and the unpacking of weights in the packings that GPU kernels stream.

Each op takes plain tensors, so it can be traced, compiled and captured in a CUDA graph: kernels run on torch's
current stream, nothing waits, and workspace comes from torch's allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pysparse import backend
from pysparse.formats.device import (
    PACKINGS,
    DeltaRows,
    FragmentBitmap,
    NMRows,
    PairBlocks,
    place_bits,
)
from pysparse.ops.cuda_input import (
    address,
    aligned,
    check_delta,
    check_fragment,
    check_input,
    check_nm,
    check_pair,
    dtype_code,
)
from pysparse.ops.traced import is_traced

DELTA_TOKENS = 8  # columns of this many tokens fit in shared memory beside each other (delta, nm)
STRIP_TOKENS = 64  # beyond, unpacking and torch's product take less time than the kernels' narrow tiles
# What a thread block may hold of x (227 KB on sm_90, 99 KB on sm_86): bytes per column for 1, 2, 4, 8 tokens.
_COLUMN_BYTES = {1: 4, 2: 4, 4: 8, 8: 16}
_H200_BYTES = 227 << 10
_COLUMN_SLACK = {DeltaRows.name: 16, NMRows.name: 128}  # columns past the last that rows may reach
# Scratch for rows unpacked at a time. In cache-sized pieces (24 MB) it takes 1.4 times as long on an H200: each
# piece is two launches and a thinner product.
_UNPACK_BYTES = 128 << 20

_FRAGMENT, _PAIR = 0, 1

_library = torch.library.Library("pysparse", "FRAGMENT")
_library.define(
    "delta_linear(Tensor x, Tensor values, Tensor deltas, Tensor row_groups, Tensor chunk_cols, Tensor? bias, "
    "int out_features, int in_features) -> Tensor"
)
_library.define(
    "delta_unpack(Tensor values, Tensor deltas, Tensor row_groups, Tensor chunk_cols, int cols, int first_row, "
    "int rows) -> Tensor"
)
_library.define(
    "fragment_linear(Tensor x, Tensor stream, Tensor offsets, Tensor? bias, int out_features, int in_features, "
    "int largest_block) -> Tensor"
)
_library.define(
    "fragment_unpack(Tensor stream, Tensor offsets, int total_rows, int cols, int first_row, int rows) -> Tensor"
)
_library.define(
    "pair_linear(Tensor x, Tensor stream, Tensor? bias, int out_features, int in_features) -> Tensor"
)
_library.define("pair_unpack(Tensor stream, int total_rows, int cols, int first_row, int rows) -> Tensor")
_library.define(
    "nm_rows_linear(Tensor x, Tensor values, Tensor places, Tensor? bias, int out_features, int in_features, "
    "int n, int m) -> Tensor"
)
_library.define(
    "nm_rows_unpack(Tensor values, Tensor places, int n, int m, int total_rows, int cols, int first_row, int rows)"
    " -> Tensor"
)

_LINEAR = {packing: f"{'nm_rows' if packing == 'nm' else packing}_linear" for packing in PACKINGS}
Packing = DeltaRows | FragmentBitmap | PairBlocks | NMRows


def packed_linear(x: Tensor, weight: Packing, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` for a device packing of shape (N, K); all on one CUDA device, one 16-bit dtype.

    ``x`` is [..., K], ``bias`` [N]; sums are float32. More tokens than the kernel takes are multiplied by torch
    with rows that are unpacked a few at a time. For a delta, pair or nm packing, Inf in a token makes the whole
    token NaN (a dense product meets 0 * Inf). Raises ValueError for other shapes, dtypes or devices, and
    torch.OutOfMemoryError where the device has no room for the result or the workspace.
    """
    _on_cuda(arrays(weight))
    return call_arrays(weight.name, x, arrays(weight), bias, weight.shape, sizes(weight))


def arrays(weight: Packing) -> tuple[Tensor, ...]:
    """Return the tensors of a packing, in the order of its fields."""
    if isinstance(weight, DeltaRows):
        return weight.values, weight.deltas, weight.row_groups, weight.chunk_cols
    if isinstance(weight, NMRows):
        return weight.values, weight.places
    return (weight.stream, weight.offsets) if isinstance(weight, FragmentBitmap) else (weight.stream,)


def sizes(weight: Packing) -> tuple[int, ...]:
    """Return what the product needs beside arrays: fragment's largest block in bytes, n and m of nm, else nothing."""
    if isinstance(weight, NMRows):
        return weight.n, weight.m
    return (weight.largest_block,) if isinstance(weight, FragmentBitmap) else ()


def call_arrays(
    packing: str,
    x: Tensor,
    arrays: tuple[Tensor, ...],
    bias: Tensor | None,
    shape: tuple[int, int],
    sizes: tuple[int, ...] = (),
) -> Tensor:
    """Run the product on the arrays and sizes of a packing: what a layer calls, and a compiler traces."""
    return _op(_LINEAR[packing], x, bias)(x, *arrays, bias, *shape, *sizes)


def _op(name: str, x: Tensor, bias: Tensor | None = None) -> Callable[..., Tensor]:
    """Return the operation as torch knows it where autograd, a tracer or a subclass must see the call on ``x``.

    Else return the function behind it: torch's dispatcher is a large part of a small call's time.
    """
    plain = type(x) is Tensor and x.is_cuda and not is_traced()
    if plain and not (
        torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    ):
        return OPERATIONS[name][0]
    operation: Callable[..., Tensor] = getattr(torch.ops.pysparse, name).default
    return operation


def packed_unpack(weight: Packing, first_row: int = 0, rows: int | None = None) -> Tensor:
    """Return rows [first_row, first_row + rows) of a packed weight densely, on its device.

    ``first_row`` is a multiple of 16 for blocks of 16 rows (fragment, pair); ValueError otherwise, for rows outside the
    weight, and for arrays that are not on one CUDA device.
    """
    rows = weight.shape[0] - first_row if rows is None else rows
    held = arrays(weight)
    _on_cuda(held)
    if isinstance(weight, DeltaRows):
        return _op("delta_unpack", held[0])(*held, weight.shape[1], first_row, rows)
    if isinstance(weight, PairBlocks):
        return _op("pair_unpack", held[0])(*held, *weight.shape, first_row, rows)
    name = "fragment_unpack" if isinstance(weight, FragmentBitmap) else "nm_rows_unpack"
    more = sizes(weight) if isinstance(weight, NMRows) else ()
    return _op(name, held[0])(*held, *more, *weight.shape, first_row, rows)


def max_tokens(packing: str, cols: int, device: int | None = None) -> int:
    """Return the most tokens that the kernel of ``packing`` takes at once for ``cols`` input features.

    ``device`` is the index of a CUDA device, by default the current one; where none runs the kernels, the answer is
    that for an H200.
    """
    if packing not in _COLUMN_SLACK:
        return STRIP_TOKENS
    if backend.cuda_missing_reason():
        room = _H200_BYTES
    else:
        room = _shared_bytes(torch.cuda.current_device() if device is None else device)
    return _fitting_tokens(cols + _COLUMN_SLACK[packing], room)


@cache
def _fitting_tokens(columns: int, room: int) -> int:
    return max((t for t, size in _COLUMN_BYTES.items() if columns * size + 2048 <= room), default=0)


@cache
def _shared_bytes(device: int) -> int:
    return int(backend.cuda().shared_bytes(device))


def _on_cuda(weights: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless all arrays of a packing are on one CUDA device."""
    devices = {array.device for array in weights}
    if len(devices) > 1:
        raise ValueError(f"the arrays of a packing must be on one device, got {sorted(map(str, devices))}")
    if not weights[0].is_cuda:
        raise ValueError(f"the packed weight is on {weights[0].device}, its kernels run on CUDA devices only")


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _stream(device: torch.device) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device.index))  # without an object of Python around it


def _delta_linear(
    x: Tensor,
    values: Tensor,
    deltas: Tensor,
    row_groups: Tensor,
    chunk_cols: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
) -> Tensor:
    check_input(x, bias, values, (rows, cols))
    check_delta(values, deltas, row_groups, chunk_cols, rows)
    tokens = _tokens(x)
    if tokens > max_tokens(DeltaRows.name, cols, x.device.index):
        return _many(x, bias, DeltaRows(values, deltas, row_groups, chunk_cols, (rows, cols)))
    x, bias = aligned(x), _dense(bias)
    y = x.new_empty((*x.shape[:-1], rows))
    backend.cuda().delta_linear(
        dtype_code(values), x.data_ptr(), tokens, cols, values.data_ptr(), deltas.data_ptr(), row_groups.data_ptr(),
        chunk_cols.data_ptr(), address(bias), y.data_ptr(), rows, x.device.index, _stream(x.device),
    )  # fmt: skip
    return y


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _delta_unpack(
    values: Tensor,
    deltas: Tensor,
    row_groups: Tensor,
    chunk_cols: Tensor,
    cols: int,
    first_row: int,
    rows: int,
) -> Tensor:
    check_delta(values, deltas, row_groups, chunk_cols, row_groups.numel() - 1)
    dense = values.new_empty((rows, cols))
    backend.cuda().delta_unpack(
        values.data_ptr(), deltas.data_ptr(), row_groups.data_ptr(), chunk_cols.data_ptr(), dense.data_ptr(),
        first_row, rows, row_groups.numel() - 1, cols, values.device.index, _stream(values.device),
    )  # fmt: skip
    return dense


def _nm_linear(
    x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, rows: int, cols: int, n: int, m: int
) -> Tensor:
    check_input(x, bias, values, (rows, cols))
    check_nm(values, places, n, m, (rows, cols))
    tokens = _tokens(x)
    if tokens > max_tokens(NMRows.name, cols, x.device.index):
        return _many(x, bias, NMRows(values, places, n, m, (rows, cols)))
    x, bias = aligned(x), _dense(bias)
    y = x.new_empty((*x.shape[:-1], rows))
    backend.cuda().nm_linear(
        dtype_code(values), x.data_ptr(), tokens, cols, values.data_ptr(), places.data_ptr(), n, place_bits(m),
        address(bias), y.data_ptr(), rows, x.device.index, _stream(x.device),
    )  # fmt: skip
    return y


def _nm_unpack(
    values: Tensor,
    places: Tensor,
    n: int,
    m: int,
    total_rows: int,
    cols: int,
    first_row: int,
    rows: int,
) -> Tensor:
    check_nm(values, places, n, m, (total_rows, cols))
    dense = values.new_empty((rows, cols))
    backend.cuda().nm_unpack(
        values.data_ptr(), places.data_ptr(), n, place_bits(m), dense.data_ptr(), first_row, rows, total_rows, cols,
        values.device.index, _stream(values.device),
    )  # fmt: skip
    return dense


@lru_cache(maxsize=4096)
def _workspace(
    packing: int, code: int, tokens: int, cols: int, rows: int, largest_block: int, device: int
) -> int:
    return int(backend.cuda().strip_workspace(packing, code, tokens, cols, rows, largest_block, device))


def _strip_linear(
    packing: int,
    x: Tensor,
    stream: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    rows: int,
    largest: int,
) -> Tensor:
    code = dtype_code(stream)
    cols, tokens, device = x.shape[-1], _tokens(x), x.device.index
    x, bias = aligned(x), _dense(bias)
    y = x.new_empty((*x.shape[:-1], rows))
    if tokens == 0:
        return y
    floats = _workspace(packing, code, tokens, cols, rows, largest, device)
    workspace = torch.empty(floats, dtype=torch.float32, device=x.device) if floats else None
    backend.cuda().strip_linear(
        packing, code, x.data_ptr(), tokens, cols, stream.data_ptr(), address(offsets), largest, address(bias),
        y.data_ptr(), rows, address(workspace), device, _stream(x.device),
    )  # fmt: skip
    return y


def _fragment_linear(
    x: Tensor, stream: Tensor, offsets: Tensor, bias: Tensor | None, rows: int, cols: int, largest_block: int
) -> Tensor:
    check_input(x, bias, stream, (rows, cols))
    check_fragment(stream, offsets, (rows, cols))
    if _tokens(x) > STRIP_TOKENS:
        return _many(x, bias, FragmentBitmap(stream, offsets, largest_block, (rows, cols)))
    return _strip_linear(_FRAGMENT, x, stream, offsets, bias, rows, largest_block)


def _pair_linear(x: Tensor, stream: Tensor, bias: Tensor | None, rows: int, cols: int) -> Tensor:
    check_input(x, bias, stream, (rows, cols))
    check_pair(stream, (rows, cols))
    if _tokens(x) > STRIP_TOKENS:
        return _many(x, bias, PairBlocks(stream, (rows, cols)))
    return _strip_linear(_PAIR, x, stream, None, bias, rows, backend.core().PAIR_BLOCK_BYTES)


def _strip_unpack(
    packing: int,
    stream: Tensor,
    offsets: Tensor | None,
    total_rows: int,
    cols: int,
    first_row: int,
    rows: int,
) -> Tensor:
    if offsets is None:
        check_pair(stream, (total_rows, cols))
    else:
        check_fragment(stream, offsets, (total_rows, cols))
    dense = stream.new_empty((rows, cols))
    backend.cuda().strip_unpack(
        packing, stream.data_ptr(), address(offsets), dense.data_ptr(), first_row, rows,
        total_rows, cols, stream.device.index, _stream(stream.device),
    )  # fmt: skip
    return dense


def _fragment_unpack(
    stream: Tensor, offsets: Tensor, total_rows: int, cols: int, first_row: int, rows: int
) -> Tensor:
    return _strip_unpack(_FRAGMENT, stream, offsets, total_rows, cols, first_row, rows)


def _pair_unpack(stream: Tensor, total_rows: int, cols: int, first_row: int, rows: int) -> Tensor:
    return _strip_unpack(_PAIR, stream, None, total_rows, cols, first_row, rows)


def _many(x: Tensor, bias: Tensor | None, weight: Packing) -> Tensor:
    """Unpack some rows, multiply by torch's GEMM while they are in cache, go on with the next rows."""
    rows, cols = weight.shape
    step = max(256, _UNPACK_BYTES // max(1, 2 * cols) // 256 * 256)
    if rows <= step:
        return functional.linear(x, packed_unpack(weight), bias)
    y = x.new_empty((*x.shape[:-1], rows))
    for first in range(0, rows, step):
        end = min(rows, first + step)
        block = packed_unpack(weight, first, end - first)
        y[..., first:end] = functional.linear(x, block, None if bias is None else bias[first:end])
    return y


def _delta_linear_fake(
    x: Tensor,
    values: Tensor,
    deltas: Tensor,
    row_groups: Tensor,
    chunk_cols: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _fragment_linear_fake(
    x: Tensor, stream: Tensor, offsets: Tensor, bias: Tensor | None, rows: int, cols: int, largest_block: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _pair_linear_fake(x: Tensor, stream: Tensor, bias: Tensor | None, rows: int, cols: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _delta_unpack_fake(
    values: Tensor,
    deltas: Tensor,
    row_groups: Tensor,
    chunk_cols: Tensor,
    cols: int,
    first_row: int,
    rows: int,
) -> Tensor:
    return values.new_empty((rows, cols))


def _fragment_unpack_fake(
    stream: Tensor, offsets: Tensor, total_rows: int, cols: int, first_row: int, rows: int
) -> Tensor:
    return stream.new_empty((rows, cols))


def _pair_unpack_fake(stream: Tensor, total_rows: int, cols: int, first_row: int, rows: int) -> Tensor:
    return stream.new_empty((rows, cols))


def _nm_linear_fake(
    x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, rows: int, cols: int, n: int, m: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _nm_unpack_fake(
    values: Tensor,
    places: Tensor,
    n: int,
    m: int,
    total_rows: int,
    cols: int,
    first_row: int,
    rows: int,
) -> Tensor:
    return values.new_empty((rows, cols))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight's arrays and sizes, not x: the weight is frozen."""
    ctx.inputs = (None, *inputs[1:])


def _backward(ctx: Any, grad: Tensor, weight: Packing, bias_at: int) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * len(ctx.inputs)
    if ctx.needs_input_grad[0]:
        result[0] = grad @ packed_unpack(weight)
    if ctx.needs_input_grad[bias_at]:
        result[bias_at] = grad.flatten(0, -2).sum(dim=0)
    return tuple(result)


def _delta_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, values, deltas, row_groups, chunk_cols, _, *shape = ctx.inputs
    return _backward(ctx, grad, DeltaRows(values, deltas, row_groups, chunk_cols, (shape[0], shape[1])), 5)


def _fragment_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, stream, offsets, _, rows, cols, largest = ctx.inputs
    return _backward(ctx, grad, FragmentBitmap(stream, offsets, largest, (rows, cols)), 3)


def _pair_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, stream, _, rows, cols = ctx.inputs
    return _backward(ctx, grad, PairBlocks(stream, (rows, cols)), 2)


def _nm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, values, places, _, rows, cols, n, m = ctx.inputs
    return _backward(ctx, grad, NMRows(values, places, n, m, (rows, cols)), 3)


_Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], _Backward | None]] = {
    "delta_linear": (_delta_linear, _delta_linear_fake, _delta_backward),
    "fragment_linear": (_fragment_linear, _fragment_linear_fake, _fragment_backward),
    "pair_linear": (_pair_linear, _pair_linear_fake, _pair_backward),
    "nm_rows_linear": (_nm_linear, _nm_linear_fake, _nm_backward),
    "delta_unpack": (_delta_unpack, _delta_unpack_fake, None),
    "fragment_unpack": (_fragment_unpack, _fragment_unpack_fake, None),
    "pair_unpack": (_pair_unpack, _pair_unpack_fake, None),
    "nm_rows_unpack": (_nm_unpack, _nm_unpack_fake, None),
}
for _name, (_run, _fake, _gradient) in OPERATIONS.items():
    _library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"pysparse::{_name}", _fake, lib=_library)
    if _gradient is not None:
        torch.library.register_autograd(f"pysparse::{_name}", _gradient, setup_context=_save, lib=_library)
