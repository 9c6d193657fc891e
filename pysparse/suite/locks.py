"""Timings alone on the machine: cells that compute share a lock, one that times holds it alone."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MachineLock:
    """A readers-and-writer lock over all processes of one user on this machine, of this run and of others.

    Whoever wants to time closes the entry first, so that no computation begins before the timing has had its turn;
    a lock goes when its process does, however it ends.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        place = Path(tempfile.gettempdir() if folder is None else folder)
        self._entry, self._gate = (
            place / f"pysparse-suite-{os.getuid()}.{name}.lock" for name in ("entry", "gate")
        )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Hold the lock with others that compute; waits for a timing to end."""
        with self._gate.open("a") as gate:
            with self._entry.open("a") as entry:
                fcntl.flock(entry, fcntl.LOCK_EX)
                fcntl.flock(gate, fcntl.LOCK_SH)
            yield

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Hold the lock alone; waits for what computes by now, and nothing else begins meanwhile."""
        with self._entry.open("a") as entry, self._gate.open("a") as gate:
            fcntl.flock(entry, fcntl.LOCK_EX)
            fcntl.flock(gate, fcntl.LOCK_EX)
            yield
