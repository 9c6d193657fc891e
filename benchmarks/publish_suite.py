"""Put finished runs of the suite among the results: records, page, tables for a README, findings.

    python benchmarks/publish_suite.py suite_full suite_vision --name suite

writes results/NAME_MACHINE_DATE.{jsonl.gz,html,md} and ..._findings.md, named by the machine and the day of the
records. The records are read again by `pysparse suite report` and `suite compare`.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from harness import RESULTS, machine_name

from pysparse.measure.results import write_text
from pysparse.suite.records import read_records
from pysparse.suite.report import findings_markdown, markdown_tables, page


def publish(runs: list[Path], name: str, folder: Path) -> list[Path]:
    """Write the four files of ``runs`` into ``folder``; of a cell that two runs have the later run's counts."""
    found = {record["id"]: record for run in runs for record in read_records(run)}
    records = list(found.values())
    day = max(str(record["started"]) for record in records)[:10]
    stem = f"{name}_{machine_name(records[-1]['environment'])}_{day}"
    title = f"{name}, {day}"
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    folder.mkdir(parents=True, exist_ok=True)
    packed = folder / f"{stem}.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.encode(), mtime=0))  # the same bytes for the same records
    texts = {
        f"{stem}.html": page(records, title),
        f"{stem}.md": f"# {title}\n\n{markdown_tables(records)}",
        f"{stem}_findings.md": findings_markdown(records, title),
    }
    return [packed, *(write_text(folder / file, text) for file, text in texts.items())]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="publish_suite.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="folder of a run")
    parser.add_argument("--name", default="suite", help="first part of the files' names")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the files")
    given = parser.parse_args(arguments)
    for path in publish(given.runs, given.name, given.output):
        print(path)


if __name__ == "__main__":
    main()
