"""The main table of a comparison in LaTeX: a `tabular` with booktabs rules, to be put into a paper as it is.

Names come from users and data, so every character that means something to TeX is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedlora.comparing.comparison_text import table_of
from fedlora.comparing.tables import MARK
from fedlora.plain_text import one_line

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def latex_table(result: Mapping[str, Any]) -> str:
    """Scores and costs; needs \\usepackage{booktabs}."""
    heads, rows = table_of(result)
    numbers = [index for index, head in enumerate(heads) if head not in ("setting", "method")]
    columns = "".join("r" if index in numbers else "l" for index in range(len(heads)))
    lines = [
        f"% comparison {one_line(result['name'])}: means over seeds, 95 % t intervals in brackets",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(map(escape_latex, heads)) + " \\\\",
    ]
    before = None
    for cells, row in zip(rows, result["rows"], strict=True):
        if row["setting"] != before:
            lines.append("\\midrule")
            before = row["setting"]
        lines.append(" & ".join(map(_number, cells)) + " \\\\")
    lines.append("\\bottomrule")
    if any(row["tuned_privately"] for row in result["rows"]):
        note = f"{MARK} of one run; what the private runs spent that chose the learning rate is not in it"
        lines.append(f"\\multicolumn{{{len(heads)}}}{{l}}{{\\footnotesize {note}}} \\\\")
    return "\n".join([*lines, "\\end{tabular}"]) + "\n"


def escape_latex(text: str) -> str:
    """`text` as one line that TeX prints as it is."""
    return "".join(_SPECIAL.get(character, character) for character in one_line(text))


def _number(text: str) -> str:
    """A cell; the sign of a negative number is a minus and no hyphen, and the interval stands smaller."""
    mean, bracket, interval = text.partition(" [")
    mean = f"${mean}$" if re.fullmatch(r"[-+][\d.,]+", mean) else escape_latex(mean)
    if not bracket:
        return mean
    return f"{mean} {{\\footnotesize ${'['}{interval}$}}"
