"""What the CUDA benchmarks share: the GPU's card, the parts of a run, and its JSON, which is whole at any time.

While a run goes on, its file says under "cut_off" where it is; only its end takes that away. What a time limit leaves
can therefore be read, and says in which part the run stopped. "source_hashes" names the kernels that the report may
vouch for, "kernel_sources" in the card all of the build that ran.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_report import clocks, commit

from pysparse import backend
from pysparse.measure.machine import machine_card
from pysparse.measure.results import to_jsonable, write_text
from pysparse.nn.device_costs import Gpu

MOST_ERROR = 4e-3  # of a linear kernel: norm of the difference to float64 over its norm; bf16 results
MOST_ATTENTION_ERROR = 1e-2  # the same of attention: 16-bit weights and results


def require_gpu() -> None:
    """SystemExit with the reason where no CUDA kernel can run: before minutes go into a model that nothing times."""
    if missing := backend.cuda_missing_reason():
        raise SystemExit(f"no CUDA kernels can be timed here: {missing}")


def card() -> dict[str, Any]:
    """Return the machine card with what belongs to the GPU."""
    properties, gpu = torch.cuda.get_device_properties(0), Gpu.of(torch.device("cuda", 0))
    return machine_card() | {
        "pysparse_commit": commit(),
        "gpu": properties.name,
        "gigabytes_per_second": round(gpu.gigabytes_per_second, 1),
        "multiprocessor_gigahertz": round(gpu.multiprocessor_gigahertz, 1),
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "capability": list(torch.cuda.get_device_capability()),
        "torch_cuda": torch.version.cuda,
        "kernel_architectures": backend.cuda().ARCHITECTURES,
        "kernel_sources": dict(backend.cuda().SOURCE_HASHES),
        "clocks_at_start": clocks(),
    }


@dataclass(frozen=True, slots=True)
class Run:
    """A run and its file."""

    out: Path
    report: dict[str, Any]

    @classmethod
    def start(cls, out: Path, **content: Any) -> Run:
        """Write a file without figures yet; SystemExit where no CUDA kernel can run."""
        require_gpu()
        empty: dict[str, Any] = {"machine": card(), "source_hashes": {}, "rows": [], "wrong": []}
        run = cls(out, empty | content)
        run.save("before its first part")
        return run

    def save(self, cut_off: str) -> None:
        """Write the file; ``cut_off`` is what it says if nothing is written after it, "" that the run is complete."""
        whole = self.report | ({"cut_off": cut_off} if cut_off else {})
        write_text(self.out, json.dumps(to_jsonable(whole), indent=1, allow_nan=False) + "\n")

    def part(self, name: str, call: Callable[[], Any]) -> bool:
        """Run one part and note its result; a failure is noted, printed and told, and does not lose the others."""
        self.save(f"in {name}")
        start = time.perf_counter()
        try:
            self.report[name] = call()
            print(f"{name}: {json.dumps(to_jsonable(self.report[name]))[:1500]}", flush=True)
        except Exception as error:  # whatever a part dies of, the rest of a short lease is worth having
            self.report.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
            print(f"{name} FAILED: {error}", file=sys.stderr, flush=True)
        self.report.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
        self.save(f"after {name}")
        return name not in self.report.get("failed", {})

    def vouch_for(self, *kernels: str) -> None:
        """Name the sources of kernels whose figures are complete."""
        self.report["source_hashes"] |= {name: backend.cuda().SOURCE_HASHES[name] for name in kernels}

    def close(self) -> int:
        """Write the complete file and say what is wrong with it; the exit code: 1 if anything is."""
        self.report["clocks_at_end"] = clocks()
        self.save("")
        lacks = {what: list(self.report.get(what, ())) for what in ("wrong", "failed", "skipped")}
        print(
            "; ".join(f"{what}: {names or 'none'}" for what, names in lacks.items()) + f"; wrote {self.out}"
        )
        return 1 if any(lacks.values()) else 0
