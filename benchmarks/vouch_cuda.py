"""Turn a GPU run into the file that lets its kernels be chosen by default.

    python benchmarks/vouch_cuda.py benchmarks/results/cuda_h200.json OUT/test.log \
        [OUT/cuda_attention.json OUT/cuda_tables.json]

Refuses a run with a wrong result or a failed test. Each report vouches for the kernels that it ran; those whose sources
change afterwards are experimental again.
Beside the hashes it writes the costs that layers choose by: microseconds = c0 + c1 * megabytes + c2 * million entries,
fitted to the run for each kernel and number of tokens.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

TARGET = Path(__file__).parents[1] / "pysparse" / "data" / "cuda_report.json"


def fit(rows: list[dict[str, Any]]) -> tuple[list[float], float]:
    """Return the coefficients, none negative, that minimise the relative errors, and the worst of these."""
    times = np.array([row["microseconds"] for row in rows])
    terms = np.array([[1, row["bytes"] / 1e6, row["rows"] * row["cols"] / 1e6] for row in rows])
    # Megabytes and entries are in proportion where there is one density: the bytes explain all, then.
    used = [0, 1, 2] if len({row["sparsity"] for row in rows}) > 1 else [0, 1]
    while True:
        found = np.linalg.lstsq(terms[:, used] / times[:, None], np.ones(len(times)), rcond=None)[0]
        if found.min() >= 0 or len(used) == 1:
            break
        used.pop(int(found.argmin()))
    line = np.zeros(3)
    line[used] = found
    return [round(float(c), 4) for c in line], float(np.abs(terms @ line / times - 1).max())


def costs(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the fitted line of each kernel and number of tokens."""
    # Beside nm, weights drawn for it only say what else could run on them.
    rows = [row for row in rows if row["kernel"] == "nm" or not row.get("pattern")]
    result: dict[str, dict[str, list[float]]] = {}
    for kernel, tokens in sorted({(row["kernel"], row["tokens"]) for row in rows}):
        line, worst = fit([row for row in rows if (row["kernel"], row["tokens"]) == (kernel, tokens)])
        result.setdefault(kernel, {})[str(tokens)] = line
        print(f"{kernel:9s} {tokens:2d} tokens: {line}, at most {worst:.0%} off")
    return result


def proven(report: Path) -> dict[str, Any]:
    """Return a report; ValueError where it has a wrong result or none."""
    run: dict[str, Any] = json.loads(report.read_text())
    if run["wrong"] or not run["rows"]:
        raise ValueError(f"{report}: {len(run['rows'])} figures, wrong: {run['wrong']}")
    return run


def vouch(report: Path, test_log: Path, *others: Path) -> dict[str, object]:
    """Return what the package needs to know of the run; ValueError where it proves nothing."""
    run = proven(report)
    more = {name: digest for other in others for name, digest in proven(other)["source_hashes"].items()}
    last = test_log.read_text().strip().splitlines()[-1]
    if not re.search(r"\b\d+ passed", last) or re.search(r"failed|error", last):
        raise ValueError(f"{test_log} ends with: {last}")
    return {
        "gpu": run["machine"]["gpu"],
        "date": run["machine"]["date"],
        "tests": last.strip("= "),
        "report": report.name,
        "rates": {
            name: run["machine"][name] for name in ("gigabytes_per_second", "multiprocessor_gigahertz")
        },
        "source_hashes": run["source_hashes"] | more,
        "costs": costs(run["rows"]),
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(vouch(*map(Path, sys.argv[1:])), indent=1) + "\n")
    print(f"wrote {TARGET}")
