"""Gather what the steps of gpu_check.sh left in a folder into its gpu_report.json, whole at any time.

    python benchmarks/gpu_report.py FOLDER STEP EXIT_CODE SECONDS

Each step is noted with its exit code, its seconds and the last line of its log; the figures of the benchmarks that
have been run so far go in as they are. The file is written beside and renamed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FIGURES = {
    "kernels": "cuda.json", "end_to_end": "cuda_end_to_end.json", "attention": "cuda_attention.json",
    "tables": "cuda_tables.json",
}  # fmt: skip


def commit() -> str | None:
    """Return the commit of the sources; None where they came without their history."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def gather(folder: Path, step: str, code: int, seconds: int) -> dict[str, Any]:
    """Return the report with this step added to those already noted."""
    path = folder / "gpu_report.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    report["commit"] = commit()
    report["steps"][step] = {
        "exit_code": code, "seconds": seconds, "last_line": last_line(folder / f"{step}.log")
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
