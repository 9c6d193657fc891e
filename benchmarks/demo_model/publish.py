"""Put a trained model and its two shipped texts where the package finds them, with the licences.

python publish.py --corpus CORPUS --work WORK --site SITE [--started "2026-01-31 12:00 UTC"]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "pysparse" / "data"
MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
)
TEXT_BUDGET = 380_000  # bytes of one shipped jsonl file
LONGEST_DOCUMENT = 24_000  # bytes; a few giant files would otherwise be most of the text
LONGEST_LICENCE = 14_000  # characters; longer files append the licences of bundled binaries


def choose(path: Path) -> list[dict[str, str]]:
    """Documents of one split in the order of their file hash, within the byte budget."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    chosen, size = [], 0
    for row in sorted(rows, key=lambda row: row["sha256"]):
        source = f"{row['package']}:{row['source']}"
        entry = {"text": row["text"], "source": source, "licence": row["licence"]}
        cost = len(json.dumps(entry, ensure_ascii=True).encode()) + 1
        if len(row["text"].encode()) <= LONGEST_DOCUMENT and size + cost <= TEXT_BUDGET:
            chosen.append(entry)
            size += cost
    return chosen


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line, pure ASCII so that no exotic line separator can break a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows), encoding="utf-8")


def licence_text(site: Path, package: str) -> str:
    """The licence of the package's own source, from its metadata folder, without bundled binaries'."""
    if package.startswith("python-"):
        return (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_text(encoding="utf-8")
    name, version = package.rsplit("-", 1)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    candidates = sorted(
        (*info.glob("licenses/*"), *info.glob("licenses/*/*"), *info.glob("*")),
        key=lambda path: (len(path.parts), path.name),
    )
    named = [p for p in candidates if p.is_file() and re.match(r"(?i)(licen[sc]e|copying)", p.name)]
    if not named:
        return ""
    plain = [p for p in named if re.fullmatch(r"(?i)licen[sc]e(\.\w+)?", p.name)]
    text = (plain or named)[0].read_text(encoding="utf-8-sig", errors="replace")
    if len(text) > LONGEST_LICENCE:
        head, rest = text[:800], text[800:]  # no licence is shorter; the rule under a title is no separator
        text = head + re.split(r"\n[-=]{4,}\n|\n.*\b(?:bundle|third[- ]party)", rest, maxsplit=1)[0]
    return text.strip()


def write_licences(site: Path, rows: list[dict[str, str]]) -> list[str]:
    """Write the licence of each package whose prose is shipped, equal texts once; returns the packages."""
    packages = sorted({row["source"].split(":", 1)[0] for row in rows})
    declared = {row["source"].split(":", 1)[0]: row["licence"] for row in rows}
    groups: dict[str, tuple[str, list[str]]] = {}
    for package in packages:
        text = licence_text(site, package) or f"Declared in the package's metadata: {declared[package]}."
        apache = re.search(r"Apache License\s+Version 2\.0.*END OF TERMS AND CONDITIONS", text, re.DOTALL)
        key = " ".join(apache.group(0).split()) if apache else " ".join(text.split())
        groups.setdefault(key, (text, []))[1].append(f"{package} ({declared[package]})")
    blocks = ["\n".join(names) + "\n\n" + text + "\n" for text, names in groups.values()]
    head = (
        "The texts in calibration.jsonl and held_out.jsonl are documentation excerpts\n"
        "of the packages below, under their licences.\n"
    )
    notice = ("\n" + "=" * 100 + "\n").join([head, *blocks])
    (DATA / "THIRD_PARTY_LICENSES.txt").write_text(notice, encoding="utf-8")
    return packages


def replace(source: Path, target: Path) -> None:
    """Copy in one rename: whoever loads the model meanwhile sees the old file or the new one."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def file_hashes() -> dict[str, dict[str, Any]]:
    """Size and sha256 of each shipped file, by its path below pysparse/data."""
    names = [*(f"demo_model/{name}" for name in MODEL_FILES), "calibration.jsonl", "held_out.jsonl"]
    contents = {name: (DATA / name).read_bytes() for name in names}
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }


def main() -> None:
    """Copy, write, hash."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--started", default="", help="when and where the training ran, for the record")
    args = parser.parse_args()
    (DATA / "demo_model").mkdir(parents=True, exist_ok=True)
    texts = {split: choose(args.corpus / f"{split}.jsonl") for split in ("calibration", "held_out")}
    for split, rows in texts.items():
        write_jsonl(DATA / f"{split}.jsonl", rows)
    packages = write_licences(args.site, [*texts["calibration"], *texts["held_out"]])
    for name in MODEL_FILES:
        replace(args.work / "export" / name, DATA / "demo_model" / name)
    record_path = args.work / "manifest.json"
    if not record_path.exists():
        print("training is still running: model copied, manifests not written")
        return
    record = json.loads(record_path.read_text())
    record["started"] = args.started
    record["shipped_texts_from"] = packages
    (HERE / "manifest.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    training = "benchmarks/demo_model/manifest.json"
    short = {"licence": "Apache-2.0", "training": training, "files": file_hashes()}
    (DATA / "demo_model" / "manifest.json").write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
