"""Read packed layers from safetensors files that nobody vouches for.

Order of checks: the header against the file's size, the layout against the header, the few numbers of a
layer's ``shape`` against both, then bits, offsets and counts against each other. Nothing is allocated from a
size that a file merely claims, and no kernel sees an array before the last check has passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pysparse.formats import BitmapTensor, Int8Bitmap
from pysparse.formats.int8 import check_group
from pysparse.huggingface.layout import (
    BITMASK,
    LEGACY_24,
    LEGACY_BITMASK,
    SCALES,
    TRIPWIRE,
    CheckpointError,
    Layout,
)
from pysparse.measure.size import ITEM_BYTES, TensorEntry, read_header
from pysparse.nn.packing import RowMajor

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_SIDE = 2**31 - 1  # of one dimension of a weight
Shape = tuple[int, ...]

_VALUE_DTYPES = ("F32", "BF16", "F16")


class Checkpoint:
    """The tensors of one or more safetensors files, known by their checked headers."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        """Read the headers and no data; CheckpointError when one is damaged or a tensor comes twice."""
        self.files = [Path(file) for file in files]
        self.tensors: dict[str, TensorEntry] = {}
        for file in self.files:
            for name, entry in _checked_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor '{name}' is in {self.tensors[name].path} and in {file}: one of them is too many"
                    )
                self.tensors[name] = entry
        self._open = {file: _opened(file) for file in self.files}

    def packed_layers(self, parts: Sequence[str]) -> list[str]:
        """Return the module paths under which all of ``parts`` are stored, in file order."""
        paths = [name.removesuffix(".bitmask") for name in self.tensors if name.endswith(".bitmask")]
        return [path for path in paths if all(f"{path}.{part}" in self.tensors for part in parts)]

    def check(self, layout: Layout) -> dict[str, Shape]:
        """Check every packed layer's tensors against ``layout``; return each weight's shape.

        CheckpointError names the file, the tensor and the bound when something is missing, unaccounted for,
        or of a dtype or shape that contradicts the rest. Reads the ``shape`` tensors and no other data.
        """
        for path in self.packed_layers(("bitmask",)):
            if path not in layout.nnz:
                raise CheckpointError(
                    f"{self.tensors[path + '.bitmask'].path}: layer '{path}' is packed, but "
                    "quantization_config.nnz in config.json does not list it"
                )
        return {path: self._check_layer(path, nnz, layout) for path, nnz in layout.nnz.items()}

    def _check_layer(self, path: str, nnz: int, layout: Layout) -> Shape:
        codec = _CODECS[layout.format]
        parts = {part: self._entry(f"{path}.{part}") for part in layout.parts}
        shape = self._read_shape(path, parts["shape"], codec.ranks)
        compressed = parts["compressed"]
        try:
            values = codec.values(nnz, shape)
        except ValueError as error:
            raise CheckpointError(f"{compressed.path}: layer '{path}': {error}") from None
        int8 = layout.is_int8(path)
        _expect(compressed, f"{path}.compressed", ("I8",) if int8 else _VALUE_DTYPES, values)
        if int8:
            self._check_scales(path, layout, shape)
        _expect(parts["bitmask"], f"{path}.bitmask", ("U8",), (*shape[:-1], (shape[-1] + 7) // 8))
        if "row_offsets" in parts:
            _expect(parts["row_offsets"], f"{path}.row_offsets", ("I64",), shape[:-1])
        if nnz > math.prod(shape):
            raise CheckpointError(
                f"{compressed.path}: layer '{path}' of shape {shape} cannot keep {nnz} weights"
            )
        tripwire = self.tensors.get(f"{path}.{TRIPWIRE}")
        if tripwire is not None and tripwire.size != 0:
            raise CheckpointError(
                f"{tripwire.path}: layer '{path}' is stored packed and as a dense '{path}.{TRIPWIRE}' of "
                f"{tripwire.size} bytes: which one holds is not to be told"
            )
        return shape

    def _check_scales(self, path: str, layout: Layout, shape: Shape) -> None:
        scales = self._entry(f"{path}.{SCALES}")
        try:
            group = check_group(shape[1], layout.packings[path].group_size)
        except ValueError as error:
            raise CheckpointError(f"{scales.path}: layer '{path}': {error}") from None
        _expect(scales, f"{path}.{SCALES}", ("F32",), (shape[0], -(-shape[1] // group)))

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise CheckpointError(f"{self.where}: tensor '{name}' is missing")
        return self.tensors[name]

    def _read_shape(self, path: str, entry: TensorEntry, ranks: Sequence[int]) -> Shape:
        name = f"{path}.shape"
        if entry.dtype != "I64" or entry.shape not in [s for rank in ranks for s in ((rank,), (rank, 1))]:
            raise CheckpointError(
                f"{entry.path}: tensor '{name}' must be I64 with as many numbers as the weight has dimensions "
                f"({' or '.join(map(str, ranks))}), got {entry.dtype} {entry.shape}"
            )
        shape = tuple(entry.read_integers())
        if not all(0 < side <= _MAX_SIDE for side in shape):
            raise CheckpointError(
                f"{entry.path}: tensor '{name}' says {shape}; each side must be from 1 to {_MAX_SIDE}"
            )
        return shape

    def read(self, path: str, layout: Layout, shape: Shape) -> RowMajor:
        """Read layer ``path``, checked by :meth:`check`, and validate its bits, offsets, counts and scales.

        Returns arrays in the dtype of the file, on the CPU, that may be views of the mapped file. A weight of
        another rank comes as the matrix of its last dimension.
        """
        arrays = {part: self.tensor(f"{path}.{part}") for part in layout.parts if part != "shape"}
        try:
            if layout.is_int8(path):
                return _decode_int8(
                    arrays, self.tensor(f"{path}.{SCALES}"), layout.packings[path].group_size, shape
                )
            return _CODECS[layout.format].decode(arrays, shape)
        except ValueError as error:
            raise CheckpointError(
                f"{self.tensors[path + '.bitmask'].path}: layer '{path}': {error}"
            ) from None

    def tensor(self, name: str) -> Tensor:
        """Return one tensor; CheckpointError when it is missing or the file cannot be read."""
        entry = self._entry(name)
        try:
            tensor: Tensor = self._open[entry.path].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{entry.path}: tensor '{name}' cannot be read: {error}") from None
        # Headers of odd length leave the data unaligned, which compiled code must not see.
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor

    @property
    def where(self) -> str:
        """Name the file, or the folder of several, for error messages."""
        one = len(self.files) == 1
        return str(self.files[0]) if one else f"{self.files[0].parent} ({len(self.files)} files)"


def _decode(arrays: Mapping[str, Tensor], shape: Shape) -> BitmapTensor:
    if len(shape) != 2:  # the offsets of other ranks were written to no purpose: nothing can index by them
        return _decode_without_offsets(arrays, shape)
    bitmap = BitmapTensor(
        arrays["compressed"], arrays["bitmask"], arrays["row_offsets"], (shape[0], shape[1])
    )
    bitmap.validate()
    return bitmap


def _decode_int8(
    arrays: Mapping[str, Tensor], scales: Tensor, group_size: int | None, shape: Shape
) -> Int8Bitmap:
    parts = arrays["compressed"], arrays["bitmask"], arrays["row_offsets"]
    rows = Int8Bitmap(*parts, scales, check_group(shape[1], group_size), (shape[0], shape[1]))
    rows.validate()
    return rows


def _decode_without_offsets(arrays: Mapping[str, Tensor], shape: Shape) -> BitmapTensor:
    rows, cols = math.prod(shape[:-1]), shape[-1]
    bitmask = arrays["bitmask"].reshape(rows, -1)
    counts = _popcount(bitmask).sum(dim=1)
    bitmap = BitmapTensor(arrays["compressed"].flatten(), bitmask, counts.cumsum(0) - counts, (rows, cols))
    bitmap.validate()
    return bitmap


def _decode_24(arrays: Mapping[str, Tensor], shape: Shape) -> BitmapTensor:
    bitmap = _decode_without_offsets(arrays, shape)
    counts = bitmap.keep_mask().flatten().view(-1, 4).sum(dim=1)  # a group may cross the end of a row
    wrong = (counts != 2).nonzero()
    if wrong.numel():
        first = 4 * int(wrong[0])
        raise ValueError(
            f"2:4 keeps 2 of each 4 weights, but weights {first} to {first + 3} (row-major) keep "
            f"{int(counts[wrong[0]])}"
        )
    return bitmap


def _popcount(bytes_: Tensor) -> Tensor:
    """Return the number of bits set in each byte, as int64."""
    table = torch.tensor([byte.bit_count() for byte in range(256)])
    return table[bytes_.long()]


def _half_of_each_row(nnz: int, shape: Shape) -> Shape:
    if math.prod(shape) % 4:
        raise ValueError(f"a 2:4 weight has a multiple of 4 entries, not {shape[0]} x {shape[1]}")
    return (shape[0], shape[1] // 2)


@dataclass(frozen=True, slots=True)
class Codec:
    """How one format id is laid out."""

    ranks: tuple[int, ...]  # dimensions that a weight may have
    values: Callable[[int, Shape], Shape]  # nnz and the weight's shape -> shape of the stored values
    decode: Callable[[Mapping[str, Tensor], Shape], BitmapTensor]  # ValueError where arrays disagree


_CODECS: dict[str, Codec] = {
    BITMASK: Codec((2,), lambda nnz, shape: (nnz,), _decode),
    LEGACY_BITMASK: Codec((1, 2, 3), lambda nnz, shape: (nnz,), _decode),
    LEGACY_24: Codec((2,), _half_of_each_row, _decode_24),
}


def _expect(entry: TensorEntry, name: str, dtypes: Sequence[str], shape: tuple[int, ...]) -> None:
    if entry.dtype not in dtypes or entry.shape != shape:
        raise CheckpointError(
            f"{entry.path}: tensor '{name}' must be {' or '.join(dtypes)} {shape}, got {entry.dtype} {entry.shape}"
        )


def _opened(file: Path) -> Any:
    """Map a file; the library checks the header once more, by its own rules."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: no readable safetensors file: {error}") from None


def _checked_header(file: Path) -> dict[str, TensorEntry]:
    """Read a header and check that its tensors tile the rest of the file exactly."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
        if start > min(size, 8 + _MAX_HEADER):
            raise ValueError(f"its header claims {start - 8} bytes, the file has {size}")
        entries = read_header(file)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: no readable safetensors file: {error}") from None
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: _position(file, *item)):
        if entry.offset != position:
            raise CheckpointError(
                f"{file}: tensor '{name}' starts at byte {entry.offset}, the one before it ends at {position}"
            )
        position += entry.size
    if position != size:
        raise CheckpointError(f"{file}: its tensors end at byte {position}, the file has {size}: truncated?")
    return entries


def _position(file: Path, name: str, entry: TensorEntry) -> tuple[int, int]:
    """Check what one entry says of itself, and return where its bytes lie."""
    numbers = (entry.offset, entry.size, *entry.shape)
    known = isinstance(entry.dtype, str) and entry.dtype in ITEM_BYTES
    if not known or any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(
            f"{file}: tensor '{name}' claims dtype {entry.dtype!r}, shape {entry.shape}, {entry.size} bytes"
        )
    wanted = ITEM_BYTES[entry.dtype]
    for length in entry.shape:
        wanted *= length
    if wanted != entry.size:
        raise CheckpointError(
            f"{file}: tensor '{name}' of {entry.dtype} {entry.shape} needs {wanted} bytes, it has {entry.size}"
        )
    return entry.offset, entry.size
