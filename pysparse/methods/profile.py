"""Sparsities from a list, a mapping or a JSON file, and the four profiles that were published with DLP."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysparse.methods.blockwise import HIGHEST
from pysparse.nn.match import matches
from pysparse.pruning import Evidence, check_sparsity, project
from pysparse.pruning.projection import weighted_mean

_ROUNDING = 5e-3  # distance between a profile's mean and the target that is put down to rounded figures
_LIMIT = 1 << 20  # bytes of a profile file
_DLP_TARGET = 0.7  # sparsity of the published profiles

DLP_PROFILES: dict[str, tuple[float, ...]] = {
    "llama-2-7b": (
        0.5348, 0.5503, 0.5765, 0.5962, 0.6053, 0.6155, 0.6277, 0.6361, 0.6417, 0.6489, 0.6542, 0.6609, 0.6673,
        0.6751, 0.6834, 0.6915, 0.7075, 0.7146, 0.7268, 0.7320, 0.7434, 0.7487, 0.7593, 0.7684, 0.7707, 0.7806,
        0.7892, 0.8009, 0.8125, 0.8174, 0.8348, 0.8277,
    ),
    "llama-7b": (
        0.5324, 0.5483, 0.5653, 0.5826, 0.5946, 0.6093, 0.6175, 0.6247, 0.6320, 0.6379, 0.6467, 0.6534, 0.6664,
        0.6740, 0.6818, 0.6912, 0.7047, 0.7199, 0.7302, 0.7395, 0.7553, 0.7634, 0.7685, 0.7790, 0.7859, 0.7966,
        0.8039, 0.8081, 0.8157, 0.8249, 0.8324, 0.8138,
    ),
    "llama-2-13b": (
        0.5019, 0.5241, 0.5522, 0.5686, 0.5914, 0.6028, 0.6182, 0.6246, 0.6369, 0.6482, 0.6516, 0.6534, 0.6603,
        0.6698, 0.6767, 0.6811, 0.6915, 0.6975, 0.7052, 0.7103, 0.7125, 0.7236, 0.7339, 0.7360, 0.7403, 0.7489,
        0.7523, 0.7613, 0.7632, 0.7703, 0.7801, 0.7770, 0.7842, 0.7832, 0.7904, 0.7923, 0.7983, 0.7965, 0.8019,
        0.7874,
    ),
    "llama-13b": (
        0.5029, 0.5267, 0.5487, 0.5802, 0.5936, 0.6082, 0.6161, 0.6241, 0.6363, 0.6391, 0.6449, 0.6522, 0.6581,
        0.6702, 0.6751, 0.6862, 0.6901, 0.6935, 0.7046, 0.7130, 0.7181, 0.7246, 0.7296, 0.7413, 0.7449, 0.7489,
        0.7581, 0.7616, 0.7640, 0.7686, 0.7758, 0.7784, 0.7822, 0.7892, 0.7870, 0.7872, 0.7923, 0.7962, 0.8029,
        0.7857,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Profile:
    """Given sparsities: ``blocks`` lists one a block, or ``layers`` pairs (name of layers, sparsity).

    The names of ``layers`` are module paths, their last parts, globs or "re:" expressions; of several that
    match a layer the first counts, and every layer must be named. The mean weighted by parameters must be the
    target but for figures that were rounded (to 0.005), which are then shifted onto it exactly. ValueError
    otherwise, with the mean that the profile has.
    """

    blocks: tuple[float, ...] = ()
    layers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if bool(self.blocks) == bool(self.layers):
            raise ValueError(
                "a profile lists a sparsity for each block, or pairs names of layers with theirs"
            )
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.layers):
            raise ValueError(f"layers are pairs of a name and a sparsity, got {self.layers!r}")
        for sparsity in (*self.blocks, *(value for _, value in self.layers)):
            check_sparsity(sparsity)

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return the sparsity of each layer."""
        raw = self._of_blocks(layers) if self.blocks else self._of_names(layers)
        sizes = [evidence.layer.size for evidence in layers]
        mean = weighted_mean(raw, sizes)
        if abs(mean - target) > _ROUNDING:
            raise ValueError(
                f"the profile's sparsities have the mean {mean:.4f} over this model's weights, not {target:g}: "
                f"pass sparsity={mean:.4f}, or change the profile"
            )
        return project(raw, sizes, target, 0.0, max(HIGHEST, target, *raw))

    def _of_blocks(self, layers: Sequence[Evidence]) -> list[float]:
        return _by_index(self.blocks, layers, "the profile")

    def _of_names(self, layers: Sequence[Evidence]) -> list[float]:
        raw = []
        unused = dict(self.layers)
        for evidence in layers:
            layer = evidence.layer
            name = next((key for key, _ in self.layers if matches(layer.module, layer.path, [key])), None)
            if name is None:
                raise ValueError(f"the profile names no sparsity for {layer.path}")
            unused.pop(name, None)
            raw.append(dict(self.layers)[name])
        if unused:
            raise ValueError(f"the profile names {', '.join(unused)}, which no layer to be pruned answers to")
        return raw


@dataclass(frozen=True, slots=True)
class DLPProfile:
    """A profile that was published with DLP (at sparsity 0.7, alpha 0.15), moved to the target.

    ``model`` is "llama-7b", "llama-13b", "llama-2-7b" or "llama-2-13b"; the profile fits models with as many
    blocks (32 or 40). The distances to the mean stay, clipped and projected. All four are nearly linear in
    depth: ATP with a beta of about 0.009 is close to those of 32 blocks.
    """

    model: str

    def __post_init__(self) -> None:
        if self.model not in DLP_PROFILES:
            raise ValueError(f"model is one of {', '.join(DLP_PROFILES)}, got {self.model!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing: the profile was computed from activations once."""
        return ()

    def __call__(self, layers: Sequence[Evidence], target: float) -> list[float]:
        """Return the sparsity of each layer."""
        raw = _by_index(DLP_PROFILES[self.model], layers, f"the profile of {self.model}")
        moved = [value - _DLP_TARGET + target for value in raw]
        return project(moved, [evidence.layer.size for evidence in layers], target, 0.0, max(HIGHEST, target))


def load_profile(path: str | Path) -> Profile:
    """Read a profile from JSON.

    A list is one sparsity a block, an object maps names of layers to sparsities; {"sparsities": [...]} and
    {"densities": [...]} (fractions kept, as DLP's files store them) hold one a block too. Raises
    FileNotFoundError, or ValueError that names the file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such allocation profile: {path}")
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: a profile has at most {_LIMIT}")
    try:
        return as_profile(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(f"{path}: {error}") from None


def as_profile(content: Any) -> Profile:
    """Return the profile that a list, a mapping or decoded JSON describes; see :func:`load_profile`."""
    if isinstance(content, Mapping):
        for key, kept in (("sparsities", False), ("densities", True)):
            if list(content) == [key]:
                values = _numbers(content[key], key)
                return Profile(blocks=tuple(1.0 - value if kept else value for value in values))
        values = _numbers(list(content.values()), "the mapping")
        return Profile(layers=tuple(zip(map(str, content), values, strict=True)))
    if not isinstance(content, Sequence) or isinstance(content, str | bytes):
        raise ValueError(f"a profile is a list or a mapping of sparsities, got {type(content).__name__}")
    return Profile(blocks=tuple(_numbers(content, "the list")))


def _numbers(values: Any, where: str) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{where} of a profile holds a {type(values).__name__}, expected a list of numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where} of a profile holds {value!r}, expected numbers")
    return [float(value) for value in values]


def _by_index(values: Sequence[float], layers: Sequence[Evidence], what: str) -> list[float]:
    """Return the value of each layer's block; there is one for each block with layers to prune."""
    blocks = sorted({evidence.layer.block for evidence in layers})
    if len(values) != len(blocks):
        raise ValueError(
            f"{what} has sparsities for {len(values)} blocks, this model has {len(blocks)} to prune"
        )
    by_block = dict(zip(blocks, values, strict=True))
    return [by_block[evidence.layer.block] for evidence in layers]
