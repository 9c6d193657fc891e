"""PTSBench's questions (Huang et al. 2024) answered from a run: which allocation, which reconstruction, which
architecture is the most sparsifiable.

Everything is compared in pairs: two cells that differ in one thing only, with the same model, sparsity, pattern and
seed. The unit is a point: a hundredth of the dense model's quality (:func:`pysparse.suite.report.rows.quality_kept`).
"""

from __future__ import annotations

from collections.abc import Iterable

from pysparse.suite.report import architectures
from pysparse.suite.report.choices import CHOICES, answer
from pysparse.suite.report.markdown import escape, markdown_table
from pysparse.suite.report.pairs import FEWEST, Finding
from pysparse.suite.report.rows import Record, rows_of
from pysparse.suite.report.settings import settings_of
from pysparse.suite.report.summary import overview

HOW_TO_READ = (
    "Every figure comes from pairs of cells that differ in one thing only and share model, pattern, sparsity, seed and "
    "the rest of the recipe. A point is a hundredth of the dense model's quality: value over dense where higher is "
    "better, dense over value where lower is (a perplexity twice the dense one keeps 50%). p10 .. p90 is the spread of "
    f"the pairs, over models, sparsities and seeds; where it covers zero no difference is claimed, nor from fewer than "
    f"{FEWEST} pairs. Pairs of one model are not independent of each other, so there are no p-values."
)


def find(records: Iterable[Record]) -> list[Finding]:
    """Return the answers that these records hold; one that they do not hold says so."""
    done = [record for record in records if record["status"] == "done"]
    differing = {settings_of(record) for record in done}
    asked = [choice for choice in CHOICES if choice.name != "settings" or len(differing) > 1]
    found = [answer(choice, done) for choice in asked]
    found.append(architectures.models(done, rows_of(done)))
    family = architectures.families(done)
    return found + ([family] if family else [])


def _environments(found: Iterable[tuple[int, Iterable[tuple[str, str]]]]) -> str:
    """Name the machine once; what differed between cells with all its values."""
    values: dict[str, dict[str, None]] = {}
    for _, shown in found:
        for name, value in shown:
            values.setdefault(name, {})[value] = None
    return "; ".join(f"{name} {' or '.join(several)}" for name, several in values.items()) + "."


def findings_markdown(records: Iterable[Record], title: str) -> str:
    """Return the answers as a short Markdown page."""
    records = list(records)
    run = overview(records)
    counts = ", ".join(f"{count} {word}" for count, word in run.counts)
    parts = [
        f"# Findings: {escape(title)}",
        f"{run.done} finished cells ({run.failed} failed): {counts}.",
        escape(_environments(run.environments)),
        HOW_TO_READ,
    ]
    for found in find(records):
        parts.append(f"## {found.question}")
        parts.append("\n".join(f"- {escape(sentence)}" for sentence in found.answer))
        if found.lines:
            parts.append(markdown_table(found.columns, found.lines))
        parts += [found.note] if found.note else []
    return "\n\n".join(parts) + "\n"
