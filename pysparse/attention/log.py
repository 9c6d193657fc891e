"""What attention did: calls, densities, recall, milliseconds, and why exact attention was taken where it was."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from pysparse.measure.results import Result, make_table

SPARSE, DENSE, TORCH = "sparse", "dense", "torch"  # our planned, our exact, torch's own attention


@dataclass(slots=True)
class Tally:
    """Sums over the calls of one layer that went one way for one reason."""

    calls: int = 0
    rows: int = 0
    density_sum: float = 0.0  # times rows: a long call counts for more
    select_seconds: float = 0.0
    compute_seconds: float = 0.0
    recall_sum: float = 0.0
    recall_rows: int = 0  # that were sampled
    recall_min: float = math.inf

    @property
    def density(self) -> float:
        """Mean share of causal pairs that was computed."""
        return self.density_sum / self.rows if self.rows else 0.0

    @property
    def recall(self) -> float | None:
        """Mean share of the attention mass of sampled rows that was computed; None without samples."""
        return self.recall_sum / self.recall_rows if self.recall_rows else None

    def add(self, other: Tally) -> None:
        """Add the sums of ``other``."""
        self.calls += other.calls
        self.rows += other.rows
        self.density_sum += other.density_sum
        self.select_seconds += other.select_seconds
        self.compute_seconds += other.compute_seconds
        self.recall_sum += other.recall_sum
        self.recall_rows += other.recall_rows
        self.recall_min = min(self.recall_min, other.recall_min)


@dataclass(slots=True)
class AttentionLog(Result):
    """Counts attention calls by (layer, way, reason). Its size grows with the layers, not with the calls."""

    tallies: dict[tuple[int, str, str], Tally] = field(default_factory=dict)

    def record(self, layer: int, way: str, reason: str, tally: Tally) -> bool:
        """Add one call; ``layer`` is -1 where it is not known. Tells whether this reason is new to the log."""
        key = (layer, way, reason)
        known = self.tallies.get(key)
        new = known is None and not any(one[2] == reason for one in self.tallies)
        if known is None:
            known = self.tallies[key] = Tally()
        known.add(tally)
        return new

    def total(self, way: str) -> Tally:
        """Return the sums over all layers for ``way``: "sparse", "dense" or "torch"."""
        total = Tally()
        for (_, its, _), tally in self.tallies.items():
            if its == way:
                total.add(tally)
        return total

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that were not sparse, by reason."""
        counts: dict[str, int] = {}
        for (_, way, reason), tally in self.tallies.items():
            if way != SPARSE and reason:
                counts[reason] = counts.get(reason, 0) + tally.calls
        return counts

    def table(self) -> Table:
        """Return a rich table, a line for each layer, way and reason."""
        columns = (
            "layer",
            "way",
            "calls",
            "rows",
            "density",
            "recall",
            "least",
            "select ms",
            "compute ms",
            "why",
        )
        title = "attention: share of pairs computed, share of mass they hold (sampled rows)"
        return make_table(title, columns, [_cells(row) for row in self.rows()])

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict for each layer, way and reason, in that order."""
        return [
            {
                "layer": layer, "way": way, "reason": reason, "calls": tally.calls, "rows": tally.rows,
                "density": tally.density, "recall": tally.recall,
                "recall_min": tally.recall_min if tally.recall_rows else None,
                "select_ms": 1e3 * tally.select_seconds, "compute_ms": 1e3 * tally.compute_seconds,
            }
            for (layer, way, reason), tally in sorted(self.tallies.items())
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {"calls": self.rows(), "fallbacks": self.fallbacks}

    def __str__(self) -> str:
        console = Console(width=130, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    layer = "" if row["layer"] < 0 else str(row["layer"])
    return (
        layer, row["way"], str(row["calls"]), str(row["rows"]), f"{row['density']:.1%}", share(row["recall"]),
        share(row["recall_min"]), f"{row['select_ms']:.1f}", f"{row['compute_ms']:.1f}", row["reason"],
    )  # fmt: skip


TOTAL = AttentionLog()  # of the process: every call is counted here, whatever log a caller opens beside it
