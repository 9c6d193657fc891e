"""Turn a GPU run into the file that lets its kernels be chosen by default.

    python benchmarks/vouch_cuda.py benchmarks/results/cuda_h200.json OUT/test.log \\
        [OUT/cuda_attention.json OUT/cuda_tables.json] [--excuse NAME REASON]

Refuses a run with a wrong result, too few rows or tests, or figures of other kernels than gpu_report.json beside the
log says were tested (cuda_evidence.py). A failed test, a step that did not pass (sanitize-races), a part that broke or
a gpu_report that is missing can be excused by name, with a reason that goes into the file for all to read. Each report
vouches for the kernels that it ran, those whose sources change afterwards are experimental again, and kernels that this
run did not cover keep what the file says of them: a hash stands for the very sources that were run.
Beside the hashes it writes the costs that layers choose by: microseconds = c0 + c1 * megabytes + c2 * million entries,
fitted to the run for each kernel and number of tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cuda_evidence import ANCHOR, Findings, Report, fitted, passed, proven, read, steps

from pysparse.formats import PACKINGS
from pysparse.measure.results import write_text

GAIN = 1.05  # times faster, or the dense way is kept
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
    rows = [row for row in rows if fitted(row)]
    result: dict[str, dict[str, list[float]]] = {}
    for kernel, tokens in sorted({(row["kernel"], row["tokens"]) for row in rows}):
        line, worst = fit([row for row in rows if (row["kernel"], row["tokens"]) == (kernel, tokens)])
        result.setdefault(kernel, {})[str(tokens)] = line
        print(f"{kernel:9s} {tokens:2d} tokens: {line}, at most {worst:.0%} off")
    return result


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


def vouch(
    figures: Sequence[Path],
    test_log: Path,
    *,
    excused: dict[str, str] | None = None,
    before: Report | None = None,
) -> Report:
    """Return what the package needs to know of a run, and what ``before`` says of kernels that it did not cover.

    ``figures`` are reports of benchmarks, ``test_log`` is the log of the GPU tests; gpu_report.json beside the log
    ties them together. ValueError where they prove nothing, for a finding without excuse and an excuse without finding.
    """
    last_line, failed = passed(test_log)
    reports = []
    findings: Findings = dict(failed)
    for path in figures:
        report, against = proven(path)
        reports.append(report | {"report": path.name})
        findings |= against
    hashes = one_set("sources", [report["source_hashes"].items() for report in reports])
    one_set("GPUs", [[("GPU", report["machine"]["gpu"])] for report in reports])
    findings |= steps(test_log.parent / "gpu_report.json", last_line, hashes, tests_failed=bool(failed))
    refuse_open(findings, excused or {})
    machine = reports[0]["machine"]
    run = {"gpu": machine["gpu"], "date": machine["date"], "tests": last_line}
    return merged(run | ({"excused": excused} if excused else {}), reports, hashes, before or {})


def one_set(what: str, claims: Sequence[Any]) -> dict[str, str]:
    """Return the items of all reports as one dict; ValueError where two differ about a key."""
    found: dict[str, str] = {}
    for key, value in itertools.chain(*claims):
        if found.setdefault(key, value) != value:
            raise ValueError(f"the reports are of several {what}: {key} is {found[key]} and {value}")
    return found


def refuse_open(findings: Findings, excused: dict[str, str]) -> None:
    """ValueError for findings that are not excused, and for excuses of what was not found."""
    if left := [f"{name}: {what}" for name, what in findings.items() if name not in excused]:
        raise ValueError(f"not excused: {'; '.join(left)}")
    if unused := sorted(excused.keys() - findings.keys()):
        raise ValueError(f"excused, but not found: {', '.join(unused)}")


def merged(run: Report, reports: list[Report], hashes: dict[str, str], before: Report) -> Report:
    """Return the file of a run, with what stays of the one before it.

    What it says of a GPU, its costs and its tests is of the run that measured the linear kernels; runs that vouch for
    other kernels are listed under "others".
    """
    linear = next((report for report in reports if report["source_hashes"].keys() & PACKINGS.keys()), None)
    kept = {name: digest for name, digest in before.get("source_hashes", {}).items() if name not in hashes}
    others = [
        one | {"kernels": [name for name in one["kernels"] if name in kept]}
        for one in before.get("others", [])
    ]
    named = {name for one in others for name in one["kernels"]}
    if linear is None:
        top = before
        others.append(record(run, list(hashes)))
    else:
        top = run
        others.append(record(before, [name for name in kept if name not in named]))
    rows = [row for report in reports if "attention" in report["source_hashes"] for row in report["rows"]]
    known = measured(linear, kept, before)
    found: Report = {
        **{key: top[key] for key in ("gpu", "date", "tests", "excused") if key in top},
        "report": known["report"],
        "rates": known["rates"],
        "source_hashes": kept | hashes,
        "attention_crossover": attention_crossover(rows) if rows else before.get("attention_crossover"),
        "costs": known["costs"],
    }
    return found | ({"others": left} if (left := [one for one in others if one["kernels"]]) else {})


def record(run: Report, kernels: list[str]) -> Report:
    """Return who vouches for ``kernels``."""
    return {key: run[key] for key in ("gpu", "date", "tests", "excused") if key in run} | {"kernels": kernels}


def measured(linear: Report | None, kept: dict[str, str], before: Report) -> Report:
    """Return the costs, and where they were measured; those of kernels that stay are of the same GPU, or ValueError."""
    if linear is None:
        if "costs" not in before:
            raise ValueError(
                "no report is of linear kernels, and there is no file with their costs to add to"
            )
        return {key: before[key] for key in ("report", "rates", "costs")}
    machine, stay = linear["machine"], [name for name in kept if name in PACKINGS]
    if stay and before["gpu"] != machine["gpu"]:
        raise ValueError(
            f"costs of {', '.join(stay)} are of {before['gpu']}: measure them on {machine['gpu']} too"
        )
    lines = {name: before["costs"][name] for name in stay}
    rates = {name: machine[name] for name in ("gigabytes_per_second", "multiprocessor_gigahertz")}
    return {"report": linear["report"], "rates": rates, "costs": lines | costs(linear["rows"])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("test_log", type=Path)
    parser.add_argument("others", type=Path, nargs="*")
    parser.add_argument("--excuse", nargs=2, action="append", default=[], metavar=("NAME", "REASON"))
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args()
    try:
        before = read(options.target) if options.target.exists() else {}
        figures = [options.report, *options.others]
        found = vouch(figures, options.test_log, excused=dict(options.excuse), before=before)
    except ValueError as error:
        sys.exit(f"vouch_cuda.py: {error}")
    write_text(options.target, json.dumps(found, indent=1) + "\n")
    print(f"wrote {options.target}")


if __name__ == "__main__":
    main()
