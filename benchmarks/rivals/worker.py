"""One rival in a process of its own, which answers a timing whenever it is asked: ``python worker.py < requests``.

It imports numpy and the rival's file alone, so it runs in the environment that the rival's pins demand. A request
is a line of JSON, and so is each answer; whatever libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

# Before and after a sample: OpenMP, BLAS and other pools spin for up to 25 ms before they sleep, and would hold the
# cores of the engine whose turn comes next.
SETTLE_SECONDS = 0.04


def queue_wait_seconds() -> float:
    """Return how long this process's threads have waited for a core (as pysparse.measure.rounds does)."""
    total = 0
    for entry in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(entry.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that has just ended
            continue
    return total / 1e9


def run_seconds_of_others() -> dict[str, int]:
    """Return how long each thread of every other process has run so far, in nanoseconds."""
    own, found = str(os.getpid()), {}
    for entry in Path("/proc").glob("[0-9]*/task/*/schedstat"):
        if entry.parts[2] != own:
            with contextlib.suppress(OSError, IndexError, ValueError):  # a thread that has just ended
                found[entry.parts[4]] = int(entry.read_text().split()[0])
    return found


def disturbance(waited: float, before: dict[str, int], after: dict[str, int]) -> float:
    """Return the seconds that other programs took from ours: no more than ours waited, nor than others ran.

    Threads of a library that sleep between its calls also wait for each other, at every waking, on an idle machine
    too: there nobody else runs.
    """
    ran = sum(max(0, nanoseconds - before.get(thread, 0)) for thread, nanoseconds in after.items())
    return min(waited, ran / 1e9)


class Copies:
    """Enough products by the same weight that each finds its weight out of the caches."""

    def __init__(self, request: dict[str, Any]) -> None:
        rival = importlib.import_module(request["module"])
        weight, x = np.load(request["weight"]), np.load(request["x"])
        build = lambda: rival.build(request["variant"], weight, x, request["threads"])  # noqa: E731
        first, self.nbytes = build()
        self._calls: list[Callable[[], np.ndarray]] = [first]
        while len(self._calls) * self.nbytes < request["working_set"]:
            self._calls.append(build()[0])
        self._next = 0

    def __len__(self) -> int:
        return len(self._calls)

    def call(self) -> np.ndarray:
        self._next = (self._next + 1) % len(self._calls)
        return self._calls[self._next]()

    def sample(self, count: int) -> dict[str, float]:
        time.sleep(SETTLE_SECONDS)
        others = run_seconds_of_others()
        self.call()  # wakes the threads
        waited, start = queue_wait_seconds(), time.perf_counter()
        for _ in range(count):
            self.call()
        seconds = (time.perf_counter() - start) / count
        waited = disturbance(queue_wait_seconds() - waited, others, run_seconds_of_others())
        time.sleep(SETTLE_SECONDS)
        return {"seconds": seconds, "waited": waited}


def probe(module: str) -> None:
    """Print the versions of a rival's packages; an error, whose last line says why, when it cannot run here."""
    rival, versions = importlib.import_module(module), {}
    rival.load()
    for name in rival.PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # libraries may come from elsewhere
            versions[name] = metadata.version(name)
    print(json.dumps(versions))


def main() -> None:
    if sys.argv[1:2] == ["--probe"]:
        return probe(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # A parent whose OpenMP threads are bound to cores hands the first one's binding down.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    request = json.loads(sys.stdin.readline())
    copies = Copies(request)
    np.save(request["answer"], np.asarray(copies.call(), dtype=np.float32))
    print(json.dumps({"nbytes": copies.nbytes, "copies": len(copies)}), file=answers)
    for line in sys.stdin:
        print(json.dumps(copies.sample(int(line))), file=answers)


if __name__ == "__main__":
    main()
