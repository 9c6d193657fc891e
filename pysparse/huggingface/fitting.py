"""Does a checkpoint fit a model? Every name, shape and dtype, before any data is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.huggingface.layout import (
    BITMASK,
    LEGACY_BITMASK,
    PARTS,
    SCALES,
    TRIPWIRE,
    CheckpointError,
    Layout,
)
from pysparse.huggingface.reader import Checkpoint
from pysparse.measure.size import TensorEntry

_FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGERS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Buffers that older releases of transformers wrote and newer ones compute.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One packed layer, found in the file and in the model."""

    path: str  # in the model
    stored: str  # in the file: may have the base model's prefix more or less
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A packed weight of something else than a linear layer, which only legacy checkpoints have."""

    name: str  # of the parameter in the model
    stored: str
    shape: tuple[int, ...]


class Fit:
    """Match a checkpoint's names with a model's, on the meta device, and check that they agree.

    A model of the very class that the checkpoint was saved from must match in every tensor. Another class
    (a base model, another head) may leave out or add what transformers then reports.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, layout: Layout) -> None:
        self.model, self.checkpoint, self.layout = model, checkpoint, layout
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        architectures = getattr(model.config, "architectures", None) or []
        # Legacy files may carry names that transformers has changed since, and translates while it loads.
        self.same_class = layout.format == BITMASK and type(model).__name__ in architectures

    def packed(self) -> tuple[list[PackedLayer], list[PackedTensor]]:
        """Check each packed weight against the file and the model; CheckpointError on the first contradiction.

        Returns the linear layers, and the weights that are to be written out densely.
        """
        shapes = self.checkpoint.check(self.layout)
        modules = {path: module for path, module in self.model.named_modules() if path}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        layers: list[PackedLayer] = []
        tensors: list[PackedTensor] = []
        for stored, shape in shapes.items():
            path = self._in_model(stored, modules) or self._in_model(stored.removesuffix(".weight"), modules)
            name = self._in_model(stored, parameters) or self._in_model(f"{stored}.weight", parameters)
            if path is not None and _is_linear(modules[path], shape):
                layers.append(PackedLayer(path, stored, shape))
            elif self._takes_dense(name, shape, parameters):
                tensors.append(PackedTensor(str(name), stored, shape))
            elif path is not None or name is not None:
                found = modules[path] if path is not None else parameters[str(name)]
                raise CheckpointError(
                    f"{self._file(stored)}: layer '{stored}' is packed with shape {shape}, in the model it is "
                    f"{_described(found)}"
                )
            elif self.same_class or stored.startswith(self.prefix):
                raise CheckpointError(
                    f"{self._file(stored)}: layer '{stored}' is packed, but {type(self.model).__name__} as "
                    "described by config.json has no such layer"
                )  # else it belongs to a head that this class does not have
        return layers, tensors

    def _takes_dense(
        self, name: str | None, shape: tuple[int, ...], parameters: Mapping[str, Tensor]
    ) -> bool:
        legacy = self.layout.format == LEGACY_BITMASK
        return legacy and name is not None and tuple(parameters[name].shape) == shape

    def check_dense(self, expected: Mapping[str, Tensor], *, shapes: bool) -> None:
        """Check the tensors that transformers will load against those of the model's state dict.

        ``shapes`` False lets tensors of another shape pass, for callers that re-initialise them.
        """
        unused = set()
        found: set[str] = set()
        for name, entry in self.checkpoint.tensors.items():
            if self._is_packed_part(name):
                continue
            target = self._in_model(name, expected)
            if target is None:
                unused.add(name)
                continue
            found.add(target)
            self._check_tensor(name, entry, expected[target], shapes)
        if self.same_class:
            self._check_missing(set(expected) - found, found)
            self._check_unused(unused)

    def _check_tensor(self, name: str, entry: TensorEntry, wanted: Tensor, shapes: bool) -> None:
        floating = wanted.dtype.is_floating_point
        fits = entry.dtype in _FLOATS if floating else entry.dtype == _INTEGERS.get(wanted.dtype)
        if not fits or (shapes and entry.shape != tuple(wanted.shape)):
            raise CheckpointError(
                f"{entry.path}: tensor '{name}' is {entry.dtype} {entry.shape}, "
                f"the model takes {'a float' if floating else wanted.dtype} {tuple(wanted.shape)}"
            )

    def _check_missing(self, missing: set[str], found: set[str]) -> None:
        tied: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        groups = [{target, source} for target, source in tied.items()]
        covered = {name for group in groups if group & found for name in group}
        missing = _without(missing - covered, getattr(self.model, "_keys_to_ignore_on_load_missing", None))
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.where}: {type(self.model).__name__} needs tensor '{min(missing)}', which is "
                f"missing (as are {len(missing) - 1} others)"
            )

    def _check_unused(self, unused: set[str]) -> None:
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None)
        unused = _without(unused, (*(ignored or ()), *_COMPUTED))
        if unused:
            name = min(unused)
            raise CheckpointError(
                f"{self.checkpoint.tensors[name].path}: tensor '{name}' has no place in "
                f"{type(self.model).__name__} as described by config.json (nor have {len(unused) - 1} others)"
            )

    def _is_packed_part(self, name: str) -> bool:
        if self.layout.structure and name in self.layout.structure.tripwires:
            return True
        path, _, part = name.rpartition(".")
        if part == SCALES:
            return self.layout.is_int8(path)
        return path in self.layout.nnz and part in (*PARTS[BITMASK], TRIPWIRE)

    def _in_model(self, name: str, names: Mapping[str, Any]) -> str | None:
        """Return ``name`` as the model spells it: a base model's names lack a prefix that a head's have."""
        others = () if self.same_class else (name.removeprefix(self.prefix), self.prefix + name)
        return next((candidate for candidate in (name, *others) if candidate in names), None)

    def _file(self, layer: str) -> str:
        return str(self.checkpoint.tensors[f"{layer}.bitmask"].path)


def kept_in_float32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Tell whether the model's class asks for float32 in ``name`` although the rest is loaded as ``dtype``."""
    patterns = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns += list(getattr(model, "_keep_in_fp32_modules", None) or ())
    half = dtype in (torch.float16, torch.bfloat16)
    return half and any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def _is_linear(module: nn.Module, shape: tuple[int, ...]) -> bool:
    return type(module) is nn.Linear and tuple(module.weight.shape) == shape


def _described(found: nn.Module | Tensor) -> str:
    weight = getattr(found, "weight", found)
    shape = f" of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
    return f"a {type(found).__name__}{shape}"


def _without(names: set[str], patterns: Iterable[str] | None) -> set[str]:
    """Drop the names that one of the regular expressions (the model class's own) finds."""
    expressions = [re.compile(pattern) for pattern in patterns or ()]
    return {name for name in names if not any(expression.search(name) for expression in expressions)}
