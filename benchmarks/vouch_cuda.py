"""Turn a GPU run into the file that lets its kernels be chosen by default.

    python benchmarks/vouch_cuda.py benchmarks/results/cuda_h200.json OUT/test.log \
        [OUT/cuda_attention.json OUT/cuda_tables.json] [--excuse TEST REASON]

Refuses a run with a wrong result or a failed test. A test that failed for what is no kernel's fault can be excused by
name, with a reason that goes into the file for all to read. Each report vouches for the kernels that it ran; those
whose sources change afterwards are experimental again.
Beside the hashes it writes the costs that layers choose by: microseconds = c0 + c1 * megabytes + c2 * million entries,
fitted to the run for each kernel and number of tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

GAIN = 1.05  # times faster, or the dense way is kept
ANCHOR = "anchor attention 10%"  # its row in the report
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


def attention_crossover(rows: list[dict[str, Any]]) -> int | None:
    """Return from how many keys on stripes, their choice included, beat cuDNN's exact attention by ``GAIN``.

    At a tenth of the candidates; between two lengths the logarithm of the ratio grows with that of the length. None
    where no length shows it.
    """
    gains = sorted((row["length"], row["over_cudnn"]) for row in rows if row["kernel"] == ANCHOR)
    for (shorter, before), (length, after) in itertools.pairwise([(1, 0.0), *gains]):
        if after >= GAIN:
            way = 1.0 if before <= 0 else math.log(GAIN / before) / math.log(after / before)
            return math.ceil(shorter * (length / shorter) ** max(0.0, way))
    return None


def passed(test_log: Path, excused: dict[str, str]) -> str:
    """Return pytest's last line; ValueError where a test failed that is not in ``excused``, by name and reason."""
    lines = test_log.read_text().strip().splitlines()
    last = lines[-1]
    failed = [match[1] for line in lines if (match := re.match(r"FAILED \S+::(\w+)", line))]
    counted = re.search(r"\b(\d+) failed", last)
    unexcused = sorted(set(failed) - excused.keys())
    if unexcused or len(failed) != int(counted[1] if counted else 0) or not set(excused) <= set(failed):
        raise ValueError(f"{test_log} ends with: {last}; failed: {unexcused}, excused: {sorted(excused)}")
    if not re.search(r"\b\d+ passed", last) or "error" in last:
        raise ValueError(f"{test_log} ends with: {last}")
    return last.strip("= ")


def vouch(
    report: Path, test_log: Path, *others: Path, excused: dict[str, str] | None = None
) -> dict[str, object]:
    """Return what the package needs to know of the run; ValueError where it proves nothing."""
    run = proven(report)
    ran = [proven(other) for other in others]
    more = {name: digest for other in ran for name, digest in other["source_hashes"].items()}
    keys = attention_crossover(
        [row for other in ran if "attention" in other["source_hashes"] for row in other["rows"]]
    )
    tests = {"tests": passed(test_log, excused or {})} | ({"excused": excused} if excused else {})
    return {
        "gpu": run["machine"]["gpu"],
        "date": run["machine"]["date"],
        **tests,
        "report": report.name,
        "rates": {
            name: run["machine"][name] for name in ("gigabytes_per_second", "multiprocessor_gigahertz")
        },
        "source_hashes": run["source_hashes"] | more,
        "attention_crossover": keys,
        "costs": costs(run["rows"]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("test_log", type=Path)
    parser.add_argument("others", type=Path, nargs="*")
    parser.add_argument("--excuse", nargs=2, action="append", default=[], metavar=("TEST", "REASON"))
    options = parser.parse_args()
    found = vouch(options.report, options.test_log, *options.others, excused=dict(options.excuse))
    TARGET.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {TARGET}")
