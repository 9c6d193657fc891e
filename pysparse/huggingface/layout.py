"""What a sparse checkpoint says of itself: format, version, and how many weights each layer keeps.

Everything here comes from a file that a stranger may have written. Formats are chosen from a fixed table;
a name from a file is never looked up anywhere else, let alone imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

QUANT_METHOD = "pysparse"
VERSION = 1  # of the layout on disk; a reader refuses a later one
BITMASK = "sparse-bitmask"
BITMASK_24 = "sparse-24-bitmask"  # read only: exactly two kept of each four, without row offsets

# What lies in the file as <layer>.<part> in the place of <layer>.weight.
PARTS: dict[str, tuple[str, ...]] = {
    BITMASK: ("compressed", "bitmask", "row_offsets", "shape"),
    BITMASK_24: ("compressed", "bitmask", "shape"),
}
# An empty tensor under the dense weight's own name. A loader that does not know the format would find no
# weight, fill the layer with random numbers and go on; with this it stops at a size mismatch.
TRIPWIRE = "weight"

_KEYS = {"quant_method", "version", "format", "nnz", "dense"}
_MAX_NNZ = 2**48  # of one layer: beyond any memory, and products of sizes stay within 64 bits


class CheckpointError(ValueError):
    """A checkpoint that is damaged, contradicts itself, or was written by a later version."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The ``quantization_config`` of a checkpoint: which layers are packed, and with how many values."""

    nnz: Mapping[str, int]  # module path -> kept weights, of every packed layer
    dense: Mapping[str, float] = field(default_factory=dict)  # linear layers left dense -> their sparsity
    format: str = BITMASK
    version: int = VERSION

    @classmethod
    def from_dict(cls, entries: Any) -> Layout:
        """Check ``entries`` (parsed JSON) and build a layout; CheckpointError names what is wrong."""
        if not isinstance(entries, Mapping):
            raise CheckpointError(
                f"config.json: quantization_config must be an object, got {_shown(entries)}"
            )
        _check_version(entries.get("version"))
        _check_format(entries.get("format"))
        unknown = sorted(set(entries) - _KEYS)
        if unknown:
            raise CheckpointError(
                f"config.json: quantization_config has an unknown entry '{unknown[0]}' (known: {sorted(_KEYS)})"
            )
        dense = entries.get("dense", {})
        return cls(_checked_nnz(entries.get("nnz")), _checked_dense(dense), entries["format"])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with the ``quant_method`` by which transformers finds the reader."""
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            "format": self.format,
            "nnz": dict(self.nnz),
            "dense": dict(self.dense),
        }

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that stand for one packed weight."""
        return PARTS[self.format]


def _check_version(version: Any) -> None:
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"config.json: quantization_config.version must be an integer from 1 to {VERSION}, got {_shown(version)}"
        )
    if version > VERSION:
        raise CheckpointError(
            f"config.json: quantization_config.version is {version}, this pysparse reads up to {VERSION}: "
            "the checkpoint was written by a later release; run 'pip install -U pysparse'"
        )


def _check_format(name: Any) -> None:
    if not isinstance(name, str) or name not in PARTS:
        raise CheckpointError(
            f"config.json: quantization_config.format is {_shown(name)}, known formats are {list(PARTS)}: "
            "a later pysparse may know it ('pip install -U pysparse'), or the file is damaged"
        )


def _checked_nnz(entries: Any) -> dict[str, int]:
    if not isinstance(entries, Mapping):
        raise CheckpointError(
            f"config.json: quantization_config.nnz must map layers to counts, got {_shown(entries)}"
        )
    for path, count in entries.items():
        if not isinstance(path, str) or not path:
            raise CheckpointError(
                f"config.json: quantization_config.nnz has a layer without a name: {_shown(path)}"
            )
        if type(count) is not int or not 0 <= count <= _MAX_NNZ:
            raise CheckpointError(
                f"config.json: quantization_config.nnz['{path}'] must be an integer from 0 to 2**48, "
                f"got {_shown(count)}"
            )
    return dict(entries)


def _checked_dense(entries: Any) -> dict[str, float]:
    if not isinstance(entries, Mapping):
        raise CheckpointError(
            f"config.json: quantization_config.dense must map layers to sparsities, got {_shown(entries)}"
        )
    for path, sparsity in entries.items():
        if type(sparsity) not in (int, float) or not 0 <= sparsity <= 1:
            raise CheckpointError(
                f"config.json: quantization_config.dense['{path}'] must be in [0, 1], got {_shown(sparsity)}"
            )
    return {str(path): float(sparsity) for path, sparsity in entries.items()}


def _shown(value: Any) -> str:
    """Quote a value from the file, shortened: it may be megabytes long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
