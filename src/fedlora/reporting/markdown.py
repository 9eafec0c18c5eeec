"""A comparison as a Markdown report.

Labels, categories and paths come from data and users: they are escaped, so that a name can neither
break a table nor put a link, an image or HTML into the report.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from fedlora.config.private_metrics import PRIVATE_METRICS
from fedlora.plain_text import NOTHING, number_text, one_line
from fedlora.reporting import standard_tasks
from fedlora.reporting.detail_rows import answer_rows, difference_rows, drift_rows, judge_rows, run_rows
from fedlora.reporting.findings import Findings
from fedlora.reporting.main_table import COLUMNS, main_cells, short_label
from fedlora.reporting.own_rows import MEASURES, ClientGains, count_gains
from fedlora.reporting.summary import ModelRow

DEFINITIONS = """\
- **own**: exact match on a client's test rows, where the test rows are those of a folder of silos; else on the
  categories a client was trained on, weighed by its training rows per category. In rows of a shared model (base, seq,
  homo, pooled) the mean of that over all clients.
- **all**: exact match, the plain mean over all categories of the test rows, or over the clients whose rows they are.
  The interval covers the choice of test rows (Wilson's intervals of the categories, combined) and says nothing about
  the luck of training.
- **ROUGE-L, F1, chrF**: F1 of rouge-score, no stemmer; of the words that both have; of character n-grams. Plain means
  over the categories, with 95 % intervals by bootstrap over prompts where `fedlora score` measured them.
- **test loss**: nats per response token of the test rows, as `fedlora loss` measured it.
- **held-out loss**: nats per response token, on rows that no client trained on.
- **steps, tokens, bytes sent, seconds**: sums over all rounds and the clients whose update was used; tokens count
  prompt and response; bytes are adapters up and down; seconds are training alone."""


DRIFT = """\
**Aggregation error** is the distance of a round's global adapter from the weighted mean of the clients' products,
relative to that mean; with robust methods and server optimizers it includes the deviation that they intend.
**Cosine** is that of a client's change to the mean change, **norm** the length of a client's change of the weights,
both means over clients. A single update is not averaged. An exact mean is not by itself a better model: see the
losses."""


PRIVATE = """\
From private metrics: every client's owner measured its own test rows, and gave means, standard errors and counts. The
gain over the base is paired row by row. The gain over the adapter that a client trained alone is of two runs and
cannot be paired, so its interval is wider. A gain in loss is how much lower it is. Bold: the interval of the gain
excludes 0."""


def markdown_report(findings: Findings, *, pictures: Collection[str]) -> str:
    """The whole report; `pictures` names which of rounds.png, clients.png and drift.png lie beside it."""
    parts = [f"# Federated LoRA: the models after round {findings.round_number}", _headline(findings)]
    parts += [f"> **Warning:** {escape(text)}" for text in findings.warnings]
    parts.append(markdown_table(COLUMNS, map(main_cells, findings.rows)))
    remarks = [f"- `{NOTHING}` {escape(gap.text)}{gap.remedy(_code)}" for gap in findings.gaps]
    remarks += [f"- {escape(text)}" for text in findings.notes]
    parts.append("\n".join(remarks))
    if "rounds.png" in pictures:
        parts.append("![Losses per round, and exact match of every model](rounds.png)")
    if findings.categories:
        parts += ["## What each model knows", "Exact match per category of the test file, with Wilson's 95 % interval."]
        parts += ["![Exact match of every model per category](clients.png)", _category_table(findings)]
    if findings.gains_of_clients:
        parts += ["## Who gains by joining", gains_counts(findings.gains_of_clients)]
        parts += gains_tables(findings.gains_of_clients, MEASURES)
    if findings.private_gains:
        parts += ["## Who gains by joining, on private rows", PRIVATE]
        parts += gains_tables(findings.private_gains, PRIVATE_METRICS)
    if findings.tasks:
        rows = (one.cells() for one in findings.tasks)
        parts += ["## Standard tasks", standard_tasks.ABOUT, markdown_table(standard_tasks.HEADS, rows)]
    if findings.drift:
        parts += ["## Aggregation error and drift", markdown_table(*drift_rows(findings)), DRIFT]
        parts += ["![Aggregation error and drift per round](drift.png)"] if "drift.png" in pictures else []
    if findings.judgements:
        parts += ["## Judge", markdown_table(*judge_rows(findings))]
    if findings.quarantined:
        parts += ["## Excluded clients", "Their update could not be used in that round:"]
        parts.append("\n".join(f"- {escape(text)}" for text in findings.quarantined))
    if findings.limited:
        parts += ["## Limited clients", "Counted for less than they sent, because of the run's limits:"]
        parts.append("\n".join(f"- {escape(text)}" for text in findings.limited))
    parts += ["## Where the numbers come from", markdown_table(*run_rows(findings))]
    if findings.config_differences:
        parts += ["Configuration fields that are not the same everywhere:", markdown_table(*difference_rows(findings))]
    if findings.answers:
        parts += ["Answers, from the files beside the predictions:", markdown_table(*answer_rows(findings))]
    parts += ["## What the columns mean", DEFINITIONS]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: Any) -> str:
    """`text` as one line of literal Markdown, also inside a table cell."""
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", html.escape(one_line(str(text)), quote=False))


def _headline(findings: Findings) -> str:
    known = [row for row in findings.rows if row.subject != "client" and row.all is not None]
    if not known:
        return ""
    return (
        "Exact match over all categories: "
        + ", ".join(f"{escape(short_label(row))} **{row.all:.2f}**" for row in known)
        + "."
    )


def _category_table(findings: Findings) -> str:
    rows = [row for row in findings.rows if row.categories]
    head = ["model", *(category or "(no category)" for category in findings.categories)]
    return (
        markdown_table(
            [escape(name) for name in head],
            (
                (
                    escape(short_label(row)),
                    *(_category_cell(row, category) for category in findings.categories),
                )
                for row in rows
            ),
            escaped=True,
        )
        + "\n\nBold: what that client was trained on."
    )


def _category_cell(row: ModelRow, category: str) -> str:
    text = number_text(row.categories.get(category), 2)
    if interval := row.category_intervals.get(category):
        text += " ({:.2f}-{:.2f})".format(*interval)
    return f"**{text}**" if category in row.own_categories else text


def gains_counts(clients: Sequence[ClientGains]) -> str:
    """What the table of gains shows, and how many clients gain and lose under each joint model."""
    counts = [
        f"- {escape(label)}, {measure}: {gain} of {total} gain, {lose} lose"
        for measure in MEASURES
        for label, (gain, lose, total) in count_gains(measure, clients).items()
    ]
    head = (
        "Every client's own test rows under each model, with 95 % intervals. The gain is that of a joint model over "
        "the reference: the adapter that the client trained alone where such a run is here, else the base. A gain in "
        "loss is how much lower it is. Bold: the interval of the gain excludes 0, and the client counts as gaining or "
        "losing."
    )
    return "\n".join([head, "", *counts])


def gains_tables(clients: Sequence[ClientGains], measures: Sequence[str]) -> list[str]:
    """A table for each measure: every client's own test rows under each model, and the gains."""
    return [_gains_table(name, clients) for name in measures if any(one.scores[name] for one in clients)]


def _gains_table(measure: str, clients: Sequence[ClientGains]) -> str:
    models = list(dict.fromkeys(label for one in clients for label in one.scores[measure]))
    joint = list(dict.fromkeys(label for one in clients for label in one.gains[measure]))
    head = ["client", "rows", *(f"{measure}: {label}" for label in models), *(f"gain of {label}" for label in joint)]
    rows = []
    for one in clients:
        scores, gains = one.scores[measure], one.gains[measure]
        cells = [
            "{:.3f} ({:.3f}-{:.3f})".format(scores[label].mean, *scores[label].interval) if label in scores else NOTHING
            for label in models
        ]
        for label in joint:
            text = NOTHING
            if label in gains:
                estimate = gains[label].estimate
                text = "{:+.3f} ({:+.3f} to {:+.3f})".format(estimate.mean, *estimate.interval)
                text = f"**{text}**" if gains[label].is_clear else text
            cells.append(text)
        rows.append([escape(one.client), str(one.num_rows), *cells])
    return markdown_table([escape(name) for name in head], rows, escaped=True)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, escaped: bool = False) -> str:
    """A Markdown table; numbers to the right. Cells are escaped unless they are `escaped` already."""
    cell = str if escaped else escape
    lines = [[cell(name) for name in head], *([cell(value) for value in row] for row in rows)]
    numeric = [all(_isnumber_text(value) for value in column[1:]) for column in zip(*lines, strict=True)]
    lines.insert(1, ["---:" if right else "---" for right in numeric])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _isnumber_text(text: str) -> bool:
    return re.fullmatch(r"[-\d.,%*() ]+(e-\d+)?( (B|kB|MB|GB))?", text) is not None


def _code(command: str) -> str:
    return f"`{one_line(command).replace('`', '')}`"
