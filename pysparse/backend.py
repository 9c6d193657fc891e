"""Floor 1: loads the compiled core, lists its kernels, forces an ISA level, counts threads.

torch is imported before the extension on purpose: its wheel ships ``libgomp.so.1`` under that very
soname, and whichever library comes first serves both. One OpenMP pool then runs torch's work and ours,
and ``torch.set_num_threads`` rules both.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pysparse import nvrtc

logger = logging.getLogger("pysparse")

DISABLE_VARIABLE = "PYSPARSE_DISABLE_EXT"
ISA_VARIABLE = "PYSPARSE_ISA"
EXPERIMENTAL_VARIABLE = "PYSPARSE_EXPERIMENTAL"
NVRTC_VARIABLE = "PYSPARSE_CUDA_NVRTC"
CACHE_VARIABLE = "PYSPARSE_CACHE_DIR"
# Written by the run on a GPU that checked and timed the kernels: the hash of each one's sources, and where.
CUDA_REPORT = Path(__file__).parent / "data" / "cuda_report.json"


@dataclass(frozen=True, slots=True)
class KernelKey:
    """One compiled kernel: what it computes, on which packing and values, for which instruction set."""

    op: str  # "linear", "unpack"
    format: str  # "bitmap", "bitmap-int8", "nm", "nm-int8", "dense"
    dtype: str  # "float32", "bfloat16"
    isa: str  # a name of isa_levels()
    supported: bool = True  # by this CPU

    def __str__(self) -> str:
        return f"{self.op}-{self.format}-{self.dtype}-{self.isa}"


def switched_on(variable: str) -> bool:
    """Tell whether an environment variable says yes (1, true, yes, on); ValueError where it says neither yes nor no."""
    text = os.environ.get(variable, "").strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("", "0", "false", "no", "off"):
        return False
    raise ValueError(f"{variable}={os.environ[variable]}: choose 1 or 0")


def _load_core() -> tuple[ModuleType | None, str]:
    if switched_on(DISABLE_VARIABLE):
        return None, f"disabled by {DISABLE_VARIABLE}={os.environ[DISABLE_VARIABLE]}"
    try:
        from pysparse import _core
    except ImportError as error:  # a wheel for another platform, a broken build: keep importing
        return None, str(error)
    return _core, ""


def _load_cuda() -> tuple[ModuleType | None, str]:
    if switched_on(DISABLE_VARIABLE):
        return None, f"disabled by {DISABLE_VARIABLE}={os.environ[DISABLE_VARIABLE]}"
    try:
        return import_module("pysparse._cuda"), ""
    except ModuleNotFoundError as error:
        return None, "this build has none" if error.name == "pysparse._cuda" else str(error)
    except Exception as error:  # for another platform, half written, ...: the CPU half works alone
        return None, f"{type(error).__name__}: {error}"


_core, _missing_reason = _load_core()
_cuda, _cuda_missing_reason = _load_cuda()
_warned: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """Warn about ``key`` a single time per process, however many layers share the cause."""
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def cache_directory() -> Path:
    """Return PYSPARSE_CACHE_DIR, or ``pysparse`` under the user's cache directory (XDG)."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pysparse"


def core() -> Any:
    """Return the compiled module; raises RuntimeError with the cause when it could not be loaded."""
    if _core is None:
        raise RuntimeError(f"the compiled core of pysparse is not available: {_missing_reason}")
    return _core


def available() -> bool:
    """Tell whether the compiled core is loaded."""
    return _core is not None


def missing_reason() -> str:
    """Return why the compiled core is not loaded, or an empty string."""
    return _missing_reason


def warn_slow_path() -> None:
    """Say once that there is no compiled core and that dense products are computed instead."""
    warn_once(
        "no-core",
        f"pysparse runs without its compiled kernels ({_missing_reason}); sparse layers are unpacked and "
        "multiplied densely, which is slow. Reinstall a wheel for this platform, or build from source.",
    )


def kernels(
    op: str | None = None,
    format: str | None = None,
    dtype: str | None = None,
    isa: str | None = None,
    *,
    supported_only: bool = False,
) -> list[KernelKey]:
    """List the compiled kernels, best ISA level first; each filter that is given must match."""
    if _core is None:
        return []
    keys = [KernelKey(*entry) for entry in _core.kernels()]
    wanted = (op, format, dtype, isa)
    return [
        key
        for key in keys
        if all(
            w is None or w == have
            for w, have in zip(wanted, (key.op, key.format, key.dtype, key.isa), strict=True)
        )
        and (key.supported or not supported_only)
    ]


def isa_levels() -> list[tuple[str, bool]]:
    """Return (name, supported by this CPU) of every ISA level, lowest first."""
    return [] if _core is None else [(name, bool(ok)) for name, ok in _core.isa_levels()]


def isa() -> str:
    """Return the highest ISA level that kernels are taken from now ("none" without the core)."""
    return "none" if _core is None else str(_core.active_isa())


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Take kernels of ISA level ``name`` or below inside the block; ValueError if the CPU lacks it."""
    before = core().forced_isa()
    _set_isa(name)
    try:
        yield
    finally:
        _set_isa(before)


_isa_epoch = 0


def _set_isa(name: str) -> None:
    global _isa_epoch
    core().force_isa(name)
    _isa_epoch += 1


def isa_epoch() -> int:
    """Return a number that changes when :func:`force_isa` does: what was decided before is stale."""
    return _isa_epoch


def cpu_signature() -> str:
    """Return what tells this processor from others: name, family, model and stepping where Linux says them."""
    fields = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if not line.strip():
                break  # the first core speaks for all
            fields[name.strip()] = value.strip()
    names = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return " ".join(fields[name] for name in names if name in fields) or platform.machine()


def num_threads() -> int:
    """Return the threads that the kernels use: torch's number, or PYSPARSE_NUM_THREADS where it is set."""
    return torch.get_num_threads() if _core is None else int(_core.num_threads())


def cuda() -> Any:
    """Return the module of CUDA kernels; raises RuntimeError with the cause when it could not be loaded."""
    if _cuda is None:
        raise RuntimeError(
            f"the CUDA kernels of pysparse are not available ({_cuda_missing_reason}); "
            "build from source with -C cmake.define.PYSPARSE_CUDA=ON"
        )
    return _cuda


@cache
def cuda_missing_reason() -> str:
    """Return why no CUDA kernel can run here, or an empty string."""
    if _cuda is None:
        return _cuda_missing_reason
    if not _cuda.device_count():
        return driver_problem(*_cuda.versions())
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def driver_problem(driver: int, runtime: int) -> str:
    """Return why the CUDA kernels see no device, from both versions (13000 is CUDA 13.0; 0: no driver)."""
    if not driver:
        return "no CUDA driver is installed"
    if driver // 1000 < runtime // 1000:  # within a major version any driver serves
        have, need = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
        return f"the driver supports CUDA {have}, the kernels need the one of CUDA {need} or later"
    return "the driver shows no CUDA device"


def cuda_kernels() -> list[KernelKey]:
    """List the CUDA kernels of this build; ``supported`` tells whether a device is there to run them."""
    if _cuda is None:
        return []
    usable = not cuda_missing_reason()
    halves, entries = ("bfloat16", "float16"), ("float32", "bfloat16", "float16")
    names: list[tuple[str, str, tuple[str, ...]]] = []
    names += [
        (op, packing, halves)
        for packing in ("delta", "fragment", "pair", "nm")
        for op in ("linear", "unpack")
    ]
    names += [("attention", keys, halves) for keys in ("blocks", "spans", "stripes")]
    names += [("embedding", "bitmap", entries), ("select", "row", entries), ("select", "nm", entries)]
    names += [("sweep", "dense", ("float32",)), ("shapley", "fm", ("float32",))]
    return [KernelKey(op, format, dtype, "cuda", usable) for op, format, dtypes in names for dtype in dtypes]


@cache
def _reported_hashes() -> dict[str, str]:
    if not CUDA_REPORT.exists():
        return {}
    hashes: dict[str, str] = json.loads(CUDA_REPORT.read_text())["source_hashes"]
    return hashes


def experimental() -> bool:
    """Tell whether PYSPARSE_EXPERIMENTAL asks for kernels that no GPU report vouches for."""
    return switched_on(EXPERIMENTAL_VARIABLE)


def cuda_gate(format: str) -> str:
    """Return why kernels of ``format`` are not chosen by default, or an empty string when they are.

    ``format`` is a packing, "attention", "embedding", "pruning" or "shapley". Its kernels are chosen only when the
    report of a GPU run names the hash of their present sources, or when PYSPARSE_EXPERIMENTAL=1 asks for them.
    """
    missing = cuda_missing_reason()
    if missing:
        return missing
    built = cuda().SOURCE_HASHES.get(format)
    if built is None:
        return f"this build has no {format} kernels: build it anew"
    if not experimental() and _reported_hashes().get(format) != built:
        return (
            f"the {format} kernel's sources differ from those that a GPU report vouches for; "
            f"set {EXPERIMENTAL_VARIABLE}=1 to use it all the same"
        )
    _prepare(format)
    return ""


@cache
def _prepare(format: str) -> None:
    """Have kernels of ``format`` compiled for GPUs that this build has no machine code for.

    PYSPARSE_CUDA_NVRTC=0 leaves them to the driver, which makes code from PTX; 1 compiles for every GPU, and raises
    :class:`~pysparse.nvrtc.NvrtcError` where that cannot be. By default the driver's code serves then, with a warning.
    """
    wanted = os.environ.get(NVRTC_VARIABLE) or "auto"
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"{NVRTC_VARIABLE}={wanted}: choose 0, 1 or auto")
    if wanted == "0":
        return
    devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    try:
        nvrtc.load(cuda(), format, devices, cache_directory() / "cuda", always=wanted == "1")
    except nvrtc.NvrtcError as error:
        if wanted == "1":
            raise
        warn_once(
            "nvrtc",
            f"{error}. The driver's code for the {format} kernels is used; {NVRTC_VARIABLE}=0 chooses it",
        )
