"""Progress on disk: written beside and renamed, and believed only when every part of it fits."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

Arrays = Mapping[str, NDArray[Any]]
_VERSION = 1
SAVE_SECONDS = 5.0


def write_state(path: str | Path, identity: Mapping[str, Any], arrays: Arrays) -> None:
    """Write ``arrays`` and what they belong to; a crash at any moment leaves the old file or the new one."""
    place = Path(path)
    packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    record = {"version": _VERSION, "identity": _plain(identity), "sha256": _digest(packed)}
    data = save(packed, metadata={"pysparse.shapley": json.dumps(record)})
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_state(path: str | Path, identity: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return the arrays in ``path``.

    Raises FileNotFoundError when it is missing; ValueError when it is damaged or cut short, or when it belongs to
    something else than ``identity``, naming what differs.
    """
    data = Path(path).read_bytes()
    try:
        arrays: dict[str, NDArray[Any]] = load(data)
        record = json.loads(_metadata(data)["pysparse.shapley"])
        version, found, digest = record["version"], record["identity"], record["sha256"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or no Shapley state ({error}); delete it to start anew"
        ) from error
    if version != _VERSION:
        raise ValueError(f"{path} has version {version} of the state format, this is version {_VERSION}")
    if digest != _digest(arrays):
        raise ValueError(
            f"{path} is damaged: its contents do not match their checksum; delete it to start anew"
        )
    wanted = _plain(identity)
    different = [key for key in {*wanted, *found} if wanted.get(key) != found.get(key)]
    if different:
        shown = "; ".join(
            f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}" for key in sorted(different)
        )
        raise ValueError(f"{path} belongs to another estimation: {shown}")
    return arrays


class Journal:
    """Where the progress of one estimation is kept, if anywhere; ``identity`` says what it belongs to."""

    def __init__(self, path: str | Path | None, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, identity
        self._saved = time.monotonic()

    def load(self, like: Arrays, ends: Sequence[float]) -> dict[str, NDArray[Any]] | None:
        """Return what was kept, arrays of the names, shapes and types of ``like``; None when nothing was.

        Raises ValueError for a state that is damaged, or of a game whose ``ends`` (known values) were others.
        """
        if self._path is None or not Path(self._path).exists():
            return None
        found = read_state(self._path, self._identity)
        known = found.pop("ends", np.zeros(0))
        shapes = {name: (array.shape, array.dtype) for name, array in found.items()}
        wanted = {name: (array.shape, array.dtype) for name, array in like.items()}
        if shapes != wanted or known.shape != (len(ends),):
            raise ValueError(f"{self._path} is damaged: it holds {shapes}, expected {wanted}")
        if not np.allclose(known, ends, rtol=1e-6, atol=1e-12):
            raise ValueError(
                f"{self._path} belongs to another game: its known values were {known.tolist()}, "
                f"this game's are {list(ends)}"
            )
        return found

    def save(self, arrays: Arrays, ends: Sequence[float], force: bool = False) -> None:
        """Write ``arrays`` when it is time, or at once."""
        if self._path is None or not (force or time.monotonic() - self._saved >= SAVE_SECONDS):
            return
        write_state(self._path, self._identity, {**arrays, "ends": np.array(ends, np.float64)})
        self._saved = time.monotonic()


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(dict(identity)))
    return result


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def _digest(arrays: Arrays) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
