"""Measured costs on disk: one small JSON file per machine, library versions and kernels."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pysparse import backend
from pysparse.backend import CACHE_VARIABLE, cache_directory
from pysparse.ops.cost_measure import measure
from pysparse.ops.costs import SHAPES, Costs, Table
from pysparse.ops.ways import WAYS

_SCHEMA = 3
_known: dict[tuple[torch.dtype, int, str], Costs] = {}


def costs_for(dtype: torch.dtype) -> Costs:
    """Return the costs for the threads and instruction set in force: known, read from disk, or measured now."""
    known = known_costs(dtype)
    return tune(dtype) if known is None else known


def known_costs(dtype: torch.dtype) -> Costs | None:
    """Return the costs if they are known or on disk; measure nothing."""
    place = (dtype, backend.num_threads(), backend.isa())
    if place not in _known:
        costs = _read(cost_file(dtype), setting_key(dtype))
        if costs is None:
            return None
        _known[place] = costs
    return _known[place]


def tune(dtype: torch.dtype) -> Costs:
    """Measure now, whatever is known, and keep the result on disk. Takes some seconds."""
    costs = measure(dtype)
    _known[dtype, backend.num_threads(), backend.isa()] = costs
    _write(cost_file(dtype), setting_key(dtype), costs)
    return costs


def cost_file(dtype: torch.dtype) -> Path:
    """Return the file that holds the costs for ``dtype`` in the present setting."""
    digest = hashlib.sha256(json.dumps(setting_key(dtype), sort_keys=True).encode()).hexdigest()
    return cache_directory() / f"costs-{digest[:16]}.json"


def forget() -> None:
    """Forget what this process knows; the files stay."""
    _known.clear()


def setting_key(dtype: torch.dtype) -> dict[str, Any]:
    """Return everything on which a measured time depends: with any part changed, it is measured anew."""
    return {
        "schema": _SCHEMA,
        "cpu": backend.cpu_signature(),
        "isa": backend.isa(),
        "threads": backend.num_threads(),
        "dtype": str(dtype),
        "torch": torch.__version__,
        "pysparse": _version(),
        "kernels": _core_digest(),
    }


@cache
def _version() -> str:
    try:
        return metadata.version("pysparse")
    except metadata.PackageNotFoundError:
        return "unknown"


@cache
def _core_digest() -> str:
    return hashlib.sha256(Path(backend.core().__file__).read_bytes()).hexdigest()[:16]


def _read(path: Path, key: dict[str, Any]) -> Costs | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            raise ValueError("it belongs to another machine or version")
        return _parse(content["costs"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        backend.warn_once(f"costs-{path}", f"{path} is not usable ({error}); the kernels are measured again")
        return None


def _parse(costs: dict[str, Any]) -> Costs:
    call = {way: _seconds(costs["call"][way]) for way in WAYS}
    tables = {way: _table(way, costs["seconds"][way]) for way in WAYS}
    return Costs(call, tables, int(costs["threads"]))


def _table(way: str, given: Any) -> Table:
    table = tuple(tuple(tuple(map(_seconds, line)) for line in half) for half in given)
    wanted = [[len(WAYS[way].tokens)] * len(WAYS[way].densities)] * len(SHAPES)
    if [[len(line) for line in half] for half in table] != wanted:
        raise ValueError(f"the table of {way} has another size")
    return table


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or not 0.0 <= value < 3600.0:
        raise ValueError(f"{value!r} is not a time in seconds")
    return float(value)


def _write(path: Path, key: dict[str, Any], costs: Costs) -> None:
    """Write beside and rename, so that a reader sees a whole file or none."""
    content = {
        "key": key,
        "costs": {"call": costs.call, "seconds": costs.seconds, "threads": costs.threads},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        backend.warn_once("costs-write", f"measured kernel costs are not kept: {error}; set {CACHE_VARIABLE}")
