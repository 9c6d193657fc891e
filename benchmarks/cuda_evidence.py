"""What a GPU run must show before its kernels are vouched for: right results, enough of them, and tests that passed.

What proves nothing raises ValueError with one sentence. What speaks against a run but may be no kernel's fault (a
failed test, a step that did not pass, a rival that broke) is returned as findings {name: what}, to be excused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cuda_run import MOST_ATTENTION_ERROR, MOST_ERROR

from pysparse.formats import PACKINGS

Report = dict[str, Any]
Findings = dict[str, str]
ANCHOR = "anchor attention 10%"  # its row in the attention report
ATTENTION_ROWS = ("flash", "anchor region", "identify", "stripes 10%", "blocks 10%", ANCHOR)
TABLES = ("embedding", "shapley", "pruning")
MACHINE = ("gpu", "date", "gigabytes_per_second", "multiprocessor_gigahertz")
STEPS = ("build", "test", "nvrtc", "sanitize-memory", "sanitize-races")
LEAST_SHAPES = 2  # of a kernel at a number of tokens: not all take wide matrices with many tokens
LEAST_ROWS = 4  # a line of three coefficients goes through any three
LEAST_PASSED = 400  # GPU tests; a run of all of them has some thirty more
MOST_SKIPPED = 4


def read(path: Path) -> Report:
    """Return a JSON object; ValueError where there is none."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a report")
    return found


def proven(path: Path) -> tuple[Report, Findings]:
    """Return the report of a benchmark and what speaks against it; ValueError where it proves nothing."""
    report = read(path)
    missing = [key for key in ("machine", "source_hashes", "rows", "wrong") if key not in report]
    missing += [f"machine.{key}" for key in MACHINE if key not in report.get("machine", {})]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it was cut off, or is no report of kernels")
    if not report["source_hashes"]:
        raise ValueError(f"{path} vouches for no kernel: {report.get('cut_off', 'its runs did not end')}")
    if report.get("skipped"):
        raise ValueError(f"{path}: the time was too short for {report['skipped']}")
    wrong = [*report["wrong"], *wrong_results(path, report)]
    if wrong:
        raise ValueError(f"{path}: wrong: {wrong}")
    check_rows(path, report)
    return report, dict(report.get("failed", {}))


def wrong_results(path: Path, report: Report) -> list[str]:
    """Return the results whose stated error is over the bound, whatever the report's own list says."""
    wrong = [
        f"{row.get('kernel')} {row.get('rows')} x {row.get('cols')}, {row.get('tokens')} tokens: {row['error']}"
        for row in report["rows"]
        if "error" in row and not number(path, row, "error") < MOST_ERROR
    ]
    for length, errors in report.get("errors", {}).items():
        wrong += [
            f"{name} at {length}" for name in errors if not number(path, errors, name) < MOST_ATTENTION_ERROR
        ]
    return wrong


def number(path: Path, row: Mapping[str, Any], key: str) -> float:
    """Return a figure of a row; ValueError unless it is a finite number that is not negative."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{path}: {key} is {value!r} in {dict(row)}")
    return float(value)


def check_rows(path: Path, report: Report) -> None:
    """ValueError where a kernel whose hash is named has too few rows, or rows that no line can be fitted to."""
    linear = [name for name in report["source_hashes"] if name in PACKINGS]
    if linear:
        if dark := [key for key in MACHINE[2:] if not number(path, report["machine"], key)]:
            raise ValueError(
                f"{path}: the GPU tells no {' and no '.join(dark)}, by which costs are scaled to others"
            )
        check_linear(path, linear, report["rows"])
    for name in report["source_hashes"].keys() - set(linear):
        if name == "attention":
            seen = {row.get("kernel") for row in report["rows"]}
            lacking = [kernel for kernel in ATTENTION_ROWS if kernel not in seen]
            checked = {check for errors in report.get("errors", {}).values() for check in errors}
            lacking += [
                f"a check of {kernel}" for kernel in ("flash", "stripes 10%") if kernel not in checked
            ]
        elif name in TABLES:
            lacking = [] if any(row.get("group") == name for row in report["rows"]) else ["a row"]
        else:
            raise ValueError(f"{path}: {name!r} is no kernel")
        if lacking:
            raise ValueError(f"{path} vouches for {name} without {', '.join(lacking)}")


def check_linear(path: Path, kernels: Sequence[str], rows: Sequence[Report]) -> None:
    """ValueError unless cuBLAS and each kernel were timed at one token, and enough of each at any number."""
    shapes: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for row in rows:
        if not number(path, row, "microseconds") or not number(path, row, "bytes"):
            raise ValueError(f"{path}: no time or no bytes in {row}")
        if fitted(row):
            shapes.setdefault((row["kernel"], row["tokens"]), []).append((row["rows"], row["cols"]))
    for kernel in ("cublas", *kernels):
        if (kernel, 1) not in shapes:
            raise ValueError(f"{path} has no row of {kernel} at 1 token")
    for (kernel, tokens), timed in shapes.items():
        what = f"{path}: {kernel} at {tokens} tokens"
        if len(timed) < LEAST_ROWS or len(set(timed)) < LEAST_SHAPES:
            raise ValueError(
                f"{what}: {len(timed)} rows of {len(set(timed))} shapes, at least {LEAST_ROWS} of {LEAST_SHAPES}"
            )
        if ("cublas", tokens) not in shapes:
            raise ValueError(f"{what} without cublas beside it")


def fitted(row: Mapping[str, Any]) -> bool:
    """Tell whether costs follow from a row: beside nm, weights drawn for it only say what else could run on them."""
    return row["kernel"] == "nm" or not row.get("pattern")


def passed(test_log: Path) -> tuple[str, Findings]:
    """Return pytest's last line and the tests that failed; ValueError where the log is not that of all GPU tests."""
    try:
        lines = test_log.read_text(errors="replace").strip().splitlines()
    except OSError as error:
        raise ValueError(f"{test_log}: {error.strerror}") from None
    if not lines:
        raise ValueError(f"{test_log} is empty")
    last = lines[-1].strip("= ")
    counts = {word: int(count) for count, word in re.findall(r"\b(\d+) (failed|passed|skipped|error)", last)}
    if counts.get("passed", 0) < LEAST_PASSED or counts.get("skipped", 0) > MOST_SKIPPED or "error" in counts:
        raise ValueError(
            f"{test_log} ends with: {last}; at least {LEAST_PASSED} must have passed and at most {MOST_SKIPPED} been "
            "skipped, without errors"
        )
    failed = [match[1] for line in lines if (match := re.match(r"FAILED \S+::(\w+)", line))]
    if len(failed) != counts.get("failed", 0):
        raise ValueError(f"{test_log} ends with: {last}; it names {len(failed)} of the failed tests")
    return last, dict.fromkeys(failed, "failed")


def steps(path: Path, last_line: str, hashes: Mapping[str, str], *, tests_failed: bool) -> Findings:
    """Return what speaks against the run whose gpu_report.json is at ``path``.

    ValueError where its tests are not those that ``last_line`` ends, or its kernels not those of ``hashes``.
    """
    if not path.exists():
        return {
            "gpu_report": f"there is no {path}: nothing says which kernels were tested, nor what else was run"
        }
    report = read(path)
    noted = report.get("steps", {})
    tested = noted.get("test", {}).get("last_line", "").strip("= ")
    if tested != last_line:
        raise ValueError(f"{path} is of other tests: they end with {tested!r}, the log with {last_line!r}")
    built = report.get("source_hashes", {})
    others = [name for name in hashes if hashes[name] != built.get(name)]
    if others:
        raise ValueError(f"{path} is of other sources of {', '.join(others)} than the figures")
    found = {} if report.get("commit") else {"commit": "the run names no commit"}
    for name in STEPS:
        step = noted.get(name)
        if step is None:
            found[name] = "was not run"
        elif step["exit_code"] and not (name == "test" and tests_failed):
            found[name] = f"exit code {step['exit_code']}: {step['last_line']}"
    return found
