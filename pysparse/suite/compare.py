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
_SAME_DENSE = 1e-3  # relative: as much as a dense model's quality moves from one CPU's kernels to another's
_VERDICTS = ("better", "worse", "not comparable", "within noise", "same")
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

    def apart(self, other: Band, same: float = _SAME) -> bool:
        """Tell whether the two do not overlap, nor are the ``same`` but for this relative difference."""
        slack = same * max(abs(self.middle), abs(other.middle))
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
    obstacle: str = ""  # why the two were not measured alike; "" where they were

    @property
    def verdict(self) -> str:
        """Return "better" or "worse" where the bands do not touch, or "within noise"; or "not comparable"."""
        if self.obstacle:
            return "not comparable"
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
    run_otherwise: tuple[Key, ...] = ()  # of the settings that both have: other cells with the same seed

    def table(self) -> Table:
        """Return a rich table of what is outside the noise, or cannot be compared."""
        return self.table_of([one for one in self.changes if one.verdict in _VERDICTS[:3]])

    def table_of(self, changes: Sequence[Change]) -> Table:
        """Return a rich table of some changes."""
        rows = [
            (_setting(one.key), one.figure, str(one.before), str(one.after),
             f"{one.verdict}: {one.obstacle}" if one.obstacle else one.verdict)
            for one in changes
        ]  # fmt: skip
        title = f"{self.names[0]} -> {self.names[1]}"
        return make_table(title, ["setting", "figure", "before", "after", ""], rows, self.summary())

    def summary(self) -> str:
        """Return one line: how many figures went which way, and what only one run has."""
        counts = {word: sum(one.verdict == word for one in self.changes) for word in _VERDICTS}
        parts = [f"{count} {word}" for word, count in counts.items() if count or word != "not comparable"]
        if self.run_otherwise:
            parts.append(
                f"{len(self.run_otherwise)} settings were run otherwise: the options of their task, the recipe of "
                "this name or the threads differ"
            )
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
    A figure gets the verdict "not comparable" where the dense model's quality differs too (other texts, another
    number of windows), or a speed-up's batch or tokens do.
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
    otherwise = [key for key in shared if _run_otherwise(old[key], new[key])]
    return Comparison(
        (str(first), str(second)), tuple(changes), tuple(gone), tuple(come), tuple(failed), tuple(otherwise)
    )


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


def _run_otherwise(old: Sequence[Record], new: Sequence[Record]) -> bool:
    """Tell whether cells of the same seed have other ids, which follow from all that a grid says of a cell."""
    before, after = ({record["seed"]: record["id"] for record in runs} for runs in (old, new))
    return any(before[seed] != after[seed] for seed in before.keys() & after.keys())


def _changes(key: Key, old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    metric, higher = old[0]["quality"]["metric"], old[0]["quality"]["higher_is_better"]
    obstacle = _other_protocol(old, new)
    sizes = [Band.of([one["file_bytes"]["sparse"] for one in runs]) for runs in (old, new)]
    found = [
        Change(key, metric, _quality(old, "value"), _quality(new, "value"), higher, obstacle),
        Change(key, "file bytes", sizes[0], sizes[1], higher_is_better=False),
    ]
    before, after = _speeds(old), _speeds(new)
    for name in before:
        if name in after:
            loads = [_loads(runs, name) for runs in (old, new)]
            obstacle = (
                "" if loads[0] == loads[1] else f"{_load_text(loads[0])} before, {_load_text(loads[1])} after"
            )
            found.append(Change(key, f"{name} speed-up", before[name], after[name], True, obstacle))
    return found


def _quality(records: Sequence[Record], name: str) -> Band:
    return Band.of([float(record["quality"][name]) for record in records])


def _other_protocol(old: Sequence[Record], new: Sequence[Record]) -> str:
    """Return how the dense model tells that the two runs measured other things; "" where it does not."""
    metrics = [runs[0]["quality"]["metric"] for runs in (old, new)]
    if metrics[0] != metrics[1]:
        return f"the second run's figure is {metrics[1]}"
    before, after = _quality(old, "dense"), _quality(new, "dense")
    return f"dense is {before} before, {after} after" if before.apart(after, _SAME_DENSE) else ""


def _loads(records: Sequence[Record], name: str) -> set[tuple[int | None, int | None]]:
    """Return (batch, tokens) of the workload ``name``."""
    return {
        (speed["batch"], speed["tokens"])
        for record in records for speed in record["speed"] if speed["name"] == name
    }  # fmt: skip


def _load_text(loads: set[tuple[int | None, int | None]]) -> str:
    return " and ".join(sorted(f"batch {batch}, tokens {tokens}" for batch, tokens in loads))


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
