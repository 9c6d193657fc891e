"""Read packed layers from safetensors files that nobody vouches for.

Order of checks: the header against the file's size, the layout against the header, the few numbers of a
layer's ``shape`` against both, then bits, offsets and counts against each other. Nothing is allocated from a
size that a file merely claims, and no kernel sees an array before the last check has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pysparse.formats import BitmapTensor
from pysparse.huggingface.layout import BITMASK, BITMASK_24, TRIPWIRE, CheckpointError, Layout
from pysparse.measure.size import ITEM_BYTES, TensorEntry, read_header

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_SIZE = 2**31 - 1  # of one side of a matrix
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

    def check(self, layout: Layout) -> dict[str, tuple[int, int]]:
        """Check every packed layer's tensors against ``layout``; return each layer's (rows, columns).

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

    def _check_layer(self, path: str, nnz: int, layout: Layout) -> tuple[int, int]:
        parts = {part: self._entry(f"{path}.{part}") for part in layout.parts}
        rows, cols = self._read_shape(path, parts["shape"], layout.format)
        compressed = parts["compressed"]
        values = (nnz,) if layout.format == BITMASK else (rows, cols // 2)
        _expect(compressed, f"{path}.compressed", _VALUE_DTYPES, values)
        _expect(parts["bitmask"], f"{path}.bitmask", ("U8",), (rows, (cols + 7) // 8))
        if "row_offsets" in parts:
            _expect(parts["row_offsets"], f"{path}.row_offsets", ("I64",), (rows,))
        if nnz > rows * cols or (layout.format == BITMASK_24 and (2 * nnz != rows * cols or nnz % 2)):
            raise CheckpointError(
                f"{compressed.path}: layer '{path}' is {rows} x {cols}, it cannot keep {nnz} weights"
            )
        tripwire = self.tensors.get(f"{path}.{TRIPWIRE}")
        if tripwire is not None and tripwire.size != 0:
            raise CheckpointError(
                f"{tripwire.path}: layer '{path}' is stored packed and as a dense '{path}.{TRIPWIRE}' of "
                f"{tripwire.size} bytes: which one holds is not to be told"
            )
        return rows, cols

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise CheckpointError(f"{self.where}: tensor '{name}' is missing")
        return self.tensors[name]

    def _read_shape(self, path: str, entry: TensorEntry, format: str) -> tuple[int, int]:
        name = f"{path}.shape"
        if entry.dtype != "I64" or entry.shape not in ((2,), (2, 1)):
            raise CheckpointError(
                f"{entry.path}: tensor '{name}' must be I64 (2,) for a matrix, got {entry.dtype} {entry.shape}"
            )
        rows, cols = entry.read_integers()
        if not (0 < rows <= _MAX_SIZE and 0 < cols <= _MAX_SIZE):
            raise CheckpointError(
                f"{entry.path}: tensor '{name}' says {rows} x {cols}; both must be from 1 to {_MAX_SIZE}"
            )
        if format == BITMASK_24 and cols % 2:
            raise CheckpointError(
                f"{entry.path}: tensor '{name}' says {cols} columns; 2:4 needs an even number"
            )
        return rows, cols

    def read(self, path: str, layout: Layout, shape: tuple[int, int]) -> BitmapTensor:
        """Read layer ``path``, checked by :meth:`check`, and validate its bits, offsets and counts.

        Returns arrays in the dtype of the file, on the CPU, that may be views of the mapped file.
        """
        arrays = {part: self.tensor(f"{path}.{part}") for part in layout.parts if part != "shape"}
        bitmap = _READERS[layout.format](arrays, shape)
        try:
            bitmap.validate()
            if layout.format == BITMASK_24:
                _check_groups_of_four(bitmap)
        except ValueError as error:
            raise CheckpointError(
                f"{self.tensors[path + '.bitmask'].path}: layer '{path}': {error}"
            ) from None
        return bitmap

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
        return (
            str(self.files[0])
            if len(self.files) == 1
            else f"{self.files[0].parent} ({len(self.files)} files)"
        )


def _from_bitmask(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> BitmapTensor:
    return BitmapTensor(arrays["compressed"], arrays["bitmask"], arrays["row_offsets"], shape)


def _from_bitmask_24(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> BitmapTensor:
    """Fill in the row offsets that this format leaves out; a group of four may cross a row's end."""
    counts = _popcount(arrays["bitmask"]).sum(dim=1)
    return BitmapTensor(arrays["compressed"].flatten(), arrays["bitmask"], counts.cumsum(0) - counts, shape)


_READERS: dict[str, Callable[[Mapping[str, Tensor], tuple[int, int]], BitmapTensor]] = {
    BITMASK: _from_bitmask,
    BITMASK_24: _from_bitmask_24,
}


def _popcount(bytes_: Tensor) -> Tensor:
    """Return the number of bits set in each byte, as int64."""
    table = torch.tensor([byte.bit_count() for byte in range(256)])
    return table[bytes_.long()]


def _check_groups_of_four(bitmap: BitmapTensor) -> None:
    counts = bitmap.keep_mask().flatten().view(-1, 4).sum(dim=1)
    wrong = (counts != 2).nonzero()
    if wrong.numel():
        first = 4 * int(wrong[0])
        raise ValueError(
            f"2:4 keeps 2 of each 4 weights, but weights {first} to {first + 3} (row-major) keep "
            f"{int(counts[wrong[0]])}"
        )


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
