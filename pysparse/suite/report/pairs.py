"""Paired differences, what may be said of them, and the form of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pysparse.measure.rounds import percentile

FEWEST = 3  # pairs that a statement needs
_NAMED = 3  # comparisons that a sentence gives figures of
NO_DIFFERENCE = "no difference seen"
TOO_FEW = "too few pairs"


@dataclass(frozen=True, slots=True)
class Paired:
    """Differences "first minus second" of pairs that differ in this alone, in points (hundredths of dense quality)."""

    task: str
    first: str
    second: str
    differences: tuple[float, ...]
    by_setting: tuple[tuple[str, float], ...] = ()  # (pattern and sparsity, median difference)

    @property
    def median(self) -> float:
        """Middle difference."""
        return median(self.differences)

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile: what the verdict looks at."""
        return percentile(self.differences, 10), percentile(self.differences, 90)

    @property
    def wins(self) -> int:
        """Pairs in which the first is better."""
        return sum(difference > 0 for difference in self.differences)

    @property
    def losses(self) -> int:
        """Pairs in which the second is better."""
        return sum(difference < 0 for difference in self.differences)

    @property
    def verdict(self) -> str:
        """Say "better" or "worse" only when the spread lies on one side of zero."""
        low, high = self.spread
        if len(self.differences) < FEWEST:
            return TOO_FEW
        if low <= 0 <= high:
            return NO_DIFFERENCE
        return "better" if low > 0 else "worse"

    def cells(self) -> tuple[str, ...]:
        """Return the columns of a table: median, spread, range, signs, by setting, verdict."""
        low, high = self.spread
        return (
            points(self.median), f"{points(low)} .. {points(high)}",
            f"{points(min(self.differences))} .. {points(max(self.differences))}",
            f"{self.wins} of {len(self.differences)}" + (f", {self.losses} worse" if self.losses else ""),
            ", ".join(f"{setting} {points(value)}" for setting, value in self.by_setting), self.verdict,
        )  # fmt: skip

    def __str__(self) -> str:
        low, high = self.spread
        return (
            f"{self.first} {points(self.median)} ({points(low)} .. {points(high)}, better in {self.wins} of "
            f"{len(self.differences)})"
        )


PAIRED_COLUMNS = ("median", "p10 .. p90", "lowest .. highest", "better in", "median by sparsity", "verdict")


@dataclass(frozen=True, slots=True)
class Finding:
    """A question, its answer in sentences, and the figures under it."""

    question: str
    answer: tuple[str, ...]
    columns: tuple[str, ...] = ()
    lines: tuple[tuple[str, ...], ...] = ()
    note: str = ""


def named(found: Sequence[Paired]) -> str:
    """List comparisons with their figures, of many the first few; the table has them all."""
    rest = [one.first for one in found[_NAMED:]]
    more = [f"{len(rest)} more ({', '.join(rest)})"] if rest else []
    return listed([str(one) for one in found[:_NAMED]] + more)


def points(value: float) -> str:
    """Show a difference in points with its sign; "0" for none at all."""
    if value == 0:
        return "0"
    return f"{value:+.2f}" if abs(value) < 9.995 else f"{value:+.1f}"


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does: "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""
