"""Finished cells on disk: one JSON file each, written beside and renamed; tables are made from them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pysparse.formats.tensor_file import DISK_FULL
from pysparse.measure.results import to_jsonable, write_text
from pysparse.suite.cells import SCHEMA, Cell

Record = dict[str, Any]
KEYS = (
    "schema", "id", "status", "error", "task", "model", "family", "recipe", "method", "allocation", "reconstruction",
    "settings", "pattern", "sparsity", "seed", "quality", "achieved_sparsity", "layers", "prune_seconds",
    "peak_memory_bytes", "parameters", "file_bytes", "speed", "command", "environment", "started", "seconds",
)  # fmt: skip
MEASURED = ("prune_seconds", "peak_memory_bytes", "speed", "environment", "started", "seconds", "command")


class DiskFullError(RuntimeError):
    """No room for a result; what was finished before is intact."""


def record_of(cell: Cell, **found: Any) -> Record:
    """Return the record of ``cell`` with what was ``found``; the other keys are None."""
    unknown = sorted(set(found) - set(KEYS))
    if unknown:
        raise ValueError(f"a record has no key {', '.join(unknown)}")
    spec = cell.spec
    known: Record = {
        "schema": SCHEMA, "id": cell.id, "task": cell.task, "model": cell.model, "recipe": cell.recipe,
        "method": spec.method, "allocation": spec.allocation, "reconstruction": spec.reconstruction,
        "settings": spec.settings, "pattern": cell.pattern, "sparsity": cell.sparsity, "seed": cell.seed,
    }  # fmt: skip
    merged = known | found
    return {key: to_jsonable(merged.get(key)) for key in KEYS}


class Results:
    """A folder of finished cells: ``cells/<id>.json``, and the tables made from them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.cells = self.folder / "cells"

    def write(self, record: Record) -> Path:
        """Write one record so that a reader, or a resumed run, sees all of it or nothing.

        Raises DiskFullError when there is no room; the cells written before are untouched.
        """
        path = self.cells / f"{record['id']}.json"
        with explaining_full_disk(path):
            return write_text(path, _dumps(record, indent=1) + "\n")

    def read(self, status: str | None = None) -> list[Record]:
        """Return the records (of one ``status``), by id; ValueError names a file that is none."""
        records = [_load(path) for path in sorted(self.cells.glob("*.json"))]
        return [record for record in records if status in (None, record["status"])]

    def write_tables(self) -> list[Path]:
        """Write ``cells.jsonl``, and ``cells.parquet`` where pyarrow is installed, from all records."""
        records = self.read()
        lines = "".join(_dumps(record) + "\n" for record in records)
        with explaining_full_disk(self.folder):
            written = [write_text(self.folder / "cells.jsonl", lines)]
            parquet = _write_parquet(self.folder / "cells.parquet", records)
        return written + ([parquet] if parquet else [])


def read_records(source: str | Path) -> list[Record]:
    """Return the records of a run: its folder, or its ``cells.jsonl``, which may be packed by gzip (``.gz``).

    Raises FileNotFoundError when there are none, ValueError for what is no record.
    """
    path = Path(source)
    if path.is_file():
        content = path.read_bytes()
        try:
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} holds no records: {error}") from None
        lines = text.splitlines()
        if not lines:
            raise ValueError(f"{path} holds no finished cell: it is empty")
        return [_checked(line, f"{path}:{n}") for n, line in enumerate(lines, start=1)]
    found = Results(path).read()
    if not found and (path / "cells.jsonl").is_file():
        return read_records(path / "cells.jsonl")
    if not found:
        raise FileNotFoundError(f"{source} holds no finished cell: no cells/*.json and no cells.jsonl in it")
    return found


def comparable(record: Mapping[str, Any]) -> Record:
    """Return what must be the same whenever a cell is run with the same threads: no times, no memory, no machine."""
    return {key: value for key, value in record.items() if key not in MEASURED}


@contextmanager
def explaining_full_disk(path: Path) -> Iterator[None]:
    """Turn a write that found no room into DiskFullError, which says what is left and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DiskFullError(
            f"no room left to write {path} ({error.strerror}): the cells finished before are intact; free some space "
            "and go on with --resume"
        ) from error


def _dumps(record: Record, indent: int | None = None) -> str:
    return json.dumps(record, indent=indent, allow_nan=False)


def _load(path: Path) -> Record:
    return _checked(path.read_text(encoding="utf-8"), str(path))


def _checked(text: str, where: str) -> Record:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no record of a cell: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        schema = record.get("schema") if isinstance(record, dict) else None
        raise ValueError(f"{where} is no record of a cell: its schema is {schema!r}, expected {SCHEMA}")
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"{where} is no record of a cell: it lacks {', '.join(missing)}")
    return record


def _write_parquet(path: Path, records: list[Record]) -> Path | None:
    """Write all records with nested columns as they are, environment and settings as JSON text."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    table = pyarrow.Table.from_pylist([_row(record) for record in records], schema=_schema(pyarrow))
    part = path.with_suffix(".part")
    try:
        pyarrow.parquet.write_table(table, part, compression="zstd")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _schema(pa: Any) -> Any:
    text, number, count, flag = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    speed = {"name": text, "unit": text, "batch": count, "tokens": count, "dense": number, "sparse": number,
             "ratio": number, "ratio_p10": number, "ratio_p90": number}  # fmt: skip
    nested = {
        "error": pa.struct({"type": text, "message": text}),
        "quality": pa.struct({"metric": text, "value": number, "dense": number, "higher_is_better": flag,
                              "others": pa.map_(text, number)}),
        "layers": pa.list_(pa.struct({"name": text, "shape": pa.list_(count), "sparsity": number})),
        "file_bytes": pa.struct({"dense": count, "sparse": count}),
        "speed": pa.list_(pa.struct(speed)),
    }  # fmt: skip
    counts = ("schema", "seed", "peak_memory_bytes", "parameters")
    numbers = ("sparsity", "achieved_sparsity", "prune_seconds", "seconds")
    plain = {key: count for key in counts} | {key: number for key in numbers} | nested
    return pa.schema({key: plain.get(key, text) for key in KEYS})


def _row(record: Record) -> Record:
    """Return a record with "inf" and "nan", which JSON knows as text only, as the numbers they are."""
    quality = record["quality"]
    if quality is not None:
        others = [(name, float(value)) for name, value in quality["others"].items()]
        quality = quality | {
            "value": float(quality["value"]),
            "dense": float(quality["dense"]),
            "others": others,
        }
    speed = record["speed"] and [
        {key: float(value) if key.startswith("ratio") else value for key, value in one.items()}
        for one in record["speed"]
    ]
    texts = {key: json.dumps(record[key]) for key in ("environment", "settings")}
    return record | {"quality": quality, "speed": speed, **texts}
