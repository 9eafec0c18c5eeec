"""Sections of a report about clients: what each model knows, who gains and who loses, and the clients' data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedlora.config.private_metrics import PRIVATE_METRICS
from fedlora.paths import is_number
from fedlora.plain_text import NOTHING, number_text
from fedlora.reporting.experiments import Experiment
from fedlora.reporting.findings import Findings
from fedlora.reporting.main_table import short_label
from fedlora.reporting.markdown import PRIVATE
from fedlora.reporting.own_rows import MEASURES, ClientGains, count_gains
from fedlora.reporting.page.answer_text import MEASURE_NAMES
from fedlora.reporting.page.blocks import Block, Cell, Commands, Section, Table
from fedlora.reporting.page.charts import scale_marks
from fedlora.reporting.page.colours import shade_of
from fedlora.reporting.page.looks import Looks
from fedlora.reporting.page.provenance import plan_command
from fedlora.reporting.summary import ModelRow

NO_CATEGORY = "(no category)"


def matrix_section(findings: Findings) -> Section | None:
    """Exact match of every model per category; a frame marks what a client trained on."""
    rows = [row for row in findings.rows if row.categories]
    if not rows:
        return None
    heads = ["model", *(category or NO_CATEGORY for category in findings.categories)]
    cells = [[Cell(short_label(row)), *(_matrix_cell(row, one) for one in findings.categories)] for row in rows]
    details = frozenset(place for place, row in enumerate(rows) if row.subject == "client")
    table = Table("Exact match per category of the test file", heads, cells, is_matrix=True, details=details)
    intro = ["The darker, the more answers are right. A frame marks what that client was trained on."]
    return Section("matrix", "What each model knows", intro, [table])


def _matrix_cell(row: ModelRow, category: str) -> Cell:
    share = row.categories.get(category)
    if share is None:
        return Cell(NOTHING)
    is_own = category in row.own_categories
    notes = ["trained on"] if is_own else []
    if interval := row.category_intervals.get(category):
        notes.append("95 % interval {:.2f} to {:.2f}".format(*interval))
    return Cell(number_text(share, 2), share, shade=shade_of(share), is_strong=is_own, note=", ".join(notes))


def gains_section(findings: Findings, looks: Looks) -> Section:
    """Every client's own test rows: the reference, and the gain of every joint model with its interval."""
    clients = findings.gains_of_clients
    title = "Who gains and who loses"
    if not clients:
        text = (
            "Each client's gain needs test rows of its own: answer and score a folder of silos as the test rows, for a "
            "joint run and for one in which every client trains alone."
        )
        commands = [
            "fedlora generate RUN --of base,global --test DATA",
            "fedlora generate ALONE --of all --test DATA",
            "fedlora score RUN --of base,global --test DATA",
            "fedlora score ALONE --of all --test DATA",
        ]
        return Section("gains", title, [text], [Commands("DATA is the folder of the clients' files:", commands)])
    intro = [
        "The gain of a joint model on a client's own test rows, over the adapter that the client trained alone where "
        "such a run is here, else over the base; of a loss how much lower it is. Bold: the 95 % interval excludes 0."
    ]
    return Section("gains", title, intro, _gains_tables(clients, MEASURES, findings, looks))


def private_section(findings: Findings, looks: Looks) -> Section | None:
    """The same from private metrics; None without any."""
    clients = findings.private_gains
    if not clients:
        return None
    tables = _gains_tables(clients, PRIVATE_METRICS, findings, looks)
    return Section("private", "Who gains and who loses, on private rows", [" ".join(PRIVATE.split())], tables)


def _gains_tables(
    clients: Sequence[ClientGains], among: Sequence[str], findings: Findings, looks: Looks
) -> list[Block]:
    kinds = ("", " (global)", " (personal)", ", its own")
    names = {title + kind: name for name, title in findings.titles.items() for kind in kinds}
    looks_of = {label: looks.class_of(name) for label, name in names.items()}
    measures = [measure for measure in among if any(one.gains[measure] for one in clients)]
    tables = [gains_table(measure, clients, looks_of) for measure in measures]
    return [counts_table(measures, clients, looks_of), *tables]


def counts_table(measures: Sequence[str], clients: Sequence[ClientGains], looks: Mapping[str, str]) -> Table:
    """Clients that gain and lose under every joint model, by intervals without 0."""
    counts = {measure: count_gains(measure, clients) for measure in measures}
    rows = []
    for label in dict.fromkeys(label for found in counts.values() for label in found):
        cells = [Cell(label, series=looks.get(label, ""))]
        for found in counts.values():
            gain, lose, total = found.get(label, (0, 0, 0))
            cells.append(Cell(f"{gain} gain, {lose} lose of {total}" if total else NOTHING))
        rows.append(cells)
    heads = ["model", *(MEASURE_NAMES.get(measure, measure) for measure in measures)]
    return Table("Clients whose gain or loss has an interval without 0", heads, rows)


def gains_table(measure: str, clients: Sequence[ClientGains], looks: Mapping[str, str]) -> Table:
    """The score of the reference, and the gain of every joint model with its interval, client by client."""
    joint = list(dict.fromkeys(label for one in clients for label in one.gains[measure]))
    gains = [one.gains[measure].get(label) for one in clients for label in joint]
    drawn = [
        None if gain is None else (gain.estimate.interval[0], gain.estimate.mean, gain.estimate.interval[1])
        for gain in gains
    ]
    series = [looks.get(label, "") for _ in clients for label in joint]
    marks = iter(scale_marks(drawn, series=series, has_zero=True))
    rows = []
    for one in clients:
        reference = one.scores[measure].get(one.reference)
        name = f"client {one.client}" if is_number(one.client) else one.client
        cells = [Cell(name), Cell(str(one.num_rows), one.num_rows)]
        cells.append(Cell(NOTHING) if reference is None else Cell(f"{reference.mean:.3f}", reference.mean))
        for label in joint:
            mark, gain = next(marks), one.gains[measure].get(label)
            if gain is None:
                cells.append(Cell(NOTHING))
                continue
            note = "95 % interval {:+.3f} to {:+.3f}".format(*gain.estimate.interval)
            mean = gain.estimate.mean
            cells.append(Cell(f"{mean:+.3f}", mean, mark, is_strong=gain.is_clear, note=note))
        rows.append(cells)
    heads = ["client", "rows", clients[0].reference, *(f"gain of {label}" for label in joint)]
    return Table(
        f"{MEASURE_NAMES.get(measure, measure)}: gain on each client's own test rows", heads, rows, is_sortable=True
    )


def data_section(experiments: Sequence[Experiment]) -> Section:
    """The clients' rows, how their categories are divided, and how duplicates are found."""
    blocks: list[Block] = []
    shown: list[list[str]] = []
    for one in experiments:
        hashes = [client["sha256"] for client in one.run["clients"]]
        if hashes not in shown:
            shown.append(hashes)
            blocks += _data_tables(one, "" if len(shown) == 1 else f" of {one.name}")
    intro = []
    if len(shown) == 1 and len(experiments) > 1:
        intro.append("All runs have the same clients' files.")
    blocks.append(
        Commands("Duplicates within and across the files, and with the test rows:", [plan_command(experiments[0])])
    )
    return Section("data", "Data", intro, blocks)


_COUNTS = {
    "num_examples": "training rows",
    "num_validation": "validation",
    "num_test": "test",
    "num_skipped": "left out",
    "num_empty": "empty",
    "num_shortened": "shortened",
    "num_prompt_tokens": "prompt tokens",
    "num_response_tokens": "response tokens",
}


def _data_tables(experiment: Experiment, of: str) -> list[Table]:
    clients = experiment.run["clients"]
    counts = {name: head for name, head in _COUNTS.items() if any(client.get(name) for client in clients)}
    categories = sorted({name for client in clients for name in client["categories"]})
    total = sum(sum(client["categories"].values()) for client in clients) or 1
    whole = {name: sum(client["categories"].get(name, 0) for client in clients) / total for name in categories}
    rows, mixes = [], []
    for client in clients:
        own = client["categories"]
        size = sum(own.values()) or 1
        skew = sum(abs(own.get(name, 0) / size - share) for name, share in whole.items()) / 2
        name = experiment.shown(client["client_id"])
        numbers = [Cell(NOTHING) if (n := client.get(one)) is None else Cell(f"{n:,}", n) for one in counts]
        rows.append([Cell(name), *numbers, Cell(f"{skew:.2f}", skew), Cell(client["sha256"][:12])])
        mixes.append([Cell(name), *(_mix_cell(own.get(one, 0), size) for one in categories)])
    heads = ["client", *counts.values(), "skew", "SHA-256"]
    caption = (
        f"Rows and tokens{of}. Skew: how far a client's categories lie from those of all clients, 0 for the same mix, "
        "towards 1 for rows that no other client has (total variation)"
    )
    tables = [Table(caption, heads, rows, is_sortable=True)]
    if len(categories) > 1:
        heads = ["client", *(name or NO_CATEGORY for name in categories)]
        tables.append(Table(f"Training rows by client and category{of}", heads, mixes, is_matrix=True))
    return tables


def _mix_cell(number: int, size: int) -> Cell:
    return Cell(f"{number:,}", number, shade=shade_of(number / size)) if number else Cell("0", 0, shade="q0")
