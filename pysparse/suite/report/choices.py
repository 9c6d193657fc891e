"""Which allocation, reconstruction and method: cells that differ in that one thing, paired."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from pysparse.suite.report.pairs import (
    NO_DIFFERENCE,
    PAIRED_COLUMNS,
    TOO_FEW,
    Finding,
    Paired,
    named,
)
from pysparse.suite.report.rows import (
    Record,
    allocation_of,
    method_of,
    natural,
    protocol_of,
    quality_kept,
    reconstruction_of,
)
from pysparse.suite.report.settings import PLAIN, calibration_of, settings_of
from pysparse.suite.report.summary import show_setting


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing in which recipes differ."""

    name: str
    question: str
    usual: tuple[
        str, ...
    ]  # what the others are compared with: the first of these, else the most frequent one

    def level(self, record: Record) -> str:
        """Return what the record chose."""
        return str(record["recipe"]) if self.name == "recipe" else _parts(record)[self.name]

    def context(self, record: Record) -> tuple[Hashable, ...]:
        """Return everything else that could make a difference."""
        parts = {} if self.name == "recipe" else _parts(record)
        others = (value for name, value in parts.items() if name != self.name)
        return (
            record["task"],
            record["model"],
            record["pattern"],
            record["sparsity"],
            record["seed"],
            protocol_of(record),
            *others,
        )


CHOICES = (
    Choice("allocation", "Which allocation?", ("uniform",)),
    Choice("reconstruction", "Which reconstruction?", ("none",)),
    Choice("method", "Which method?", ("magnitude",)),
    Choice("settings", "Which other settings of a recipe?", (PLAIN,)),
    Choice("recipe", "Which recipe as a whole?", ("magnitude", "uniform", "wanda")),
)


def answer(choice: Choice, records: Iterable[Record]) -> Finding:
    """Compare every level of ``choice`` with the usual one, task by task."""
    records = list(records)
    contexts, ambiguous = _contexts(choice, records)
    tasks = sorted({str(context[0]) for context in contexts})
    sentences: list[str] = []
    lines: list[tuple[str, ...]] = []
    for task in tasks:
        found = _compared(choice, task, {key: kept for key, kept in contexts.items() if key[0] == task})
        if found:
            sentences.append(_sentence(task, found))
            lines += [(one.task, f"{one.first} against {one.second}", *one.cells()) for one in found]
    if not lines:
        sentences = [f"No two cells differ in the {choice.name} alone: this run does not tell."]
    columns = ("task", choice.name, *PAIRED_COLUMNS) if lines else ()
    note = _note(ambiguous, lines != [] and _other_data(choice, records))
    return Finding(choice.question, tuple(sentences), columns, tuple(lines), note)


def _parts(record: Record) -> dict[str, str]:
    return {
        "method": method_of(record),
        "allocation": allocation_of(record),
        "reconstruction": reconstruction_of(record),
        "settings": settings_of(record),
    }


Contexts = dict[tuple[Any, ...], dict[str, float]]


def _contexts(choice: Choice, records: Iterable[Record]) -> tuple[Contexts, int]:
    """Return the quality kept by context and level, and how many cells were left out.

    Left out are recipes of one context and level: they differ in something that is not compared here.
    """
    found: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for record in records:
        kept = quality_kept(record["quality"])
        if kept is not None:
            found.setdefault(choice.context(record), {}).setdefault(choice.level(record), []).append(kept)
    ambiguous = sum(len(kept) for levels in found.values() for kept in levels.values() if len(kept) > 1)
    single = {
        context: {level: kept[0] for level, kept in levels.items() if len(kept) == 1}
        for context, levels in found.items()
    }
    return {context: levels for context, levels in single.items() if len(levels) > 1}, ambiguous


def _compared(choice: Choice, task: str, contexts: Contexts) -> list[Paired]:
    counts: dict[str, int] = {}
    for levels in contexts.values():
        for level in levels:
            counts[level] = counts.get(level, 0) + 1
    if not counts:
        return []
    most = max(counts, key=lambda level: counts[level])
    usual = next((level for level in choice.usual if level in counts), most)
    found = []
    for level in sorted(counts, key=natural):
        differences: dict[tuple[str, float], list[float]] = {}
        for context, levels in contexts.items():
            if level != usual and {level, usual} <= levels.keys():
                setting = (str(context[2]), float(context[3]))
                differences.setdefault(setting, []).append(100 * (levels[level] - levels[usual]))
        if differences:
            found.append(paired(task, level, usual, differences))
    return sorted(found, key=lambda one: -one.median)


def paired(task: str, first: str, second: str, differences: dict[tuple[str, float], list[float]]) -> Paired:
    """Return the comparison of differences that lie by (pattern, sparsity)."""
    settings = sorted(differences, key=lambda s: (s[0] != "unstructured", natural(s[0]), s[1]))
    return Paired(
        task, first, second, tuple(value for setting in settings for value in differences[setting]),
        tuple((show_setting(*setting), median(differences[setting])) for setting in settings),
    )  # fmt: skip


def _sentence(task: str, found: list[Paired]) -> str:
    """Say who is better, who is worse and of whom neither can be said."""
    usual, found = found[0].second, _shortened(found)
    by_verdict = {verdict: [one for one in found if one.verdict == verdict] for verdict in
                  ("better", "worse", NO_DIFFERENCE, TOO_FEW)}  # fmt: skip
    said = [
        f"{verdict} than {usual}: {named(ones if verdict == 'better' else ones[::-1])}"
        for verdict, ones in by_verdict.items()
        if ones and verdict in ("better", "worse")
    ]
    said += [
        f"{verdict} against {usual}: {named(by_verdict[verdict])}"
        for verdict in (NO_DIFFERENCE, TOO_FEW)
        if by_verdict[verdict]
    ]
    return f"{task}: {'; '.join(said)}."


def _shortened(found: list[Paired]) -> list[Paired]:
    """Return the comparisons with names without settings, "op:steps=50" as "op", where those are not the same."""
    short = [re.sub(r":[^ ]*?(?=, |$)", "", one.first) for one in found]
    return [
        dataclasses.replace(one, first=name) if short.count(name) == 1 else one
        for one, name in zip(found, short, strict=True)
    ]


def _other_data(choice: Choice, records: Iterable[Record]) -> bool:
    """Tell whether cells that are compared were calibrated on different amounts of data."""
    amounts: dict[tuple[Hashable, ...], set[str]] = {}
    for record in records:
        if calibration_of(record):
            amounts.setdefault(choice.context(record), set()).add(calibration_of(record))
    return any(len(found) > 1 for found in amounts.values())


def _note(ambiguous: int, other_data: bool) -> str:
    notes = []
    if ambiguous:
        notes.append(
            f"{ambiguous} cells were left out: their recipes share method, allocation and reconstruction and differ in "
            "something else."
        )
    if other_data:
        notes.append(
            "Some of these recipes also differ in how much calibration data they take (see the grid)."
        )
    return " ".join(notes)
