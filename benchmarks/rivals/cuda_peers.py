"""Other people's sparse products on a GPU, where they lie beside the project: none of them is part of it.

Flash-LLM and SpInfer are plain functions of a shared library that was built from their ``csrc/SpMM_API.cu``; MACKO is
its authors' Python package; cuSPARSELt comes with torch. A peer that is not there says why, and the others are timed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, MutableMapping
from ctypes import POINTER, byref, c_int, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Call = Callable[[Tensor], Tensor]
Arrays = tuple[Tensor, ...]
SPLITS = (1, 2, 4, 8)  # parts of the columns; the fastest is each peer's figure

# Itanium names of the C++ functions of both libraries, which declare them without extern "C".
_FLASH_PACK = "_Z31InitSparseMatrixA_API_NoReorderP6__halfiiiPPjPPi"
_FLASH_RUN = "_Z15SpMM_SplitK_APIP11CUstream_stPK6__halfPK5uint4PKiS3_PS1_iiiS9_i"
_SPINFER_PACK = "_Z24InitSparseMatrixA_bitmapP6__halfiiiiiiiiPS0_PPiS3_S3_PPmRi"
_SPINFER_RUN = "_Z25SpMM_SplitK_API_bitmap_v3P11CUstream_stPK6__halfS3_PKiS5_PKmS5_S3_PS1_iiiS8_i"


class Missing(Exception):
    """A peer is not there or does not take a case; the message says why."""


@dataclass
class Packed:
    """A weight as a peer holds it: its bytes on the device, and how to multiply by it for each number of parts."""

    nbytes: int
    calls: dict[int, Call]  # parts of the columns -> x [tokens, cols] to y [tokens, rows]


def _function(library: str | None, name: str) -> Any:
    if not library:
        raise Missing("no library was named")
    if not Path(library).is_file():
        raise Missing(f"{library} does not exist")
    try:
        found = getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError) as error:
        raise Missing(f"{library}: {error}") from error
    found.restype = c_int
    return found


def _taken(pointer: Any, count: int, kind: Any, dtype: torch.dtype) -> Tensor:
    """Return ``count`` numbers that a peer's packer allocated."""
    array = (kind * count).from_address(ctypes.cast(pointer, c_void_p).value)
    return torch.frombuffer(bytearray(array), dtype=dtype)


def _tile_checks(name: str, weight: Tensor, rows: int, cols: int) -> None:
    if weight.dtype != torch.float16:
        raise Missing(f"{name} takes float16, not {weight.dtype}")
    if weight.shape[0] % rows or weight.shape[1] % cols:
        raise Missing(f"{name} takes multiples of {rows} x {cols}, not {tuple(weight.shape)}")


def _padded(x: Tensor) -> Tensor:
    """Return ``x`` with zero tokens up to a multiple of 8, as both libraries' tiles need."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 8)).contiguous()


# Packers take seconds, and a benchmark wants many copies of what they made of one weight.
_made: MutableMapping[Tensor, dict[str, Arrays]] = WeakIdKeyDictionary()


def _copies(weight: Tensor, name: str, pack: Callable[[], Arrays]) -> list[Tensor]:
    """Return what ``pack`` made of ``weight`` when it was first called, in new memory on the GPU."""
    made = _made.setdefault(weight, {})
    if name not in made:
        made[name] = pack()
    return [t.cuda() for t in made[name]]


def _split_calls(rows: int, run: Callable[[Tensor, Tensor, Tensor, int], int]) -> dict[int, Call]:
    def multiply(x: Tensor, parts: int) -> Tensor:
        wide = _padded(x)
        y = x.new_empty(wide.shape[0], rows)
        error = run(wide, y, x.new_empty(parts * y.numel()), parts)
        if error:
            raise RuntimeError(f"the peer's kernel failed with CUDA error {error}")
        return y[: x.shape[0]]

    return {parts: lambda x, parts=parts: multiply(x, parts) for parts in SPLITS}


def _stream() -> c_void_p:
    return c_void_p(torch.cuda.current_stream().cuda_stream)


def flash_llm_arrays(weight: Tensor, library: str | None) -> tuple[Tensor, Tensor]:
    """Return (words of value and place, offsets of tiles) of Flash-LLM's packer, on the CPU."""
    _tile_checks("Flash-LLM", weight, 256, 64)
    pack, host = _function(library, _FLASH_PACK), weight.cpu().contiguous()
    words, offsets = POINTER(c_uint32)(), POINTER(c_int)()
    rows, cols = host.shape
    count = pack(c_void_p(host.data_ptr()), rows, 8, cols, byref(words), byref(offsets))
    places = _taken(offsets, count, c_int, torch.int32)
    return _taken(words, max(1, 4 * int(places[-1])), c_uint32, torch.int32), places


def flash_llm(weight: Tensor, library: str | None) -> Packed:
    """Pack ``weight`` (CUDA, float16) for Flash-LLM."""
    arrays = _copies(weight, "flash-llm", lambda: flash_llm_arrays(weight, library))
    run = _function(library, _FLASH_RUN)
    rows, cols = weight.shape

    def product(x: Tensor, y: Tensor, space: Tensor, parts: int) -> int:
        at = [c_void_p(t.data_ptr()) for t in (*arrays, x, y)]
        sizes = (rows, x.shape[0], cols, c_void_p(space.data_ptr()), parts)
        return int(run(_stream(), c_void_p(0), *at, *sizes))

    return Packed(sum(t.nbytes for t in arrays), _split_calls(rows, product))


def spinfer_arrays(weight: Tensor, library: str | None) -> tuple[Tensor, ...]:
    """Return (values, offsets of 64 x 64 tiles, of strips in them, bitmaps, largest count) of SpInfer's packer.

    They are on the CPU, in the order in which the kernel takes them.
    """
    _tile_checks("SpInfer", weight, 64, 64)
    pack, host = _function(library, _SPINFER_PACK), weight.cpu().contiguous()
    rows, cols = host.shape
    values, bitmaps, most = POINTER(c_uint16)(), POINTER(c_uint64)(), c_int()
    small, median, large = (POINTER(c_int)() for _ in range(3))
    tiles = pack(
        c_void_p(host.data_ptr()), rows, cols, 8, 16, 64, 8, 64, 64, byref(values), byref(small), byref(median),
        byref(large), byref(bitmaps), byref(most),
    )  # fmt: skip
    offsets = _taken(large, tiles + 1, c_int, torch.int32)
    return (
        _taken(values, max(1, int(offsets[-1])), c_uint16, torch.float16), offsets,
        _taken(median, 4 * tiles, c_int, torch.int32), _taken(bitmaps, 64 * tiles, c_uint64, torch.int64),
        torch.tensor([-(-most.value // 64) * 64], dtype=torch.int32),  # as its own benchmark rounds it
    )  # fmt: skip


def spinfer(weight: Tensor, library: str | None) -> Packed:
    """Pack ``weight`` (CUDA, float16) for SpInfer."""
    arrays = _copies(weight, "spinfer", lambda: spinfer_arrays(weight, library))
    run = _function(library, _SPINFER_RUN)
    rows, cols = weight.shape

    def product(x: Tensor, y: Tensor, space: Tensor, parts: int) -> int:
        at = [c_void_p(t.data_ptr()) for t in (*arrays, x, y)]
        sizes = (rows, x.shape[0], cols, c_void_p(space.data_ptr()), parts)
        return int(run(_stream(), c_void_p(0), *at, *sizes))

    return Packed(sum(t.nbytes for t in arrays), _split_calls(rows, product))


def macko(weight: Tensor, _: str | None) -> Packed:
    """Compress ``weight`` (CUDA, float16) by the package macko_spmv; it multiplies one token."""
    _tile_checks("MACKO", weight, 1, 1)
    try:
        import macko_spmv
    except ImportError as error:
        raise Missing(f"macko_spmv is not installed ({error})") from error
    arrays = _copies(weight, "macko", lambda: macko_spmv.compress(weight.cpu())[:3])
    held = (*arrays, *weight.shape)

    def multiply(x: Tensor) -> Tensor:
        if x.shape[0] != 1:
            raise Missing(f"MACKO multiplies one token, not {x.shape[0]}")
        result: Tensor = macko_spmv.multiply(held, x[0])
        return result[None]

    return Packed(sum(t.nbytes for t in arrays), {1: multiply})


def cusparselt(weight: Tensor, _: str | None) -> Packed:
    """Hold ``weight`` (CUDA, two of four, 16 bits) as torch's cuSPARSELt tensor."""
    if not torch.backends.cusparselt.is_available():
        raise Missing("this torch has no cuSPARSELt")
    held = torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(weight)
    return Packed(held.packed.nbytes, {1: lambda x: torch.nn.functional.linear(x, held)})


PEERS: dict[str, Callable[[Tensor, str | None], Packed]] = {
    "flash-llm": flash_llm, "spinfer": spinfer, "macko": macko, "cusparselt": cusparselt,
}  # fmt: skip
