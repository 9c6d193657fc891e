"""A run as one static HTML page, as plots, as Markdown tables, and as answers with their spreads.

``rows`` puts the cells that differ in the seed only together, ``summary`` picks the best, ``findings`` compares in
pairs; ``page`` writes the HTML (its style and script are in ``assets``), ``plots`` and ``markdown`` the rest.
"""

from pysparse.suite.report.findings import find, findings_markdown
from pysparse.suite.report.markdown import markdown_tables
from pysparse.suite.report.page import LIMIT_BYTES, page
from pysparse.suite.report.pairs import Finding
from pysparse.suite.report.plots import save_plots
from pysparse.suite.report.rows import Row, Statistic, rows_of
from pysparse.suite.report.summary import best_table, overview

__all__ = [
    "LIMIT_BYTES",
    "Finding",
    "Row",
    "Statistic",
    "best_table",
    "find",
    "findings_markdown",
    "markdown_tables",
    "overview",
    "page",
    "rows_of",
    "save_plots",
]
