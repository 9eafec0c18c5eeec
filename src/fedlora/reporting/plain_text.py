"""A comparison as plain text: for a terminal, a log, or the end of a demonstration.

A number that was not measured is shown as `-`, and a line below says which command measures it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.console import printable
from fedlora.reporting.findings import Findings
from fedlora.reporting.summary import COSTS_ARE_TOTALS, ModelRow

COLUMNS = (
    "model",
    "own",
    "all",
    "95 % of all",
    "ROUGE-L",
    "held-out loss",
    "steps",
    "tokens",
    "bytes sent",
    "seconds",
)
NOTHING = "-"


def main_table_text(findings: Findings) -> str:
    """The main table as aligned plain text, with warnings, gaps and notes below."""
    table = table_text(COLUMNS, [main_cells(row) for row in findings.rows])
    remarks = remarks_text(findings)
    return "\n".join([table, remarks] if remarks else [table])


def table_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their names, the first to the left and the others to the right."""
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(_align(cell, width, index) for index, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    shown.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in shown)


def remarks_text(findings: Findings) -> str:
    """Warnings, gaps and notes, one a line."""
    gaps = [f"'{NOTHING}' {gap.text}; run {', then '.join(gap.commands)}" for gap in findings.gaps]
    lines = [*(f"warning: {text}" for text in findings.warnings), *gaps, *(f"note: {text}" for text in findings.notes)]
    return "\n".join(one_line(line) for line in lines)


def main_cells(row: ModelRow) -> tuple[str, ...]:
    """One row of the main table as text, in the order of COLUMNS."""
    interval = NOTHING if row.all_interval is None else "{:.3f}-{:.3f}".format(*row.all_interval)
    scores = [
        number_text(row.own),
        number_text(row.all),
        interval,
        number_text(row.rouge_l),
        number_text(row.held_out_loss),
    ]
    if row.costs is None:
        return (one_line(row.label), *scores, *[NOTHING] * 4)
    costs = row.costs
    amounts = (f"{costs.steps:,}", f"{costs.tokens:,}", size_text(costs.bytes_sent), f"{costs.seconds:,.1f}")
    return (one_line(row.label), *scores, *amounts)


def short_label(row: ModelRow) -> str:
    """The label where no costs stand beside it."""
    return row.label.removesuffix(COSTS_ARE_TOTALS)


def number_text(value: float | None, digits: int = 3) -> str:
    """A share or a loss; `-` when it was not measured."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def one_line(text: str) -> str:
    """`text` without line breaks, control characters escaped."""
    return " ".join(printable(text).split())


def size_text(num_bytes: float) -> str:
    """Bytes as `12 B`, `3.4 kB`, `5.6 MB` or `7.8 GB`, in thousands."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    for unit in ("kB", "MB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} GB"


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
