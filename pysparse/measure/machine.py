"""The machine card: everything that a speed figure depends on and that a reader cannot guess."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pysparse
from pysparse import backend

_FLAGS = {
    "sse4_2", "avx", "avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512dq",
    "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile",
    "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
}  # fmt: skip
_VARIABLES = {
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "LD_PRELOAD",
}  # fmt: skip
_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers", "pysparse")
_CPUS = Path("/sys/devices/system/cpu")


def machine_card() -> dict[str, Any]:
    """Return a JSON-ready description of CPU, threads, load, libraries and kernels; never raises.

    Whatever cannot be read is None. ``busy`` is true when more runs than there are cores: figures taken
    then are worth little.
    """
    parts: dict[str, Callable[[], Any]] = {
        "cpu": cpu_model,
        "cpu_id": cpu_id,
        "isa_flags": isa_flags,
        "cores": os.cpu_count,
        "usable_cores": usable_cores,
        "caches": cache_bytes,
        "governor": lambda: _read(_CPUS / "cpu0/cpufreq/scaling_governor"),
        "megahertz": _megahertz,
        "memory_bytes": _memory_bytes,
        "load_average": lambda: list(os.getloadavg()),
        "busy": is_busy,
        "platform": platform.platform,
        "python": platform.python_version,
        "packages": package_versions,
        "torch_threads": torch.get_num_threads,
        "torch_cpu_capability": lambda: torch.backends.cpu.get_cpu_capability(),
        "blas": _blas,
        "environment": environment,
        "pysparse_commit": commit,
        "pysparse_isa": backend.isa,
        "pysparse_threads": backend.num_threads,
        "core_missing": backend.missing_reason,
        "kernels": lambda: [str(key) for key in backend.kernels(supported_only=True)],
        "date": lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    card: dict[str, Any] = {}
    for name, read in parts.items():
        try:
            card[name] = read()
        except Exception as error:  # a description must not take the program down, whatever the platform does
            card[name] = None
            card.setdefault("unreadable", {})[name] = f"{type(error).__name__}: {error}"
    return card


def cpu_model() -> str:
    """Return the processor's marketing name, or what the platform calls it."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_id() -> list[int]:
    """Return [family, model, stepping] of an x86 processor: hypervisors shorten the name to "AMD EPYC"."""
    found: dict[str, int] = {}
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("cpu family", "model", "stepping") and value.strip().isdigit():
            found.setdefault(name.strip(), int(value))
    return [found[name] for name in ("cpu family", "model", "stepping") if name in found]


def isa_flags() -> list[str]:
    """Return the instruction sets of interest that the operating system reports, for the reader only.

    Kernels are chosen by the compiled core's own detection, never by this list.
    """
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith(("flags", "Features")):
            have = set(line.split(":", 1)[1].split())
            return sorted(_FLAGS & have)
    return []


def usable_cores() -> int:
    """Return the cores that this process may run on (its affinity, not the machine's count)."""
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_bytes() -> dict[str, int]:
    """Return {"L1d": ..., "L2": ..., "L3": ...} in bytes as seen by the first core."""
    found: dict[str, int] = {}
    for index in sorted((_CPUS / "cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1])
            found["L1d" if level == "1" else f"L{level}"] = int(size[:-1]) * scale if scale else int(size)
    return found


def last_level_cache_bytes() -> int:
    """Return the size of the largest cache, 0 when unknown."""
    return max(cache_bytes().values(), default=0)


def is_busy() -> bool:
    """Tell whether the one-minute load is above the machine's cores."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def package_versions() -> dict[str, str | None]:
    """Return the installed versions of the libraries that matter; None for a missing one."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = pysparse.__version__ if name == "pysparse" else None
    return versions


def environment() -> dict[str, str]:
    """Return the set variables that change speed or choice of kernels."""
    names = {name for name in os.environ if name.startswith("PYSPARSE_")} | _VARIABLES
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def commit() -> str | None:
    """Return the git commit of the checkout that this package runs from ("-dirty" when edited), else None."""
    root = Path(pysparse.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "HEAD")
    return head + (
        "-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no", "--", "pysparse") else ""
    )


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def _megahertz() -> float | None:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("cpu MHz"):
            return float(line.split(":", 1)[1])
    return None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _blas() -> list[str]:
    """Return the lines of torch's build description that name BLAS, oneDNN, OpenMP and the vector level."""
    words = ("BLAS", "MKL", "oneDNN", "OpenMP", "CPU capability")
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    return [
        line
        for line in lines
        if any(word in line for word in words) and not line.startswith("Build settings")
    ]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
