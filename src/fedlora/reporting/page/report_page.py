"""The page of a report: the findings that report.md words, as sections of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from fedlora.config.evaluate import ReportConfig
from fedlora.plain_text import NOTHING, counted, number_text, one_line, size_text
from fedlora.reporting import standard_tasks
from fedlora.reporting.detail_rows import answer_rows, difference_rows, drift_rows, judge_rows, run_rows
from fedlora.reporting.experiments import Experiment
from fedlora.reporting.findings import Findings
from fedlora.reporting.main_table import COLUMNS, main_cells, main_values, short_label
from fedlora.reporting.markdown import DEFINITIONS, DRIFT
from fedlora.reporting.page.answer_text import answer_sentences, counted_gains
from fedlora.reporting.page.blocks import Block, Cell, Commands, Items, Page, Section, Table, Terms, Texts
from fedlora.reporting.page.charts import draw_charts, line_chart, scale_marks
from fedlora.reporting.page.client_sections import data_section, gains_section, matrix_section, private_section
from fedlora.reporting.page.looks import BASE, Looks, personal
from fedlora.reporting.page.provenance import commands_of, forgetting_command, round_commands
from fedlora.reporting.page.words import read_terms, shorten, text_table, unmarked
from fedlora.reporting.summary import ModelRow

MOST_ITEMS = 200
"""Excluded and limited clients that a page lists."""
_LOSS_UNIT = "nats per response token"


def report_page(
    config: ReportConfig,
    experiments: Sequence[Experiment],
    findings: Findings,
    looks: Looks,
    texts: Texts | None,
) -> Page:
    """`looks` are those of the experiments; `texts` are the answers, where there are any."""
    sections = [
        _models(findings, looks),
        _rounds(config, experiments, findings, looks),
        matrix_section(findings),
        gains_section(findings, looks),
        private_section(findings, looks),
        _tasks(findings),
        _drift(findings, looks),
        _forgetting(experiments),
        _judge(findings),
        _privacy(experiments, findings, looks),
        _excluded(findings),
        data_section(experiments),
        _answers(texts),
        _provenance(config, experiments, findings),
        Section("columns", "What the columns mean", blocks=[Terms(read_terms(DEFINITIONS))]),
    ]
    methods = list(dict.fromkeys(findings.titles.values()))
    return Page(
        kind="fedlora report",
        title=_title(methods, next(iter(findings.runs.values()))["base_model"]),
        facts=_facts(findings),
        answer=answer_sentences(findings),
        figures=_figures(findings),
        warnings=findings.warnings,
        sections=[section for section in sections if section is not None],
        styles=list(looks.styles.values()),
    )


def _title(methods: Sequence[str], base: str) -> str:
    shown = methods[0] if len(methods) == 1 else f"{', '.join(methods[:-1])} and {methods[-1]}"
    return one_line(f"{shown if len(methods) <= 6 else counted(len(methods), 'run')} on {base.rpartition('/')[2]}")


def _facts(findings: Findings) -> list[str]:
    run = next(iter(findings.runs.values()))
    trained = [client for client in run["clients"] if client["num_examples"]]
    examples = sum(client["num_examples"] for client in trained)
    return [
        counted(len(trained), "client"),
        counted(examples, "training row"),
        f"after round {findings.round_number}",
        f"seed {run['config']['seed']}",
    ]


def _figures(findings: Findings) -> list[tuple[str, str]]:
    standing = findings.standing
    if standing is None:
        return []
    winner, label = standing.winner, short_label(standing.winner)
    if standing.is_scored:
        figures = [(number_text(winner.all), f"exact match of {label}, all categories")]
    else:
        figures = [(number_text(winner.held_out_loss), f"held-out loss of {label}, {_LOSS_UNIT}")]
    if standing.lead is not None and standing.next is not None:
        figures.append((f"{standing.lead.estimate.mean:+.3f}", f"over {short_label(standing.next)}, same test rows"))
    if found := counted_gains(findings, label):
        measure, (gain, _, total) = found
        figures.append((f"{gain} of {total}", f"clients gain by joining under {label}, {measure}"))
    if winner.costs is not None:
        figures.append((size_text(winner.costs.bytes_sent), f"sent by {label}, adapters up and down"))
    return figures


def _models(findings: Findings, looks: Looks) -> Section:
    """The main table, with the intervals drawn beside the scores."""
    drawn = [(row.all_interval[0], row.all, row.all_interval[1]) if row.all_interval and row.all is not None else None
             for row in findings.rows]  # fmt: skip
    series = [_series(row, looks) for row in findings.rows]
    marks = scale_marks(drawn, ends=(0.0, 1.0), series=series)
    rows = []
    for row, look, mark in zip(findings.rows, series, marks, strict=True):
        cells = {}
        for head, text, value in zip(COLUMNS, main_cells(row), main_values(row), strict=True):
            mean, _, interval = text.partition(" (") if value is not None else (text, "", "")
            cells[head] = Cell(mean, value, below=interval.rstrip(")"))
        cells["model"] = replace(cells["model"], series=look)
        ends = cells.pop("95 % of all").text
        cells["all"] = replace(cells["all"], mark=mark, below="" if ends == NOTHING else ends)
        rows.append(cells)
    heads = [head for head in rows[0] if any(cells[head].text != NOTHING for cells in rows)]
    rows = [[cells[head] for head in heads] for cells in rows]
    details = frozenset(place for place, row in enumerate(findings.rows) if row.subject == "client")
    caption = "Every model, its quality and its costs; small: 95 % intervals"
    table = Table(caption, heads, rows, is_sortable=True, details=details)
    blocks: list[Block] = [table]
    notes = [*findings.notes, *(gap.text for gap in findings.gaps if not gap.commands)]
    if notes:
        blocks.append(Items(notes))
    blocks += [Commands(shorten(gap.text), gap.commands) for gap in findings.gaps if gap.commands]
    return Section("models", "Models", blocks=blocks)


def _series(row: ModelRow, looks: Looks) -> str:
    return looks.class_of(BASE if row.subject == "base" else row.experiment)


def _rounds(
    config: ReportConfig, experiments: Sequence[Experiment], findings: Findings, looks: Looks
) -> Section | None:
    lines = {
        kind: [looks.series(name, findings.titles[name], curves[kind]) for name, curves in findings.curves.items()]
        for kind in ("held_out", "training")
    }
    lines["held_out"] += [
        looks.series(personal(name), personal(findings.titles[name]), curves["held_out_personal"])
        for name, curves in findings.curves.items()
        if "held_out_personal" in curves
    ]
    quality = [looks.series(name, findings.titles[name], points) for name, points in findings.quality.items() if points]
    blocks: list[Block] = [
        *draw_charts(
            [
                line_chart("Held-out loss", _LOSS_UNIT, lines["held_out"]),
                line_chart("Training loss", _LOSS_UNIT, lines["training"]),
                line_chart("Exact match", "share of test rows", quality),
            ]
        )
    ]
    if not blocks:
        return None
    if all(len(one.points) < 2 for one in quality) and (commands := round_commands(config, experiments)):
        blocks.append(Commands("Exact match per round: answer and score the earlier rounds too, such as", commands))
    return Section("rounds", "Round by round", blocks=blocks)


def _tasks(findings: Findings) -> Section | None:
    if not findings.tasks:
        return None
    rows = [one.cells() for one in findings.tasks]
    table = text_table("Every score of every model", (standard_tasks.HEADS, rows), is_sortable=True)
    return Section("tasks", "Standard tasks", unmarked(standard_tasks.ABOUT), [table])


def _drift(findings: Findings, looks: Looks) -> Section | None:
    if not findings.drift:
        return None
    kinds = {
        kind: [looks.series(name, findings.titles[name], curves[kind]) for name, curves in findings.drift.items()]
        for kind in ("aggregation_error", "drift_cosine_mean", "drift_norm_mean")
    }
    charts = draw_charts(
        [
            line_chart("Aggregation error", "relative", kinds["aggregation_error"], is_log=True, digits=4),
            line_chart("Cosine to the mean change", "mean over clients", kinds["drift_cosine_mean"]),
            line_chart("Norm of a client's change", "mean over clients", kinds["drift_norm_mean"]),
        ]
    )
    return Section(
        "drift",
        "Aggregation error and drift",
        unmarked(DRIFT),
        [*charts, text_table("First and last round", drift_rows(findings))],
    )


def _forgetting(experiments: Sequence[Experiment]) -> Section | None:
    """What a chain of clients forgets is measured hop by hop, which only `compare` does."""
    chains = [one for one in experiments if one.method.order == "chain"]
    if not chains:
        return None
    text = "A chain of clients may forget what the first of them taught it."
    command = Commands("Every client's loss after every hop is measured by", [forgetting_command(chains)])
    return Section("forgetting", f"What {chains[0].mode} forgets", [text], [command])


def _judge(findings: Findings) -> Section | None:
    if not findings.judgements:
        return None
    return Section(
        "judge", "Judge", blocks=[text_table("Pairs of answers that a judge compared", judge_rows(findings))]
    )


def _privacy(experiments: Sequence[Experiment], findings: Findings, looks: Looks) -> Section | None:
    spent = {
        one.name: [(row["round"], row["privacy"]) for row in one.round_rows if "privacy" in row] for one in experiments
    }
    spent = {name: rows for name, rows in spent.items() if rows}
    if not spent:
        return None
    lines = [
        looks.series(
            name,
            findings.titles[name],
            [(number, one["epsilon"]) for number, one in rows if one["epsilon"] is not None],
        )
        for name, rows in spent.items()
    ]
    table = [
        [
            Cell(findings.titles[name], series=looks.class_of(name)),
            Cell(number_text(last["epsilon"]), last["epsilon"]),
            Cell(f"{last['delta']:g}", last["delta"]),
            Cell(str(last["unit"])),
            Cell(str(last["accountant"])),
        ]
        for name, rows in spent.items()
        for last in (rows[-1][1],)
    ]
    heads = ("run", "epsilon", "delta", "what is hidden", "accountant")
    intro = ["Epsilon and delta of everything that was released up to the round; smaller hides more."]
    blocks = [*draw_charts([line_chart("Epsilon", "at the run's delta", lines)]), Table("Spent so far", heads, table)]
    return Section("privacy", "Privacy spent", intro, blocks)


def _excluded(findings: Findings) -> Section | None:
    if not findings.quarantined and not findings.limited:
        return None
    intro, items = [], []
    if findings.quarantined:
        intro.append("The update of an excluded client could not be used in that round.")
        items += [f"excluded: {text}" for text in findings.quarantined]
    if findings.limited:
        intro.append("A limited client counted for less than it sent, because of the run's limits.")
        items += [f"limited: {text}" for text in findings.limited]
    more = len(items) - MOST_ITEMS
    shown = list(islice(items, MOST_ITEMS)) + ([f"and {more:,} more, in report.json"] if more > 0 else [])
    return Section("excluded", "Excluded and limited clients", intro, [Items(shown)])


def _answers(texts: Texts | None) -> Section | None:
    if texts is None:
        return None
    return Section("answers", "Answers", texts.content["notes"], [texts])


def _provenance(config: ReportConfig, experiments: Sequence[Experiment], findings: Findings) -> Section:
    blocks: list[Block] = [text_table("Runs", run_rows(findings))]
    if findings.config_differences:
        blocks.append(text_table("Configuration fields that are not the same everywhere", difference_rows(findings)))
    if findings.answers:
        blocks.append(text_table("Answers, from the files beside the predictions", answer_rows(findings)))
    blocks.append(commands_of(config, experiments))
    return Section("provenance", "Where the numbers come from", blocks=blocks)
