"""Turn a GPU run into the file that lets its kernels be chosen by default.

    python benchmarks/vouch_cuda.py benchmarks/results/cuda_h200.json OUT/test.log

Refuses a run with a wrong result or a failed test. Kernels whose sources change afterwards are experimental again.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

TARGET = Path(__file__).parents[1] / "pysparse" / "data" / "cuda_report.json"


def vouch(report: Path, test_log: Path) -> dict[str, object]:
    """Return what the package needs to know of the run; ValueError where it proves nothing."""
    run = json.loads(report.read_text())
    last = test_log.read_text().strip().splitlines()[-1]
    if run["wrong"] or not run["rows"]:
        raise ValueError(f"{report}: {len(run['rows'])} figures, wrong: {run['wrong']}")
    if not re.search(r"\b\d+ passed", last) or re.search(r"failed|error", last):
        raise ValueError(f"{test_log} ends with: {last}")
    return {
        "gpu": run["machine"]["gpu"],
        "date": run["machine"]["date"],
        "tests": last.strip("= "),
        "report": report.name,
        "source_hashes": run["source_hashes"],
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(vouch(Path(sys.argv[1]), Path(sys.argv[2])), indent=1) + "\n")
    print(f"wrote {TARGET}")
