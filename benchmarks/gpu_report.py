"""Gather what the steps of gpu_check.sh left in a folder into its gpu_report.json, whole at any time.

    python benchmarks/gpu_report.py FOLDER STEP EXIT_CODE SECONDS

Each step is noted with its exit code, its seconds, the last line of its log and the clocks after it; the commit, the
hashes of the kernels' sources and the figures of the benchmarks that have been run so far go in as they are. The file
is written beside and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

FIGURES = {
    "kernels": "cuda.json", "end_to_end": "cuda_end_to_end.json", "attention": "cuda_attention.json",
    "tables": "cuda_tables.json", "peers": "cuda_peers.json",
}  # fmt: skip


def commit() -> str | None:
    """Return the commit of the sources; None where they came without their history."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def clocks() -> str | None:
    """Return the GPU's name, driver, clocks and temperature now; None without nvidia-smi."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def source_hashes() -> dict[str, str]:
    """Return the hashes that the built kernels carry; none where they cannot be imported."""
    code = "import json; from pysparse import backend; print(json.dumps(backend.cuda().SOURCE_HASHES))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    hashes: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return hashes


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def gather(folder: Path, step: str, code: int, seconds: int) -> dict[str, Any]:
    """Return the report with this step added to those already noted."""
    path = folder / "gpu_report.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    report["commit"] = commit()
    if step == "build" and not code:
        report["source_hashes"] = source_hashes()
    report["steps"][step] = {
        "exit_code": code, "seconds": seconds, "last_line": last_line(folder / f"{step}.log"), "gpu": clocks()
    }  # fmt: skip
    for name, file in FIGURES.items():
        if (folder / file).exists():
            report[name] = json.loads((folder / file).read_text())
    return report


def main() -> None:
    folder, step, code, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    beside = folder / "gpu_report.json.part"
    beside.write_text(json.dumps(gather(folder, step, code, seconds), indent=1) + "\n")
    os.replace(beside, folder / "gpu_report.json")


if __name__ == "__main__":
    main()
