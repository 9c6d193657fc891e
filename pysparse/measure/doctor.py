"""What is installed, what runs, and what to do about what does not; never raises."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pysparse import backend
from pysparse.measure.kernels import kernel_info
from pysparse.measure.machine import is_busy, machine_card, usable_cores
from pysparse.measure.results import to_jsonable

_EXTRAS = {"plot": "matplotlib", "eval": "lm_eval", "peft": "peft", "cupy": "cupy"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: ``ok`` False means something to act on, and ``detail`` says what."""

    name: str
    ok: bool
    detail: str


def doctor() -> dict[str, Any]:
    """Return {"ok", "checks", "kernels", "machine"}, JSON-ready; what fails becomes a check that fails."""
    checks = [_guarded(name, check) for name, check in _CHECKS.items()]
    return {
        "ok": all(check.ok for check in checks),
        "checks": to_jsonable(checks),
        "kernels": _kernels(),
        "machine": machine_card(),
    }


def show_findings(findings: dict[str, Any]) -> Table:
    """Return :func:`doctor`'s result as a rich table."""
    table = Table(title="pysparse doctor", title_justify="left", show_lines=False)
    for column in ("", "what", "finding"):
        table.add_column(column, overflow="fold")
    for check in findings["checks"]:
        table.add_row("ok" if check["ok"] else "!!", check["name"], check["detail"])
    card = findings["machine"]
    table.add_row(
        "", "cpu", f"{card.get('cpu')}, {card.get('cores')} cores, {' '.join(card.get('isa_flags') or [])}"
    )
    for what, kernel in findings["kernels"].items():
        table.add_row("", what, kernel)
    return table


def _guarded(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:  # a doctor that dies with the patient helps nobody
        return Check(name, False, f"could not be checked: {type(error).__name__}: {error}")


def _kernels() -> dict[str, str]:
    chosen = {}
    for format in ("bitmap", "dense"):
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for tokens in (1, 256):
                name = (
                    f"{format} {str(dtype).removeprefix('torch.')}, {tokens} token{'s' if tokens > 1 else ''}"
                )
                try:
                    chosen[name] = str(kernel_info(format, dtype=dtype, tokens=tokens))
                except Exception as error:
                    chosen[name] = f"could not be asked: {type(error).__name__}: {error}"
    return chosen


def _core() -> tuple[bool, str]:
    if not backend.available():
        return (
            False,
            f"not loaded ({backend.missing_reason()}); the slow torch path runs. Reinstall or rebuild",
        )
    return True, f"loaded, {len(backend.kernels())} kernels, level {backend.isa()}"


def _cuda() -> tuple[bool, str]:
    missing = backend.cuda_missing_reason()
    if missing and not torch.cuda.is_available():
        return True, f"not used: {missing}"
    if missing:
        return (
            False,
            f"torch sees {torch.cuda.get_device_name()}, the sparse kernels do not run there: {missing}",
        )
    gates = {name: backend.cuda_gate(name) for name in backend.cuda().SOURCE_HASHES}
    closed = [f"{name} ({why})" for name, why in gates.items() if why]
    used = ", ".join(name for name, why in gates.items() if not why) or "none"
    return True, f"kernels used: {used}" + (f"; not used: {'; '.join(closed)}" if closed else "")


def _threads() -> tuple[bool, str]:
    threads, cores = torch.get_num_threads(), usable_cores()
    if threads > cores:
        return (
            False,
            f"torch uses {threads} threads on {cores} usable cores: call torch.set_num_threads({cores})",
        )
    return True, f"torch {threads}, pysparse {backend.num_threads()}, usable cores {cores}"


def _openmp() -> tuple[bool, str]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return True, "not checked: no /proc here"
    names = {line.split()[-1] for line in maps.read_text().splitlines() if "gomp" in line or "libomp" in line}
    if len(names) > 1:
        return (
            False,
            f"{len(names)} OpenMP runtimes are loaded and will fight for cores: {', '.join(sorted(names))}",
        )
    return True, next(iter(names), "none loaded")


def _transformers() -> tuple[bool, str]:
    version = metadata.version("transformers")
    ok = version.split(".")[0] == "5"
    return ok, f"{version}" + ("" if ok else "; pysparse is tested with >=5.0,<6")


def _load() -> tuple[bool, str]:
    load = os.getloadavg()[0]
    if is_busy():
        return False, f"load {load:.1f} on {os.cpu_count()} cores: do not trust timings now"
    return True, f"{load:.1f} on {os.cpu_count()} cores"


def _bundled() -> tuple[bool, str]:
    from pysparse import data

    return True, str(data.demo_model_path())


def _extras() -> tuple[bool, str]:
    found = {extra: importlib.util.find_spec(module) is not None for extra, module in _EXTRAS.items()}
    return True, ", ".join(f"{extra} {'yes' if have else 'no'}" for extra, have in found.items())


_CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "compiled core": _core,
    "CUDA kernels": _cuda,
    "threads": _threads,
    "one OpenMP": _openmp,
    "transformers": _transformers,
    "load": _load,
    "bundled model": _bundled,
    "optional extras": _extras,
}
