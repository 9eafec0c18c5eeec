"""The page of a comparison: what comparison.md words, as sections of a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.comparing.comparison_text import (
    CURVES,
    SWEEPS,
    comparison_intro,
    definitions,
    shown_metrics,
    table_of,
)
from fedlora.comparing.page_clients import data_section, gains_section
from fedlora.comparing.winners import METRIC, Winner, difference_text, find_winners, winner_sentences
from fedlora.plain_text import NOTHING, counted, one_line
from fedlora.reporting.page.blocks import Block, Cell, Commands, Items, Page, Section, Series, Table, Terms, Texts
from fedlora.reporting.page.charts import draw_charts, line_chart, scale_marks
from fedlora.reporting.page.looks import BASE, Looks
from fedlora.reporting.page.words import read_number, read_terms, text_table, unmarked
from fedlora.reporting.palette import client_style

Result = Mapping[str, Any]

MOST_CLIENTS = 12
"""Lines of clients in a chart."""


def looks_of(result: Result) -> Looks:
    """A look for every row of the result."""
    rows = [(row["label"], row["mode"]) for row in result["rows"] if row["mode"] != BASE]
    methods = [(row["method"], row["mode"]) for row in result["rows"] if row["mode"] != BASE]
    styles = dict(Looks.of_methods([*rows, *methods]).styles)
    styles |= {client_series(place): client_style(place) for place in range(MOST_CLIENTS)}
    return Looks(styles)


def client_series(place: int) -> str:
    """The series of the client at this place."""
    return f"client at place {place}"


def comparison_page(result: Result, looks: Looks, *, yaml: str, texts: Texts | None) -> Page:
    """`yaml` is the experiment as a file of `compare`, `texts` are the answers, where any were asked for."""
    winners = find_winners(result)
    clients = gains_section(result, looks)
    sections = [
        _methods(result, looks, winners),
        _curves(result["curves"], looks),
        *([clients] if clients else []),
        _errors(result, looks),
        _privacy(result, looks),
        _sweeps(result["sweeps"]),
        data_section(result),
        Section("answers", "Answers", texts.content["notes"], [texts]) if texts is not None else None,
        _provenance(result, yaml),
        Section("columns", "What the columns mean", blocks=[Terms(read_terms(definitions(result)))]),
    ]
    return Page(
        kind="fedlora comparison",
        title=one_line(result["name"]),
        facts=_facts(result),
        answer=winner_sentences(winners),
        figures=_figures(winners),
        warnings=[],
        sections=[section for section in sections if section is not None],
        styles=list(looks.styles.values()),
    )


def _facts(result: Result) -> list[str]:
    experiment = result["experiment"]
    unit = "steps" if experiment["budget_steps"] is not None else "tokens"
    methods = {row["method"] for row in result["rows"] if row["mode"] != BASE}
    return [
        counted(len(methods), "method"),
        *([counted(len(result["settings"]), "setting")] if any(result["settings"]) else []),
        counted(len(experiment["seeds"]), "seed"),
        f"{experiment[f'budget_{unit}']:,} {unit} a run",
        one_line(str(experiment["train"].get("base_model", "train's default base"))),
    ]


def _figures(winners: Sequence[Winner]) -> list[tuple[str, str]]:
    if len(winners) != 1:
        return []
    winner = winners[0]
    label = winner.row["label"]
    figures = [(f"{winner.row['metrics'][METRIC]['mean']:.3f}", f"held-out loss of {label}, local rows")]
    if winner.lead is not None and winner.next is not None:
        figures.append((f"{winner.lead['mean']:+.3f}", f"against {winner.next['label']}, paired by seed"))
    if winner.against_alone is not None:
        figures.append((f"{winner.against_alone['mean']:+.3f}", "against each client alone"))
    return figures


def _methods(result: Result, looks: Looks, winners: Sequence[Winner]) -> Section:
    heads, lines = table_of(result)
    names = shown_metrics(result)
    place = len(heads) - len(names)
    found = [row["metrics"].get(METRIC) for row in result["rows"]]
    series = [looks.class_of(row["label"]) for row in result["rows"]]
    # the base lies far off, and would take most of the scale
    drawn = [None if row["mode"] == BASE else _ends(one) for row, one in zip(result["rows"], found, strict=True)]
    marks = scale_marks(drawn, series=series)
    label = heads.index("method")
    rows = []
    for row, line, mark, look in zip(result["rows"], lines, marks, series, strict=True):
        measured = []
        for name, text in zip(names, line[place:], strict=True):
            value = row["metrics"][name]["mean"] if name in row["metrics"] else None
            mean, _, ends = text.partition(" [")
            below = f"[{ends}" if ends else ""
            measured.append(Cell(mean, value, mark if name == METRIC else None, below=below))
        before = [*map(Cell, line[:label]), *(Cell(text, read_number(text)) for text in line[label + 1 : place])]
        rows.append([Cell(line[label], series=look), *before[:label], *measured, *before[label:]])
    heads = ["method", *heads[:label], *heads[place:], *heads[label + 1 : place]]
    blocks: list[Block] = [Table("Every method, its quality and its costs", heads, rows, is_sortable=True)]
    if len(winners) > 1:
        blocks.insert(0, _winner_table(winners, looks))
    if result["remarks"]:
        blocks.append(Items(result["remarks"]))
    return Section("methods", "Methods", [unmarked(comparison_intro(result))[0]], blocks)


def _winner_table(winners: Sequence[Winner], looks: Looks) -> Table:
    heads = ("setting", "lowest own loss", "mean", "against the next", "next", "against clients alone")
    rows = [
        [
            Cell(one.setting),
            Cell(one.row["label"], series=looks.class_of(one.row["label"])),
            Cell(f"{one.row['metrics'][METRIC]['mean']:.3f}", one.row["metrics"][METRIC]["mean"]),
            Cell(difference_text(one.lead)),
            Cell(NOTHING if one.next is None else one.next["label"]),
            Cell(difference_text(one.against_alone)),
        ]
        for one in winners
    ]
    return Table("The winner of every setting", heads, rows)


def _ends(metric: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    """Low, mean and high; of one seed the mean alone."""
    if metric is None:
        return None
    mean = metric["mean"]
    return (mean, mean, mean) if metric["low"] is None else (metric["low"], mean, metric["high"])


def _curves(curves: Sequence[Mapping[str, Any]], looks: Looks) -> Section | None:
    if not curves:
        return None
    means, single = [], []
    for curve in curves:
        points = next(iter(curve["seeds"].values()))
        of = curve["method"] + (f", {curve['setting']}" if curve["setting"] else "")
        mean = [(one["steps"], sum(one["own"].values()) / len(one["own"])) for one in points]
        means.append(looks.series(curve["method"], of, mean))
        clients = list(points[0]["own"])[:MOST_CLIENTS]
        lines: list[Series] = [
            looks.series(client_series(place), curve.get("names", {}).get(client, f"client {client}"),
                         [(one["steps"], one["own"][client]) for one in points])
            for place, client in enumerate(clients)
        ]  # fmt: skip
        seed = next(iter(curve["seeds"]))
        single.append(line_chart(of, f"loss of each client, seed {seed}", lines, across="steps"))
    rows = [
        (c["setting"] or NOTHING, c["method"], f"{c['mean_forgotten']:.3f}", f"{c['swing']:.3f}", str(len(c["seeds"])))
        for c in curves
    ]
    blocks = [
        *draw_charts([line_chart("Mean over clients", "held-out loss, first seed", means, across="steps")]),
        *draw_charts(single),
        text_table("What is forgotten", (("setting", "method", "forgotten", "swing", "n"), rows)),
    ]
    return Section("forgetting", "What is forgotten on the way", unmarked(CURVES.replace("*", "")), blocks)


def _errors(result: Result, looks: Looks) -> Section | None:
    rows = [row for row in result["rows"] if "aggregation_error" in row["metrics"]]
    if not rows:
        return None
    found = [row["metrics"]["aggregation_error"] for row in rows]
    ends = [one for metric in found if (one := _ends(metric)) is not None]
    logs = [(math.log10(low), math.log10(mean), math.log10(high)) for low, mean, high in ends if low > 0]
    # an exact mean has no place on a logarithmic scale
    series = [looks.class_of(row["label"]) for row in rows]
    marks = scale_marks(logs, series=series) if len(logs) == len(rows) else [None] * len(rows)
    cells = [
        [
            Cell(row["label"], series=looks.class_of(row["label"])),
            Cell(row["setting"] or NOTHING),
            Cell(f"{one['mean']:.2e}", one["mean"], mark),
        ]
        for row, one, mark in zip(rows, found, marks, strict=True)
    ]
    intro = ["What the mean of the factors misses of the mean of the products, relative; mean over rounds and seeds."]
    table = Table("Aggregation error, marks on a logarithmic scale", ("method", "setting", "error"), cells)
    return Section("errors", "Aggregation error", intro, [table])


def _privacy(result: Result, looks: Looks) -> Section | None:
    rows = [row for row in result["rows"] if "epsilon" in row["metrics"]]
    if not rows:
        return None
    cells = [
        [
            Cell(row["label"], series=looks.class_of(row["label"])),
            Cell(row["setting"] or NOTHING),
            Cell(f"{row['metrics']['epsilon']['mean']:.3f}", row["metrics"]["epsilon"]["mean"]),
            Cell(f"{row['metrics'][METRIC]['mean']:.3f}", row["metrics"][METRIC]["mean"]),
            Cell("no" if row["tuned_privately"] else "yes"),
        ]
        for row in rows
    ]
    heads = ("method", "setting", "epsilon", "held-out loss, own", "includes the choice of the learning rate")
    table = Table("Epsilon of one run, mean over seeds; smaller hides more", heads, cells, is_sortable=True)
    return Section("privacy", "Privacy spent", (), [table])


def _sweeps(sweeps: Sequence[Mapping[str, Any]]) -> Section | None:
    if not sweeps:
        return None
    rates = sorted({entry["learning_rate"] for sweep in sweeps for entry in sweep["tried"]})
    rows = []
    for sweep in sweeps:
        tried = {entry["learning_rate"]: entry["loss"] for entry in sweep["tried"]}
        cells = [Cell(sweep["method"]), Cell(sweep["setting"] or NOTHING)]
        for rate in rates:
            loss = tried.get(rate)
            text = f"{loss:.3f}" if loss is not None else "failed" if rate in tried else NOTHING
            is_chosen = rate == sweep["chosen"]
            cells.append(Cell(text, loss, is_strong=is_chosen, note="chosen" if is_chosen else ""))
        rows.append(cells)
    table = Table(
        "Own loss on the validation rows, by learning rate", ["method", "setting", *(f"{r:g}" for r in rates)], rows
    )
    return Section("rates", "Learning rates", unmarked(SWEEPS), [table])


def _provenance(result: Result, yaml: str) -> Section:
    name = result["name"]
    flag = " --trust_remote_code true" if result["experiment"].get("trust_remote_code") else ""
    command = Commands("What makes all this again:", [f"fedlora compare {name}.yaml{flag}"])
    file = Commands(f"{name}.yaml:", [yaml.rstrip("\n")])
    return Section("provenance", "Where the numbers come from", blocks=[command, file])
