"""Sizes on disk: the whole checkpoint, and its linear layers packed against dense."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
_PACKED = ("compressed", "bitmask", "row_offsets", "scales", "shape")
_CONFIG_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: str  # as the file spells it: "BF16", "F32", ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    size: int  # bytes

    def read_integers(self) -> list[int]:
        """Return the values of a small int64 tensor, the only data that sizing needs."""
        if self.dtype != "I64" or self.size > 64:
            raise ValueError(f"{self.path}: expected a few int64, got {self.size} bytes of {self.dtype}")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return [value for (value,) in struct.iter_unpack("<q", file.read(self.size))]


@dataclass(frozen=True, slots=True)
class FileSize:
    """Bytes of a checkpoint folder's weight files."""

    total: int  # of the weight files, headers included
    linears: int  # of the layers asked for (all packed layers by default), biases not counted
    linears_dense: int  # of the same layers as dense matrices of the same dtype, for int8 of the model's
    layers: int  # how many they are
    other: int  # everything else in the weight files: embeddings, norms, biases, headers

    @property
    def linear_ratio(self) -> float:
        """Stored over dense bytes of the linear layers; 1 when nothing is packed."""
        return self.linears / self.linears_dense if self.linears_dense else 1.0


def checkpoint_bytes(folder: str | Path) -> int:
    """Return the bytes of the weight files in ``folder``; FileNotFoundError when it has none."""
    return sum(path.stat().st_size for path in _weight_files(Path(folder)))


def file_size(folder: str | Path, layers: Iterable[str] | None = None) -> FileSize:
    """Read the safetensors headers of ``folder`` (and no weights) and sum up what the linear layers take.

    ``layers`` are module paths; None means every packed layer. Pass the paths to size a dense checkpoint's
    same layers. Raises FileNotFoundError without weight files, ValueError when a path is not in them.
    """
    files = [path for path in _weight_files(Path(folder)) if path.suffix == ".safetensors"]
    tensors = {name: entry for path in files for name, entry in read_header(path).items()}
    packed = {name.removesuffix(".compressed") for name in tensors if name.endswith(".compressed")}
    chosen = sorted(packed) if layers is None else list(layers)
    sizes = [_layer_bytes(name, tensors, packed, Path(folder)) for name in chosen]
    stored, total = sum(size for size, _ in sizes), checkpoint_bytes(folder)
    return FileSize(total, stored, sum(dense for _, dense in sizes), len(chosen), total - stored)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return what a safetensors file says of each tensor; ValueError if it is no such file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is no safetensors file: its header claims {length} of {size} bytes")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
            return {
                name: _entry(path, entry, 8 + length, size)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no safetensors file: its header is damaged ({error})") from None


def _entry(path: Path, entry: dict[str, Any], data_start: int, file_size: int) -> TensorEntry:
    """Turn one entry of the header into where its bytes lie; ValueError when that is not inside the file."""
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= file_size - data_start:
        raise ValueError(f"data_offsets [{begin}, {end}] are outside [0, {file_size - data_start}]")
    return TensorEntry(path, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object whose names are unique: a tensor given twice has no meaning."""
    result = dict(pairs)
    if len(result) < len(pairs):
        name, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"'{name}' is given {times} times")
    return result


def _layer_bytes(
    name: str, tensors: dict[str, TensorEntry], packed: set[str], folder: Path
) -> tuple[int, int]:
    """Return the stored and the dense bytes of one layer's weight."""
    if name not in packed:
        if f"{name}.weight" not in tensors:
            raise ValueError(f"the checkpoint has no linear layer '{name}'")
        size = tensors[f"{name}.weight"].size
        return size, size
    parts = {part: tensors[f"{name}.{part}"] for part in _PACKED if f"{name}.{part}" in tensors}
    if "shape" not in parts:
        raise ValueError(f"the checkpoint's packed layer '{name}' has no '{name}.shape'")
    shape, dtype = parts["shape"].read_integers(), parts["compressed"].dtype
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"the checkpoint's packed layer '{name}' has the shape {shape}, not (rows, columns)")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"the checkpoint's packed layer '{name}' has values of unknown dtype {dtype}")
    item = _model_item_bytes(folder) if dtype == "I8" else ITEM_BYTES[dtype]
    return sum(part.size for part in parts.values()), shape[0] * shape[1] * item


def _model_item_bytes(folder: Path) -> int:
    """Return the bytes of a weight of the model that int8 values stand for; ValueError where it does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in _CONFIG_BYTES:
        raise ValueError(f"{folder / 'config.json'}: dtype is {dtype!r}, none of {list(_CONFIG_BYTES)}")
    return _CONFIG_BYTES[dtype]


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights (looked for {', '.join(_WEIGHT_SUFFIXES)})")
    return files
