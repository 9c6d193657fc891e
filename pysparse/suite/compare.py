"""What changed between two runs, beside what their own noise explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from pysparse.measure.results import Result, format_number, make_table
from pysparse.suite.records import Record, read_records

_SAME = 1e-9  # relative: what is equal but for the last bits of a sum
Key = tuple[str, str, str, str, float]


@dataclass(frozen=True, slots=True)
class Band:
    """A figure with its noise: quality over seeds, a speed-up from p10 to p90 of its rounds."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Band:
        """Return smallest, median and largest."""
        return cls(min(values), median(values), max(values))

    def apart(self, other: Band) -> bool:
        """Tell whether the two do not overlap."""
        slack = _SAME * max(abs(self.middle), abs(other.middle))
        return self.low > other.high + slack or other.low > self.high + slack

    def __str__(self) -> str:
        text = format_number(self.middle)
        return (
            text
            if self.low == self.high
            else f"{text} ({format_number(self.low)}..{format_number(self.high)})"
        )


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one setting in both runs."""

    key: Key  # task, model, recipe, pattern, sparsity
    figure: str  # "perplexity", "decode speed-up", "file bytes", ...
    before: Band
    after: Band
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """Return "better" or "worse" where the bands do not touch, else "within noise"."""
        if not self.before.apart(self.after):
            return "same" if self.before == self.after else "within noise"
        return "better" if (self.after.middle > self.before.middle) == self.higher_is_better else "worse"


@dataclass(frozen=True, slots=True)
class Comparison(Result):
    """Two runs side by side."""

    names: tuple[str, str]
    changes: tuple[Change, ...]  # of all settings that both have
    only_first: tuple[Key, ...]
    only_second: tuple[Key, ...]
    failed: tuple[tuple[str, str], ...]  # (run, cell) that has no figures

    def table(self) -> Table:
        """Return a rich table of what is outside the noise."""
        return self.table_of([one for one in self.changes if one.verdict in ("better", "worse")])

    def table_of(self, changes: Sequence[Change]) -> Table:
        """Return a rich table of some changes."""
        rows = [
            (_setting(one.key), one.figure, str(one.before), str(one.after), one.verdict) for one in changes
        ]
        title = f"{self.names[0]} -> {self.names[1]}"
        return make_table(title, ["setting", "figure", "before", "after", ""], rows, self.summary())

    def summary(self) -> str:
        """Return one line: how many figures went which way, and what only one run has."""
        counts = {
            word: sum(one.verdict == word for one in self.changes)
            for word in ("better", "worse", "within noise", "same")
        }
        parts = [f"{count} {word}" for word, count in counts.items()]
        parts += [
            f"{len(keys)} settings only in {name}"
            for name, keys in zip(self.names, (self.only_first, self.only_second), strict=True) if keys
        ]  # fmt: skip
        parts += [f"failed in {run}: {cell}" for run, cell in self.failed]
        return (
            "; ".join(parts)
            + ". Noise: quality from least to most over seeds, speed-ups p10..p90 of the rounds"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict with the verdicts."""
        found = super(Comparison, self).to_dict()
        for change, entry in zip(self.changes, found["changes"], strict=True):
            entry["verdict"] = change.verdict
        return found


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Compare two runs, each a folder or its ``cells.jsonl``; ``first`` is the one before.

    Settings are matched by task, model, recipe name, pattern and sparsity; their seeds make the noise of the quality.
    Raises what :func:`pysparse.suite.records.read_records` does, and ValueError when they share no setting.
    """
    before, after = read_records(first), read_records(second)
    old, new = _by_setting(before), _by_setting(after)
    shared = [key for key in old if key in new]
    if not shared:
        raise ValueError(f"{first} and {second} have no finished setting in common")
    changes = [change for key in shared for change in _changes(key, old[key], new[key])]
    runs = ((str(first), before), (str(second), after))
    failed = [
        (run, f"{_setting(_key(record))} seed {record['seed']}")
        for run, records in runs
        for record in records
        if record["status"] != "done"
    ]
    gone, come = [key for key in old if key not in new], [key for key in new if key not in old]
    return Comparison((str(first), str(second)), tuple(changes), tuple(gone), tuple(come), tuple(failed))


def _key(record: Record) -> Key:
    return record["task"], record["model"], record["recipe"], record["pattern"], float(record["sparsity"])


def _setting(key: Key) -> str:
    task, model, recipe, pattern, sparsity = key
    return f"{task} {model} {recipe} {f'{sparsity:.0%}' if pattern == 'unstructured' else pattern}"


def _by_setting(records: Sequence[Record]) -> dict[Key, list[Record]]:
    found: dict[Key, list[Record]] = {}
    for record in records:
        if record["status"] == "done":
            found.setdefault(_key(record), []).append(record)
    return dict(sorted(found.items()))


def _changes(key: Key, old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    quality = old[0]["quality"]
    metric, higher = quality["metric"], quality["higher_is_better"]
    figures = [
        (metric, higher, *(Band.of([float(one["quality"]["value"]) for one in runs]) for runs in (old, new))),
        (
            "file bytes",
            False,
            *(Band.of([one["file_bytes"]["sparse"] for one in runs]) for runs in (old, new)),
        ),
    ]
    speeds = [_speeds(runs) for runs in (old, new)]
    figures += [
        (f"{name} speed-up", True, speeds[0][name], speeds[1][name])
        for name in speeds[0]
        if name in speeds[1]
    ]
    return [Change(key, name, before, after, better) for name, better, before, after in figures]


def _speeds(records: Sequence[Record]) -> Mapping[str, Band]:
    """Return the speed-up of each workload: the median of the seeds' ratios, from the least p10 to the largest p90."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        for speed in record["speed"]:
            by_name.setdefault(speed["name"], []).append(speed)
    return {
        name: Band(
            min(one["ratio_p10"] for one in group), median(one["ratio"] for one in group),
            max(one["ratio_p90"] for one in group),
        )
        for name, group in by_name.items()
    }  # fmt: skip
