"""What stands on top of a report: what the run was, where it ran, and the best recipe for each model and sparsity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pysparse.suite.report.rows import Record, Row, natural, number

_SHOWN = {  # of an environment, by its key: what a reader asks first
    "cpu": "processor", "cores": "cores", "usable_cores": "usable cores", "memory_bytes": "memory",
    "torch_threads": "torch threads", "pysparse_isa": "kernels", "platform": "platform", "python": "Python",
    "pysparse_commit": "commit",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Overview:
    """The run in figures."""

    done: int
    failed: int
    counts: tuple[tuple[int, str], ...]  # such as (12, "models")
    first: str  # when the first cell started, "2026-11-27 10:15"; "" when no cell tells
    last: str
    seconds: float  # of all cells together
    busy: int  # cells that began on a busy machine: their speeds are worth less
    environments: tuple[tuple[int, tuple[tuple[str, str], ...]], ...]  # cells, and (name, value) pairs


@dataclass(frozen=True, slots=True)
class Best:
    """The winner at one pattern and sparsity, and who is not to be told from it."""

    row: Row
    close: tuple[str, ...]  # recipes whose range over the seeds overlaps the winner's
    rivals: int  # recipes that were compared, the winner included


@dataclass(frozen=True, slots=True)
class BestTable:
    """The winners of one task: a line for each model, a column for each pattern and sparsity."""

    task: str
    metric: str
    columns: tuple[tuple[str, float], ...]
    lines: tuple[tuple[str, tuple[Best | None, ...]], ...]


def overview(records: Sequence[Record]) -> Overview:
    """Return the run in figures."""
    done = [record for record in records if record["status"] == "done"]
    keys = {
        "task": "tasks",
        "model": "models",
        "recipe": "recipes",
        "sparsity": "sparsities",
        "seed": "seeds",
    }
    counts = [(len({record[key] for record in records}), word) for key, word in keys.items()]
    times = sorted(str(record["started"]) for record in records if record["started"])
    return Overview(
        len(done), len(records) - len(done),
        tuple((count, word if count != 1 else _singular(word)) for count, word in counts),
        _minute(times[0]) if times else "", _minute(times[-1]) if times else "",
        sum(number(record["seconds"]) or 0.0 for record in records),
        sum(bool((record["environment"] or {}).get("busy")) for record in records), environments(records),
    )  # fmt: skip


def best_table(rows: Iterable[Row], task: str) -> BestTable | None:
    """Return the winners of ``task``: the highest median of the quality kept; None when no row has one."""
    mine = [row for row in rows if row.task == task and row.kept is not None]
    if not mine:
        return None
    settings = sorted(
        {(row.pattern, row.sparsity) for row in mine},
        key=lambda s: (s[0] != "unstructured", natural(s[0]), s[1]),
    )
    lines = []
    for model in sorted({row.model for row in mine}, key=natural):
        of_model = [row for row in mine if row.model == model]
        lines.append(
            (model, tuple(_best([r for r in of_model if (r.pattern, r.sparsity) == s]) for s in settings))
        )
    metrics = dict.fromkeys(row.metric for row in mine)
    return BestTable(task, ", ".join(metrics), tuple(settings), tuple(lines))


def environments(records: Iterable[Record]) -> tuple[tuple[int, tuple[tuple[str, str], ...]], ...]:
    """Return the distinct environments, most cells first, by what is shown of them."""
    counted: dict[tuple[tuple[str, str], ...], int] = {}
    for record in records:
        shown = shown_of(record)
        counted[shown] = counted.get(shown, 0) + 1
    return tuple(
        (count, shown) for shown, count in sorted(counted.items(), key=lambda item: -item[1]) if shown
    )


def shown_of(record: Record) -> tuple[tuple[str, str], ...]:
    """Return what is shown of a record's environment: (name, value) pairs."""
    return tuple(_shown(record["environment"] or {}))


def show_setting(pattern: str, sparsity: float) -> str:
    """Name a pattern and a sparsity: "70%", "2:4", "filters 30%"; n:m at its own sparsity goes without."""
    percent = f"{100 * sparsity:.3g}%"
    if pattern == "unstructured":
        return percent
    kept, colon, of = pattern.partition(":")
    if (
        colon
        and kept.isdigit()
        and of.isdigit()
        and int(of)
        and abs(sparsity - 1 + int(kept) / int(of)) < 1e-9
    ):
        return pattern
    return f"{pattern} {percent}"


def _best(rows: list[Row]) -> Best | None:
    ranked = sorted(rows, key=lambda row: -row.kept.median if row.kept else 0.0)
    if not ranked or ranked[0].kept is None:
        return None
    first = ranked[0].kept
    close = tuple(row.recipe for row in ranked[1:] if row.kept and row.kept.overlaps(first))
    return Best(ranked[0], close, len(ranked))


def _shown(environment: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, name in _SHOWN.items():
        value = environment.get(key)
        if value is not None:
            yield name, f"{value / 2**30:.1f} GiB" if key == "memory_bytes" else str(value)
    packages = environment.get("packages")
    if isinstance(packages, Mapping):
        yield "packages", ", ".join(f"{name} {version}" for name, version in packages.items())


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _singular(word: str) -> str:
    return {"sparsities": "sparsity"}.get(word, word.removesuffix("s"))
