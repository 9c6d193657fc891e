"""What lies in a model folder: its config.json and its weight files, read with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysparse.huggingface.layout import (
    LEGACY_24,
    LEGACY_BITMASK,
    PARTS,
    QUANT_METHOD,
    CheckpointError,
    Layout,
)
from pysparse.huggingface.reader import Checkpoint

_LEGACY = {"sparse-bitmask": LEGACY_BITMASK, "sparse-24-bitmask": LEGACY_24}
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_JSON = 100_000_000  # bytes of a config or an index: far beyond any real one
# A model is built from the numbers in config.json before its weights are looked at. Sizes beyond these, that
# no tensor in the file bears out, would take the machine's memory or hours: they are damage.
_SIZE_WORDS = ("size", "dim", "hidden", "embd", "model", "heads", "inner", "rank")
_COUNT_WORDS = ("layers", "layer", "experts", "blocks", "depth")
_FREE_SIZE, _FREE_COUNT = 2**17, 256


@dataclass(frozen=True, slots=True)
class Source:
    """A folder whose files have been read as far as is needed to know how to load it."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    checkpoint: Checkpoint | None  # None: no safetensors weights under the usual names
    layout: Layout | None  # None: an ordinary dense checkpoint
    legacy: bool = False  # written for compressed-tensors

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Read config.json and the headers of the weights; CheckpointError for damage."""
        config = _read_json(folder / "config.json")
        files = weight_files(folder)
        checkpoint = Checkpoint(files) if files else None
        if checkpoint is None:
            _expect_no_layers(folder, config)
            return cls(folder, config, None, None)
        layout, legacy = _layout(config, checkpoint)
        if layout is not None:
            _check_sizes(folder / "config.json", config, checkpoint)
        return cls(folder, config, checkpoint, layout, legacy)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of ``folder``, by its index where it has one; an empty list without any."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / INDEX).is_file():
        return []
    weights = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensors to files")
    for name, file in weights.items():
        if not isinstance(file, str) or file != Path(file).name or not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / INDEX}: tensor '{name}' is said to be in {str(file)[:80]!r}, which is no file here"
            )
    files = sorted({folder / file for file in weights.values()})
    _check_index(folder / INDEX, weights, files)
    return files


def _expect_no_layers(folder: Path, config: Mapping[str, Any]) -> None:
    entries = config.get("quantization_config")
    if isinstance(entries, Mapping) and entries.get("quant_method") == QUANT_METHOD:
        raise CheckpointError(
            f"{folder}: config.json lists packed layers, but there is no {_SINGLE} nor {INDEX}"
        )


def _check_index(index: Path, weights: Mapping[str, str], files: list[Path]) -> None:
    stored = {name: entry.path.name for name, entry in Checkpoint(files).tensors.items()}
    for name in sorted(stored.keys() ^ weights.keys()):
        place = "the files but not in the index" if name in stored else "the index but not in the files"
        raise CheckpointError(f"{index}: tensor '{name}' is in {place}")
    for name, file in weights.items():
        if stored[name] != file:
            raise CheckpointError(f"{index}: tensor '{name}' is in {stored[name]}, the index says {file}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > _MAX_JSON:
            raise ValueError(f"{size} bytes, more than {_MAX_JSON}")
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: must hold an object, holds a {type(entries).__name__}")
    return entries


def _layout(config: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[Layout | None, bool]:
    """Return the layout, and whether it is a legacy one; CheckpointError where packed layers lack one."""
    entries = config.get("quantization_config") or config.get("compression_config")
    method = entries.get("quant_method") if isinstance(entries, Mapping) else None
    if method == QUANT_METHOD:
        return Layout.from_dict(entries), False
    sparsity = entries.get("sparsity_config") if isinstance(entries, Mapping) else None
    if isinstance(sparsity, Mapping) and method in (None, "compressed-tensors"):
        layout = _legacy_layout(sparsity, checkpoint)
        if layout is not None:
            return layout, True
    packed = checkpoint.packed_layers(("compressed", "bitmask", "shape"))
    if packed:
        raise CheckpointError(
            f"{checkpoint.where}: layer '{packed[0]}' is packed, but config.json's quantization_config "
            f"(quant_method {str(method)[:40]!r}) does not say how"
        )
    return None, False


def _legacy_layout(sparsity: Mapping[str, Any], checkpoint: Checkpoint) -> Layout | None:
    """Build a layout from the headers, since compressed-tensors wrote no counts; None for dense formats."""
    name = sparsity.get("format")
    if name == "dense":
        return None
    if not isinstance(name, str) or name not in _LEGACY:
        raise CheckpointError(
            f"config.json: sparsity_config.format is {str(name)[:40]!r}; of compressed-tensors' sparse formats "
            f"{' and '.join(_LEGACY)} can be read"
        )
    layers = checkpoint.packed_layers(PARTS[_LEGACY[name]])
    nnz = {path: math.prod(checkpoint.tensors[f"{path}.compressed"].shape) for path in layers}
    return Layout(nnz, format=_LEGACY[name])


def _check_sizes(path: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    longest = max((max(entry.shape, default=0) for entry in checkpoint.tensors.values()), default=0)
    bounds = {
        _SIZE_WORDS: max(longest, _FREE_SIZE),
        _COUNT_WORDS: max(len(checkpoint.tensors), _FREE_COUNT),
    }
    for name, value in _numbers(config):
        last_word = name.rpartition("_")[2]
        for words, bound in bounds.items():
            if last_word in words and value > bound:
                raise CheckpointError(
                    f"{path}: {name} is {value:.6g}, but the weights bear out at most {bound} "
                    f"({len(checkpoint.tensors)} tensors, the longest side {longest})"
                )


def _numbers(entries: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield (name, value) of every number in parsed JSON, the quantization_config left out."""
    if isinstance(entries, Mapping):
        for key, value in entries.items():
            if key != "quantization_config":
                yield from _numbers(value, str(key))
    elif isinstance(entries, list):
        for value in entries:
            yield from _numbers(value, name)
    elif isinstance(entries, int | float) and not isinstance(entries, bool):
        yield name, entries
