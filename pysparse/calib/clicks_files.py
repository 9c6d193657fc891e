"""Click logs in TSV (Criteo) and Parquet (Avazu) files, read in pieces twice: values are counted, then numbered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pysparse.calib.clicks import Clicks, check_labels
from pysparse.calib.extras import optional

_CRITEO_NUMERIC, _CRITEO_CATEGORICAL = 13, 26
_MAX_VALUES = 1 << 24  # distinct values of a field that are counted; beyond, memory would not be bounded
Columns = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class ClickLog:
    """Where a log is and what its columns are. ``rare``: values seen less often share one row of their field."""

    path: Path
    label: str
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    rare: int = 10
    tsv_columns: tuple[str, ...] | None = None  # names of a TSV without a header; None: Parquet
    batch_rows: int = 1 << 16

    def __post_init__(self) -> None:
        if self.rare < 1 or self.batch_rows < 1:
            raise ValueError(f"rare and batch_rows are at least 1, got {self.rare} and {self.batch_rows}")
        if not self.fields:
            raise ValueError("a log has at least one numeric or categorical column")

    @property
    def fields(self) -> tuple[str, ...]:
        """All columns that become fields, in order."""
        return (*self.numeric, *self.categorical)


def criteo(path: str | Path, rare: int = 10) -> ClickLog:
    """Return a log in Criteo's layout: TSV without header, the label, 13 numbers, 26 hashes."""
    numeric = tuple(f"I{i + 1}" for i in range(_CRITEO_NUMERIC))
    categorical = tuple(f"C{i + 1}" for i in range(_CRITEO_CATEGORICAL))
    names = ("label", *numeric, *categorical)
    return ClickLog(Path(path), "label", numeric, categorical, rare, names)


def parquet(path: str | Path, label: str = "click", numeric: tuple[str, ...] = (), rare: int = 2) -> ClickLog:
    """Return a log in a Parquet file (as Avazu's are kept): ``label``, ``numeric``, and all other columns but "id"."""
    schema = optional("pyarrow.parquet", "ctr").read_schema(path)
    missing = [name for name in (label, *numeric) if name not in schema.names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(schema.names)}")
    others = tuple(name for name in schema.names if name not in (label, "id", *numeric))
    return ClickLog(Path(path), label, numeric, others, rare)


def number_bin(text: str) -> str:
    """Return the bin of a number: floor(ln(v)^2) above 2 (Criteo's winners 2014), the number itself otherwise."""
    if text == "":
        return ""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return f"b{math.floor(math.log(value) ** 2)}" if value > 2.0 else f"{value:g}"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The row of each value of each field within the field; unknown and rare values take the last one."""

    rows: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def field_sizes(self) -> tuple[int, ...]:
        """Rows of each field, the one of rare values included."""
        return tuple(len(values) + 1 for values in self.rows.values())


def count_values(log: ClickLog) -> Vocabulary:
    """Read the log once and number the values that occur at least ``rare`` times, most frequent first.

    Memory: the distinct values. Raises ValueError for a line that is cut, a label that is not 0 or 1, an empty file.
    """
    counters: dict[str, Counter[str]] = {name: Counter() for name in log.fields}
    seen = 0
    for labels, columns in _pieces(log):
        check_labels(labels, seen)
        seen += len(labels)
        for name, counter in counters.items():
            counter.update(columns[name])
            if len(counter) > _MAX_VALUES:
                raise ValueError(f"column {name!r} has more than {_MAX_VALUES} distinct values")
    if seen == 0:
        raise ValueError(f"{log.path} holds no samples")
    rows = {}
    for name, counter in counters.items():
        kept = sorted((-count, value) for value, count in counter.items() if count >= log.rare)
        rows[name] = {value: row for row, (_, value) in enumerate(kept)}
    return Vocabulary(rows)


def read_clicks(log: ClickLog, vocabulary: Vocabulary) -> Iterator[Clicks]:
    """Yield the log's samples, ``batch_rows`` at a time; only one piece is in memory."""
    sizes = vocabulary.field_sizes
    starts = np.cumsum([0, *sizes])
    seen = 0
    for labels, columns in _pieces(log):
        check_labels(labels, seen)
        seen += len(labels)
        ids = np.empty((len(labels), len(sizes)), np.int32)
        for place, name in enumerate(log.fields):
            rows, last = vocabulary.rows[name], sizes[place] - 1
            ids[:, place] = [starts[place] + rows.get(value, last) for value in columns[name]]
        yield Clicks(ids, labels.astype(np.float32), sizes, log.fields)


def _pieces(log: ClickLog) -> Iterator[tuple[Any, Columns]]:
    pieces = _parquet_pieces(log) if log.tsv_columns is None else _tsv_pieces(log, log.tsv_columns)
    seen = 0
    for columns in pieces:
        for name in log.numeric:
            columns[name] = _bins(columns[name], name, seen)
        labels = columns[log.label]
        try:
            numbers = np.array([float(text) for text in labels])
        except ValueError:
            wrong = next(i for i, text in enumerate(labels) if text not in ("0", "1"))
            raise ValueError(f"labels are 0 or 1, sample {seen + wrong} has {labels[wrong]!r}") from None
        yield numbers, columns
        seen += len(labels)


def _bins(texts: list[str], name: str, seen: int) -> list[str]:
    result = []
    for place, text in enumerate(texts):
        try:
            result.append(number_bin(text))
        except ValueError:
            raise ValueError(f"sample {seen + place} has {text!r} in numeric column {name!r}") from None
    return result


def _tsv_pieces(log: ClickLog, names: tuple[str, ...]) -> Iterator[Columns]:
    line = 0
    with log.path.open(encoding="utf-8") as file:
        while piece := list(islice(file, log.batch_rows)):
            cells = []
            for text in piece:
                line += 1
                cells.append(text.rstrip("\r\n").split("\t"))
                if len(cells[-1]) != len(names):
                    raise ValueError(
                        f"{log.path} line {line} has {len(cells[-1])} columns instead of {len(names)}"
                    )
            yield {name: list(column) for name, column in zip(names, zip(*cells, strict=True), strict=True)}


def _parquet_pieces(log: ClickLog) -> Iterator[Columns]:
    module = optional("pyarrow.parquet", "ctr")
    with module.ParquetFile(log.path) as file:
        for batch in file.iter_batches(log.batch_rows, columns=[log.label, *log.fields]):
            yield {
                name: ["" if value is None else str(value) for value in column]
                for name, column in batch.to_pydict().items()
            }
