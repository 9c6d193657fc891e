"""What the products of GPU kernels take: checked before an address of it reaches one."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend
from pysparse.formats.device import BLOCK_COLS, STRIP_ROWS, check_nm_sizes, chunk_slots, place_bits

_DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1}


def dtype_code(values: Tensor) -> int:
    """Return the code of a weight's dtype, bfloat16 or float16; ValueError for another."""
    code = _DTYPE_CODES.get(values.dtype)
    if code is None:
        raise ValueError(f"the weight is {values.dtype}: CUDA kernels take bfloat16 or float16")
    return code


def check_input(x: Tensor, bias: Tensor | None, values: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless ``x`` [..., K] and ``bias`` [N] fit a weight of ``shape`` (N, K), dtype and device."""
    if x.shape[-1:] != shape[1:]:
        have = f"{x.shape[-1]} features" if x.dim() else "no dimension"
        raise ValueError(f"x has {have}, the weight takes {shape[1]}")
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"the bias has shape {tuple(bias.shape)}, the weight gives {shape[0]} features")
    if x.dtype is not values.dtype or (bias is not None and bias.dtype is not values.dtype):
        raise ValueError(
            f"x is {x.dtype}, the weight {values.dtype}"
            + (f", the bias {bias.dtype}" if bias is not None else "")
            + ": CUDA kernels take bfloat16 or float16, the same for all"
        )
    others = (x,) if bias is None else (x, bias)
    if any(tensor.device != values.device for tensor in others):
        raise ValueError(_devices(values, *others))


def check_arrays(values: Tensor, *integers: tuple[str, Tensor, torch.dtype, int]) -> None:
    """Raise ValueError unless the arrays of a packing are as a kernel reads them.

    ``values`` begin at a multiple of 16 bytes, as vectors are loaded from them; each of ``integers`` is a name, an
    array, the dtype that it must have and the bytes that its address must be a multiple of. All are contiguous and
    on one device.
    """
    _check_array("values", values, 16)
    for name, array, dtype, alignment in integers:
        if array.dtype is not dtype:
            raise ValueError(f"{name} of a packed weight is {dtype}, got {array.dtype}")
        if array.device != values.device:
            raise ValueError(_devices(values, array))
        _check_array(name, array, alignment)


def check_delta(values: Tensor, deltas: Tensor, row_groups: Tensor, chunk_cols: Tensor, rows: int) -> None:
    """Raise ValueError unless the arrays are as long as each other says; what they hold is not looked at."""
    check_arrays(
        values,
        ("deltas", deltas, torch.int32, 4),
        ("row_groups", row_groups, torch.int32, 4),
        ("chunk_cols", chunk_cols, torch.int32, 4),
    )
    groups = deltas.numel()
    wanted = (8 * groups, rows + 1, chunk_slots(rows, groups))
    have = (values.numel(), row_groups.numel(), chunk_cols.numel())
    if have != wanted:
        raise ValueError(
            f"{groups} groups in {rows} rows have {wanted[0]} values, {wanted[1]} row_groups and {wanted[2]} "
            f"chunk_cols, got {have[0]}, {have[1]} and {have[2]}"
        )


def check_nm(values: Tensor, places: Tensor, n: int, m: int, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the arrays are as long as ``n`` of ``m`` in ``shape`` asks for."""
    # Words of 2, 2 (and a byte) or 4 bytes hold the places of a vector, of 2, 3 or 4 bits each.
    check_arrays(values, ("places", places, torch.uint8, place_bits(m) & ~1))
    check_nm_sizes(values, places, n, m, shape)


def _blocks(shape: tuple[int, int]) -> int:
    return -(-shape[0] // STRIP_ROWS) * -(-shape[1] // BLOCK_COLS)


def check_fragment(stream: Tensor, offsets: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless there is an offset for each block of ``shape``, and one more."""
    check_arrays(stream, ("offsets", offsets, torch.int32, 4))
    if offsets.numel() != _blocks(shape) + 1:
        raise ValueError(
            f"{shape[0]} x {shape[1]} has {_blocks(shape)} blocks of {STRIP_ROWS} x {BLOCK_COLS} and one offset more, "
            f"got {offsets.numel()} offsets"
        )


def check_pair(stream: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the blocks are those of ``shape``."""
    check_arrays(stream)
    wanted = _blocks(shape) * backend.core().PAIR_BLOCK_BYTES // 2
    if stream.numel() != wanted:
        raise ValueError(
            f"two of four of {shape[0]} x {shape[1]} take {wanted} 16-bit words, got {stream.numel()}"
        )


def _check_array(name: str, array: Tensor, alignment: int) -> None:
    if array.data_ptr() % alignment or not array.is_contiguous():
        raise ValueError(
            f"{name} of a packed weight must be contiguous and start at a multiple of {alignment} bytes; the strides "
            f"are {array.stride()}, the address is {array.data_ptr() % alignment} above a multiple"
        )


def _devices(*tensors: Tensor) -> str:
    return f"all tensors must be on one device, got {sorted({str(tensor.device) for tensor in tensors})}"


def aligned(x: Tensor) -> Tensor:
    """Return ``x`` contiguous and at a multiple of 16 bytes, as vector loads need it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's first entry lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
