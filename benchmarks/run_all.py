"""Every benchmark in turn, each in a process of its own; the figures go to benchmarks/results/."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "linear", "overhead", "fused", "decoding", "checkpoint", "encoder", "end_to_end", "prefill", "dispatch",
    "int8_nm", "limits",
    "int8_quality", "quality", "structured", "losa", "rivals", "pruning", "ebf", "attention",
    "attention_quality", "embedding", "shapley", "shaver", "suite",
    "pages", "llama_cpp",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="run_all.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check that all of them run")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    options = parser.parse_args(arguments)
    for name in options.only:
        command = [sys.executable, str(HERE / f"bench_{name}.py"), *(["--quick"] if options.quick else [])]
        subprocess.run(command, check=True)
    if not options.quick:
        subprocess.run([sys.executable, str(HERE / "report.py")], check=True)


if __name__ == "__main__":
    main()
