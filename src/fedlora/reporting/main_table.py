"""The main table of a report as plain text: for a terminal, a log, or the end of a demonstration.

A number that was not measured is shown as `-`, and a line below says which command measures it.
"""

from __future__ import annotations

from fedlora.plain_text import NOTHING, number_text, one_line, size_text, table_text
from fedlora.reporting.findings import Findings
from fedlora.reporting.summary import COSTS_ARE_TOTALS, ModelRow

COLUMNS = (
    "model",
    "own",
    "all",
    "95 % of all",
    "ROUGE-L",
    "F1",
    "chrF",
    "test loss",
    "held-out loss",
    "steps",
    "tokens",
    "bytes sent",
    "seconds",
)


def main_table_parts(findings: Findings) -> tuple[str, str]:
    """The main table as aligned plain text; and warnings, gaps and notes, which may be nothing."""
    return table_text(COLUMNS, [main_cells(row) for row in findings.rows]), remarks_text(findings)


def remarks_text(findings: Findings) -> str:
    """Warnings, gaps and notes, one a line."""
    gaps = [f"'{NOTHING}' {gap.text}{gap.remedy()}" for gap in findings.gaps]
    lines = [*(f"warning: {text}" for text in findings.warnings), *gaps, *(f"note: {text}" for text in findings.notes)]
    return "\n".join(one_line(line) for line in lines)


def main_cells(row: ModelRow) -> tuple[str, ...]:
    """One row of the main table as text, in the order of COLUMNS."""
    interval = NOTHING if row.all_interval is None else "{:.3f}-{:.3f}".format(*row.all_interval)
    scores = [
        number_text(row.own),
        number_text(row.all),
        interval,
        *(_with_interval(row, name) for name in ("rouge_l", "f1", "chrf", "test_loss")),
        number_text(row.held_out_loss),
    ]
    if row.costs is None:
        return (one_line(row.label), *scores, *[NOTHING] * 4)
    costs = row.costs
    amounts = (f"{costs.steps:,}", f"{costs.tokens:,}", size_text(costs.bytes_sent), f"{costs.seconds:,.1f}")
    return (one_line(row.label), *scores, *amounts)


def main_values(row: ModelRow) -> tuple[float | None, ...]:
    """The numbers of `main_cells`; None for what is no number, or was not measured."""
    costs = row.costs
    amounts = (None,) * 4 if costs is None else (costs.steps, costs.tokens, costs.bytes_sent, costs.seconds)
    return (None, row.own, row.all, None, row.rouge_l, row.f1, row.chrf, row.test_loss, row.held_out_loss, *amounts)


def _with_interval(row: ModelRow, name: str) -> str:
    text = number_text(getattr(row, name))
    return text + (" ({:.3f}-{:.3f})".format(*row.intervals[name]) if name in row.intervals else "")


def short_label(row: ModelRow) -> str:
    """The label without costs beside it."""
    return row.label.removesuffix(COSTS_ARE_TOTALS)
