"""What a sparse checkpoint says of itself: format, version, what each layer keeps and how.

A layer on disk is row-major values and a packed bitmask, whatever kernels read it: any tool can decode it without
knowing a pattern, a group may keep fewer than n, and a kernel's packing can change without a new format. Compact
indices would be smaller for 1:4, 2:8, 1:8 and 2:16, by 0.25 to 0.63 bits a weight (a third of the layer at most: 1:8 in
int8), no smaller for 2:4 and larger for 4:8: not worth a second format. The pattern is noted
beside the count, and the compact packing is made when the layer is loaded.

Everything here comes from a file that a stranger may have written. Formats are chosen from a fixed table;
a name from a file is never looked up anywhere else, let alone imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pysparse.nn.packing import Packing
from pysparse.nn.structure import Structure

QUANT_METHOD = "pysparse"
VERSION = 3  # of the layout on disk; a reader refuses a later one
_PACKINGS_VERSION = (
    2  # a layout without int8 values and patterns is written as version 1, which older readers know
)
_STRUCTURE_VERSION = 3  # modules that the config describes are missing, or narrower
BITMASK = "sparse-bitmask"  # what we write
# Read only, written by compressed-tensors up to 0.14: the same, where also embeddings, vectors and stacked
# matrices may be packed; and exactly two kept of each four, without row offsets.
LEGACY_BITMASK = "legacy-bitmask"
LEGACY_24 = "legacy-24-bitmask"

# What lies in the file as <layer>.<part> in the place of <layer>.weight.
PARTS: dict[str, tuple[str, ...]] = {
    BITMASK: ("compressed", "bitmask", "row_offsets", "shape"),
    LEGACY_BITMASK: ("compressed", "bitmask", "row_offsets", "shape"),
    LEGACY_24: ("compressed", "bitmask", "shape"),
}
SCALES = "scales"  # beside int8 values: float32 [rows, groups of inputs]
# An empty tensor under the dense weight's own name. A loader that does not know the format would find no
# weight, fill the layer with random numbers and go on; with this it stops at a size mismatch.
TRIPWIRE = "weight"

_KEYS = {"quant_method", "version", "format", "nnz", "dense", "packings", "structure"}
_PLAIN = asdict(Packing())
_MAX_NNZ = 2**48  # of one layer: beyond any memory, and products of sizes stay within 64 bits


class CheckpointError(ValueError):
    """A checkpoint that is damaged, contradicts itself, or was written by a later version."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The ``quantization_config`` of a checkpoint: which layers are packed, and with how many values."""

    nnz: Mapping[str, int]  # module path -> kept weights, of every packed layer
    dense: Mapping[str, float] = field(default_factory=dict)  # linear layers left dense -> their sparsity
    format: str = BITMASK
    packings: Mapping[str, Packing] = field(
        default_factory=dict
    )  # packed layers with int8 values or a pattern
    structure: Structure | None = None  # how the model differs from what the rest of config.json describes

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
        nnz, dense = _checked_nnz(entries.get("nnz")), _checked_dense(entries.get("dense", {}))
        packings = _checked_packings(entries.get("packings", {}), nnz)
        if packings and (entries["version"] < _PACKINGS_VERSION or entries["format"] != BITMASK):
            raise CheckpointError(
                f"config.json: quantization_config.packings need version {_PACKINGS_VERSION} and format {BITMASK}, "
                f"got {entries['version']} and {entries['format']}"
            )
        structure = _checked_structure(entries)
        return cls(nnz, dense, entries["format"], packings, structure)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with the ``quant_method`` by which transformers finds the reader."""
        entries = {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            "format": self.format,
            "nnz": dict(self.nnz),
            "dense": dict(self.dense),
        }
        if self.packings:
            entries["packings"] = {path: _stated(packing) for path, packing in self.packings.items()}
        if self.structure:
            entries["structure"] = self.structure.to_dict()
        return entries

    @property
    def version(self) -> int:
        """The earliest version of the layout that can say this."""
        if self.structure:
            return _STRUCTURE_VERSION
        return _PACKINGS_VERSION if self.packings else 1

    def is_int8(self, path: str) -> bool:
        """Tell whether layer ``path`` is stored in int8 values with scales."""
        return path in self.packings and self.packings[path].values == "int8"

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


def _checked_packings(entries: Any, nnz: Mapping[str, int]) -> dict[str, Packing]:
    where = "config.json: quantization_config.packings"
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{where} must map layers to packings, got {_shown(entries)}")
    packings = {}
    for path, stated in entries.items():
        if path not in nnz:
            raise CheckpointError(f"{where} has a layer that nnz does not list: {_shown(path)}")
        if not isinstance(stated, Mapping) or not stated or set(stated) - set(_PLAIN):
            raise CheckpointError(
                f"{where}['{path}'] must be an object of {sorted(_PLAIN)}, got {_shown(stated)}"
            )
        for name, value in stated.items():
            wanted = str if name in ("values", "pattern") else int
            if type(value) is not wanted:
                raise CheckpointError(
                    f"{where}['{path}'].{name} must be of type {wanted.__name__}, got {_shown(value)}"
                )
        try:
            packings[path] = Packing(**stated)
        except ValueError as error:
            raise CheckpointError(f"{where}['{path}']: {error}") from None
        if packings[path].is_plain:
            raise CheckpointError(f"{where}['{path}'] names neither int8 values nor a pattern")
    return packings


def _checked_structure(entries: Mapping[str, Any]) -> Structure | None:
    stated = entries.get("structure")
    if stated is None:
        return None
    if entries["version"] < _STRUCTURE_VERSION:
        raise CheckpointError(
            f"config.json: quantization_config.structure needs version {_STRUCTURE_VERSION}, got {entries['version']}"
        )
    try:
        return Structure.from_dict(stated)
    except ValueError as error:
        raise CheckpointError(f"config.json: quantization_config.structure: {error}") from None


def _stated(packing: Packing) -> dict[str, Any]:
    """Return what differs from the plain packing."""
    return {name: value for name, value in asdict(packing).items() if value != _PLAIN[name]}


def _shown(value: Any) -> str:
    """Quote a value from the file, shortened: it may be megabytes long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
