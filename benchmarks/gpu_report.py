"""Gather what the steps of gpu_check.sh left in a folder into its gpu_report.json, whole at any time.

    python benchmarks/gpu_report.py FOLDER STEP EXIT_CODE SECONDS

Each step is noted with its exit code, its seconds, the last line of its log and the clocks after it, and with the
commit (GPU_COMMIT where the sources came without their history) and the digest of the kernels' sources that it ran.
Steps and figures of another commit or of other kernels are left out, figures by name under "stale"; files that are no
whole JSON are listed under "unreadable", and make the exit code 1. Nothing of pysparse is imported: the report is
written where the package does not even load.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {
    "kernels": "cuda.json", "end_to_end": "cuda_end_to_end.json", "attention": "cuda_attention.json",
    "tables": "cuda_tables.json", "peers": "cuda_peers.json",
}  # fmt: skip
# The module needs nothing of torch, whose import would take longer than all else here.
READ_HASHES = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.SOURCE_HASHES))
"""


def commit() -> str | None:
    """Return GPU_COMMIT, else the commit of the sources ("-dirty" when edited); None without either."""
    if os.environ.get("GPU_COMMIT"):
        return os.environ["GPU_COMMIT"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def clocks() -> str | None:
    """Return the GPU's name, driver, clocks and temperature now; None without nvidia-smi."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def source_hashes() -> dict[str, str]:
    """Return the hashes that the installed kernels carry; none where they cannot be loaded."""
    built = [path for suffix in EXTENSION_SUFFIXES if (path := ROOT / "pysparse" / f"_cuda{suffix}").exists()]
    if not built:
        return {}
    command = [sys.executable, "-c", READ_HASHES, str(built[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    hashes: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return hashes


def digest(hashes: dict[str, str]) -> str:
    """Return one short hash of all."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty, or that there is none."""
    if not log.exists():
        return f"no {log.name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"{log.name} is empty"


def read(path: Path, unreadable: list[str]) -> dict[str, Any]:
    """Return a JSON object; empty where there is no file, and where it is damaged, which ``unreadable`` takes down."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:  # not JSON to its end, or not even text
        found = None
    if isinstance(found, dict):
        return found
    unreadable.append(path.name)
    return {}


def gather(folder: Path, step: str, code: int, seconds: int) -> dict[str, Any]:
    """Return the report with this step added to those noted for the same commit and kernels."""
    hashes, unreadable = source_hashes(), list[str]()
    stamp = {"commit": commit(), "sources": digest(hashes)}
    before = read(folder / "gpu_report.json", unreadable).get("steps", {})
    steps = {name: one for name, one in before.items() if stamp.items() <= one.items()}
    steps[step] = stamp | {
        "exit_code": code, "seconds": seconds, "last_line": last_line(folder / f"{step}.log"), "gpu": clocks()
    }  # fmt: skip
    report: dict[str, Any] = {"commit": stamp["commit"], "source_hashes": hashes, "steps": steps}
    for name, file in FIGURES.items():
        if figures := read(folder / file, unreadable):
            card = figures.get("machine", {})
            same = card.get("pysparse_commit") == stamp["commit"] and card.get("kernel_sources") == hashes
            report |= {name: figures} if same else {"stale": [*report.get("stale", []), file]}
    return report | ({"unreadable": unreadable} if unreadable else {})


def main() -> int:
    folder, step, code, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    report = gather(folder, step, code, seconds)
    beside = folder / "gpu_report.json.part"
    beside.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(beside, folder / "gpu_report.json")
    for file in report.get("unreadable", []):
        print(f"unreadable: {folder / file}", file=sys.stderr)
    return 1 if "unreadable" in report else 0


if __name__ == "__main__":
    raise SystemExit(main())
