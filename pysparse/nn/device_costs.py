"""What a call on a CUDA device is expected to take: lines fitted to the report of a GPU run.

A GPU that no report has measured is expected to move bytes at its own memory's rate and to decode at that of its own
multiprocessors. On a card with slow memory for its cores a byte saved is then worth more, as it is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from pysparse import backend
from pysparse.formats.device import nm_bytes

# Bytes per entry at density p. Delta: 2.5 a weight, and fillers over gaps of more than 16 columns, whose share is
# that of random zeros. Fragment: 2 a weight, 1/8 of mask, 1/64 of alignment and place. Pair: 1 of values, 1/8 of
# places.
_BYTES: dict[str, Callable[[float], float]] = {
    "cublas": lambda p: 2.0,
    "delta": lambda p: 2.5 * p / (1 - (1 - p) ** 16) if p else 0.0,
    "fragment": lambda p: 2 * p + 0.141,
    "pair": lambda p: 1.125,
}


def bytes_per_entry(kernel: str, density: float, pattern: tuple[int, int] | None = None) -> float:
    """Return the bytes that ``kernel`` reads per entry of a weight; "cublas" is the dense one in 16 bits.

    "nm" reads whole groups of its ``pattern`` (n, m), whatever they keep; the others ask for the density.
    """
    if kernel == "nm":
        if pattern is None:
            raise ValueError("what nm reads depends on its pattern (n, m), which is missing")
        return nm_bytes(*pattern)
    return _BYTES[kernel](density)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What decides how fast a GPU is here; two of one class have the same ratio of both rates."""

    name: str
    gigabytes_per_second: float  # of its memory, by the data sheet
    multiprocessor_gigahertz: float  # clock times multiprocessors

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """Return what the driver says of a CUDA device."""
        found = torch.cuda.get_device_properties(device)
        # Both edges of the memory clock (kHz) move a bit on each line of the bus.
        memory = 2 * found.memory_clock_rate * found.memory_bus_width / 8e6
        return cls(found.name, memory, found.multi_processor_count * found.clock_rate / 1e6)


@dataclass(frozen=True, slots=True)
class DeviceCosts:
    """Microseconds of a call = c0 + c1 * megabytes + c2 * million entries, for each kernel and number of tokens."""

    gpu: str  # where they were measured, and for which other GPU they are scaled
    lines: dict[str, dict[int, tuple[float, float, float]]]  # kernel -> tokens -> (c0, c1, c2)

    def microseconds(
        self,
        kernel: str,
        tokens: int,
        shape: tuple[int, int],
        density: float,
        pattern: tuple[int, int] | None = None,
    ) -> float:
        """Predict one call; numbers of tokens between measured ones cost what the next one costs.

        Infinity where the kernel was measured for fewer tokens only.
        """
        lines = self.lines[kernel]
        measured = min((count for count in lines if count >= tokens), default=0)
        if not measured:
            return float("inf")
        call, megabyte, mega = lines[measured]
        size = bytes_per_entry(kernel, density, pattern)
        # Nothing reads its bytes faster than the dense product, whatever the sum says for a GPU not measured.
        bound = self.lines["cublas"][measured][1] * size if measured in self.lines["cublas"] else 0.0
        return call + shape[0] * shape[1] / 1e6 * max(megabyte * size + mega, bound)

    def pays_to(
        self,
        kernel: str,
        shape: tuple[int, int],
        density: float,
        gain: float,
        pattern: tuple[int, int] | None = None,
    ) -> int:
        """Return up to how many tokens ``kernel`` is expected to be ``gain`` times as fast as the dense product."""
        last = 0
        for tokens in sorted(self.lines["cublas"]):
            dense = self.microseconds("cublas", tokens, shape, density)
            if self.microseconds(kernel, tokens, shape, density, pattern) * gain > dense:
                break
            last = tokens
        return last

    def assuming(self, kernel: str, like: str) -> DeviceCosts:
        """Return costs that also hold for ``kernel``, which no run has measured: those of ``like``."""
        gpu = f"{self.gpu}, {kernel} not measured, as {like}"
        return replace(self, gpu=gpu, lines=self.lines | {kernel: self.lines[like]})

    def scaled(self, measured: Gpu, wanted: Gpu) -> DeviceCosts:
        """Return what ``wanted`` is expected to take, by its rates over those of ``measured``; launches as there."""
        memory = measured.gigabytes_per_second / wanted.gigabytes_per_second
        cores = measured.multiprocessor_gigahertz / wanted.multiprocessor_gigahertz
        lines = {
            kernel: {
                tokens: (call, mb * memory, mega * cores) for tokens, (call, mb, mega) in by_tokens.items()
            }
            for kernel, by_tokens in self.lines.items()
        }
        return replace(self, gpu=f"{self.gpu}, scaled to {wanted.name}", lines=lines)


@cache
def device_costs(gpu: Gpu | None = None) -> DeviceCosts:
    """Return the costs of the committed report of a GPU run; scaled to ``gpu`` where that is another one."""
    report = json.loads(backend.CUDA_REPORT.read_text())
    lines = {
        kernel: {int(tokens): (line[0], line[1], line[2]) for tokens, line in by_tokens.items()}
        for kernel, by_tokens in report["costs"].items()
    }
    measured, costs = Gpu(report["gpu"], **report["rates"]), DeviceCosts(report["gpu"], lines)
    if gpu is None or gpu.name == measured.name:
        return costs
    if not (
        gpu.gigabytes_per_second > 0 and gpu.multiprocessor_gigahertz > 0
    ):  # drivers of some parts tell no clocks
        return replace(costs, gpu=f"{measured.name}, as {gpu.name} tells no rates of its own")
    return costs.scaled(measured, gpu)
