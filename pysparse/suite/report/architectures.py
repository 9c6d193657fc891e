"""Which architecture is the most sparsifiable: models under the same recipe, pattern, sparsity and seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from pysparse.suite.report.choices import paired
from pysparse.suite.report.pairs import NO_DIFFERENCE, PAIRED_COLUMNS, TOO_FEW, Finding, Paired, listed, named
from pysparse.suite.report.rows import Record, Row, allocation_of, natural, protocol_of, quality_kept
from pysparse.suite.report.summary import show_setting

QUESTION = "Which architecture is the most sparsifiable?"
BARS = (0.99, 0.95, 0.90)  # of the dense quality
Contexts = dict[tuple[Any, ...], dict[str, float]]  # quality kept by model


def models(records: Iterable[Record], rows: Iterable[Row]) -> Finding:
    """Compare each model with the middle of all models of its task, context by context."""
    shared = _contexts(records)
    rows = list(rows)
    sentences: list[str] = []
    lines: list[tuple[str, ...]] = []
    for task in sorted({str(context[0]) for context in shared}):
        mine = {context: kept for context, kept in shared.items() if context[0] == task}
        found = [_against_middle(task, model, mine) for model in _names(mine)]
        found.sort(key=lambda one: -one.median)
        sentences.append(_sentence(task, found))
        lines += [(task, one.first, *_bars(rows, task, one.first), *one.cells()) for one in found]
    if not lines:
        return Finding(
            QUESTION, ("No task has two models under the same recipe and seed: this run does not tell.",)
        )
    bars = tuple(f"keeps {100 * bar:.0f}%" for bar in BARS)
    note = (
        "Figures are against the middle model of the same recipe, pattern, sparsity and seed. \"Keeps 99%\" is the "
        "highest sparsity of the grid at which the best recipe's median keeps that share of the dense quality."
    )  # fmt: skip
    return Finding(QUESTION, tuple(sentences), ("task", "model", *bars, *PAIRED_COLUMNS), tuple(lines), note)


def families(records: Iterable[Record]) -> Finding | None:
    """Compare the families of a task's models, the median model of each; None where no task has two."""
    records = list(records)
    family_of = {(record["task"], record["model"]): str(record["family"]) for record in records}
    found = []
    for task in sorted({str(record["task"]) for record in records}):
        known = sorted({family for (of, _), family in family_of.items() if of == task})
        mine = {context: kept for context, kept in _contexts(records).items() if context[0] == task}
        for index, first in enumerate(known):
            for second in known[index + 1 :]:
                one = _family_pair(task, (first, second), mine, family_of)
                found += [one] if one else []
    if not found:
        return None
    sentences = tuple(f"{one.task}: {one} against {one.second}: {one.verdict}." for one in found)
    lines = tuple((one.task, f"{one.first} against {one.second}", *one.cells()) for one in found)
    return Finding(
        "Which family of architectures?", sentences, ("task", "families", *PAIRED_COLUMNS), lines,
        "A family's figure is the median of its models under the same recipe, pattern, sparsity and seed.",
    )  # fmt: skip


def _contexts(records: Iterable[Record]) -> Contexts:
    """Return the quality kept by model where at least two models have the same recipe, pattern, sparsity and seed."""
    found: Contexts = {}
    for record in records:
        kept = quality_kept(record["quality"])
        context = (
            record["task"], record["quality"]["metric"], record["pattern"], record["sparsity"], record["seed"],
            record["recipe"], record["method"], allocation_of(record), record["reconstruction"],
            protocol_of(record),
        )  # fmt: skip
        if kept is not None:
            found.setdefault(context, {})[str(record["model"])] = kept
    return {context: kept for context, kept in found.items() if len(kept) > 1}


def _names(contexts: Contexts) -> list[str]:
    return sorted({model for kept in contexts.values() for model in kept}, key=natural)


def _against_middle(task: str, model: str, contexts: Contexts) -> Paired:
    differences: dict[tuple[str, float], list[float]] = {}
    for context, kept in contexts.items():
        if model in kept:
            setting = (str(context[2]), float(context[3]))
            differences.setdefault(setting, []).append(100 * (kept[model] - median(kept.values())))
    return paired(task, model, "the middle model", differences)


def _family_pair(
    task: str, pair: tuple[str, str], contexts: Contexts, family_of: Mapping[tuple[str, str], str]
) -> Paired | None:
    differences: dict[tuple[str, float], list[float]] = {}
    for context, kept in contexts.items():
        sides = [
            [value for model, value in kept.items() if family_of[task, model] == family] for family in pair
        ]
        if all(sides):
            setting = (str(context[2]), float(context[3]))
            differences.setdefault(setting, []).append(100 * (median(sides[0]) - median(sides[1])))
    return paired(task, *pair, differences) if differences else None


def _bars(rows: list[Row], task: str, model: str) -> tuple[str, ...]:
    """Return, for each bar, the highest sparsity (without a pattern) whose best recipe stays above it."""
    best: dict[float, float] = {}
    for row in rows:
        if (row.task, row.model, row.pattern) == (task, model, "unstructured") and row.kept:
            best[row.sparsity] = max(best.get(row.sparsity, 0.0), row.kept.median)
    reached = [[sparsity for sparsity, kept in best.items() if kept >= bar] for bar in BARS]
    return tuple(show_setting("unstructured", max(found)) if found else "-" for found in reached)


def _sentence(task: str, found: list[Paired]) -> str:
    """Name those on one side of the middle; the others are not to be told apart."""
    above = named([one for one in found if one.verdict == "better"])
    below = named([one for one in reversed(found) if one.verdict == "worse"])
    rest = [one.first for one in found if one.verdict in (NO_DIFFERENCE, TOO_FEW)]
    said = []
    if above:
        said.append(f"above the middle model: {above}")
    if below:
        said.append(f"below it: {below}" if above else f"below the middle model: {below}")
    if rest:
        said.append(f"{NO_DIFFERENCE} from the middle: {listed(rest)}")
    return f"{task}, {len(found)} models: {'; '.join(said)}."
