"""From how many keys on a planner is faster than exact attention: measured once on this machine, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pysparse import backend
from pysparse.attention.plan import AttentionInput, Fused, Planner, attend, dense
from pysparse.attention.synthetic import Synthetic
from pysparse.backend import CACHE_VARIABLE, cache_directory
from pysparse.ops.cost_cache import setting_key

LENGTHS = (1024, 2048, 3072, 4096, 6144, 8192)
SHORTEST = 128  # keys of the longest call timed: fewer are one block, all of which is computed
_GAIN = 1.03  # times faster than exact attention: less is within what a timing can tell
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Crossover:
    """``keys`` from which a planner pays, and the speed over exact attention at each length that was timed.

    ``keys`` is one of these lengths, or None where the planner paid up to none of them.
    """

    keys: int | None
    speedup: dict[int, float]

    @property
    def longest(self) -> int:
        """Keys of the longest call that was timed."""
        return max(self.speedup)


_known: dict[Hashable, Crossover | None] = {}


def known_crossover(planner: Planner, dtype: torch.dtype) -> Crossover | None:
    """Return what was measured with the present threads and instruction set, here or on disk; measure nothing."""
    if not isinstance(planner, Hashable) or planner.crossover == 0:
        return None  # lists that the user brought hold for one prompt
    place = (planner, dtype, backend.num_threads(), backend.isa())
    if place not in _known:
        _known[place] = _read(crossover_file(planner, dtype), _key(planner, dtype))
    return _known[place]


@cache
def gpu_crossover() -> int:
    """Return from how many keys on the committed GPU run found planned attention faster than torch's exact one.

    More keys than there can be where it found no such length.
    """
    keys = json.loads(backend.CUDA_REPORT.read_text())["attention_crossover"]
    return sys.maxsize if keys is None else int(keys)


def tune_crossover(planner: Planner, dtype: torch.dtype, lengths: Sequence[int] = LENGTHS) -> Crossover:
    """Time ``planner`` beside exact attention now, and keep on disk from how many keys on it is faster.

    The calls are :class:`Synthetic` ones (8 query heads, 2 key heads of 128). ``keys`` is the length from which to
    the longest the planner is at least 3 % faster and leaves pairs out, None where it is not so at the longest. Some
    seconds a planner. ValueError without lengths.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths={tuple(lengths)} must be positive numbers of keys")
    with torch.no_grad():
        speedup = {length: _speedup(planner, length, dtype) for length in sorted(lengths)}
    keys = None
    for length in sorted(lengths, reverse=True):
        if speedup[length] < _GAIN or _computes_all(planner, length, dtype):
            break
        keys = length
    found = Crossover(keys, speedup)
    _known[planner, dtype, backend.num_threads(), backend.isa()] = found
    _write(crossover_file(planner, dtype), _key(planner, dtype), found)
    return found


def crossover_file(planner: Planner, dtype: torch.dtype) -> Path:
    """Return the file that holds the crossover in the present setting."""
    digest = hashlib.sha256(json.dumps(_key(planner, dtype), sort_keys=True).encode()).hexdigest()
    return cache_directory() / f"crossover-{digest[:16]}.json"


def forget() -> None:
    """Forget what this process knows; the files stay."""
    _known.clear()


def _key(planner: Planner, dtype: torch.dtype) -> dict[str, Any]:
    return {**setting_key(dtype), "planner": str(planner)}


def _computes_all(planner: Planner, length: int, dtype: torch.dtype) -> bool:
    """Tell whether the planner leaves out no pair: what it seems to gain is then the noise of the timing."""
    given = AttentionInput.of(*Synthetic(length).make(dtype))
    with torch.no_grad():
        return planner.plan(given).density(given) >= 1


def _speedup(planner: Planner, length: int, dtype: torch.dtype) -> float:
    """Return exact attention's time over the planner's, the fastest of some turns of each."""
    given = AttentionInput.of(*Synthetic(length).make(dtype))
    planned: Callable[[], Any] = (
        (lambda: planner.attend(given)) if isinstance(planner, Fused) else (lambda: attend(given, planner))
    )
    calls = (lambda: dense(given), planned)
    turns = [[_seconds(call) for call in calls] for _ in range(1 + _ROUNDS)][1:]
    return min(exact for exact, _ in turns) / min(ours for _, ours in turns)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _read(path: Path, key: dict[str, Any]) -> Crossover | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            raise ValueError("it belongs to another machine or version")
        speedup = {int(length): float(value) for length, value in content["speedup"].items()}
        keys = content["keys"]
        if not speedup or min(speedup) < 1 or not (keys is None or keys in speedup):
            raise ValueError(f"keys={keys} and speedup={speedup} are no measurement")
        return Crossover(keys, speedup)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        backend.warn_once(f"crossover-{path}", f"{path} is not usable ({error}); the planner's bound holds")
        return None


def _write(path: Path, key: dict[str, Any], found: Crossover) -> None:
    """Write beside and rename, so that a reader sees a whole file or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"key": key, "keys": found.keys, "speedup": found.speedup}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        backend.warn_once("crossover-write", f"the crossover is not kept: {error}; set {CACHE_VARIABLE}")
