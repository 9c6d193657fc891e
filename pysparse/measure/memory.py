"""Memory: what the weights take, and what the process took at its peak."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

PEAK_DEFINITION = (
    "largest resident set of the whole process (code, torch, every model in it), not of one model"
)


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Bytes of a model's tensors; a tensor that two modules share counts once."""

    parameters: int
    buffers: int
    second_packings: int = 0  # that sparse layers made for many tokens; one token does not read them

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.buffers + self.second_packings


@dataclass(slots=True)
class PeakMemory:
    """Filled in at the end of a :func:`peak_memory` block."""

    before: int = 0  # resident bytes when the block began
    peak: int = 0  # largest resident bytes
    since: str = ""  # "block" when the kernel let us reset the mark, else "process start"
    definition: str = PEAK_DEFINITION

    @property
    def growth(self) -> int:
        """Peak above the start of the block."""
        return self.peak - self.before


def model_bytes(model: nn.Module) -> ModelBytes:
    """Return the bytes of ``model``'s parameters, buffers (packed weights are buffers) and second packings."""
    parameters = {p.data_ptr() or id(p): p.numel() * p.element_size() for p in model.parameters()}
    buffers = {b.data_ptr() or id(b): b.numel() * b.element_size() for b in model.buffers()}
    return ModelBytes(
        sum(parameters.values()),
        sum(size for key, size in buffers.items() if key not in parameters),
        sum(getattr(module, "second_packing_nbytes", 0) for module in model.modules()),
    )


def resident_bytes() -> int:
    """Return the resident set of this process now; the peak where /proc is missing."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the largest resident set of this process so far, by /proc or by getrusage."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int | None:
    """Return what can be allocated without swapping: MemAvailable, cut by a cgroup limit; None if unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return min(found) if found else None


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the largest resident set inside the block (on Linux; elsewhere since the start)."""
    reading = PeakMemory(before=resident_bytes(), since="process start")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        reading.since = "block"
    except OSError:
        pass
    yield reading
    reading.peak = peak_resident_bytes()


def _status(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
