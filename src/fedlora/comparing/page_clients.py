"""Sections of a comparison's page about clients: who gains and who loses, and their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedlora.comparing.comparison_text import OWN_SHARE, ROW_INTERVALS, client_head
from fedlora.comparing.row_gains import LOSS, OWN_ROWS, read_gains
from fedlora.comparing.silo_text import silo_remarks
from fedlora.methods.table import BASELINES
from fedlora.plain_text import NOTHING, counted
from fedlora.reporting.own_rows import ClientGains
from fedlora.reporting.page.blocks import Block, Cell, Commands, Items, Section, Table
from fedlora.reporting.page.client_sections import counts_table, gains_table
from fedlora.reporting.page.colours import shade_of, side_of
from fedlora.reporting.page.looks import Looks
from fedlora.reporting.page.words import text_table

_GAIN = (
    "How much lower a client's held-out loss on its own kind of rows is than under its own training alone: above zero, "
    "in blue, it gains from joining."
)


def gains_section(result: Mapping[str, Any], looks: Looks) -> Section | None:
    """Every client's loss under every method against its own alone; None where no client alone was measured."""
    blocks = _row_gains(result, looks)
    if not result["clients"] and not blocks:
        return None
    for table in result["clients"]:
        of = f", {table['setting']}" if table["setting"] else ""
        if table["same_clients"]:
            blocks.append(_gain_matrix(table, of))
        rows = [
            (name, f"{sum(one['clients_that_gain']) / len(one['clients_that_gain']):.1f} of {one['clients']}")
            for name, one in table["methods"].items()
        ]
        blocks.append(text_table(f"Clients that gain, mean over seeds{of}", (("method", "clients"), rows)))
        federated = [name for name in table["methods"] if name not in ("base", *BASELINES)]
        if table["same_clients"] and federated:
            blocks.append(_category_matrix(table, federated[0], of))
    return Section("gains", "Who gains and who loses", [_GAIN], blocks)


def _row_gains(result: Mapping[str, Any], looks: Looks) -> list[Block]:
    """Losses and gains on each client's own test rows, with intervals, setting by setting."""
    blocks: list[Block] = []
    names = {row["label"]: looks.class_of(row["label"]) for row in result["rows"]}
    for one in result.get(OWN_ROWS, []):
        gains = read_gains(one["clients"])
        tables = [counts_table([LOSS], gains, names), gains_table(LOSS, gains, names), _loss_table(gains)]
        of = f", {one['setting']}" if one["setting"] else ""
        blocks += [replace(table, caption=table.caption + of) for table in tables]
    return [*blocks, Items([ROW_INTERVALS])] if blocks else []


def _loss_table(clients: Sequence[ClientGains]) -> Table:
    labels = list(dict.fromkeys(label for one in clients for label in one.scores[LOSS]))
    rows = []
    for one in clients:
        cells = [Cell(one.client)]
        for label in labels:
            found = one.scores[LOSS].get(label)
            if found is None:
                cells.append(Cell(NOTHING))
                continue
            below = "[{:.3f}, {:.3f}]".format(*found.interval)
            cells.append(Cell(f"{found.mean:.3f}", found.mean, below=below))
        rows.append(cells)
    return Table("Test loss of every model on each client's own test rows", ["client", *labels], rows, is_sortable=True)


def _gain_matrix(table: Mapping[str, Any], of: str) -> Table:
    """Clients down, methods across: the loss alone less that under the method, above zero a gain."""
    methods = table["methods"]
    # the base is far off and would take all of the scale
    others = [gain for name, one in methods.items() if name != "base" for gain in one["gain"].values()]
    most = max(map(abs, others), default=0.0)
    rows = []
    for client in methods["base"]["own"]:
        cells = [Cell(client_head(table, client))]
        for one in methods.values():
            if client not in one["own"]:
                cells.append(Cell(NOTHING))
                continue
            gain = one["gain"][client]
            note = f"loss {one['own'][client]:.3f}"
            cells.append(Cell(f"{gain:+.3f}", gain, shade=side_of(gain, most), note=note))
        rows.append(cells)
    caption = f"Loss alone less loss under the method, nats per response token{of}"
    return Table(caption, ["client", *methods], rows, is_matrix=True)


def _category_matrix(table: Mapping[str, Any], method: str, of: str) -> Table:
    cells = table["methods"][method]["less_than_alone"]
    categories = sorted({category for line in cells.values() for category in line})
    most = max((abs(value) for line in cells.values() for value in line.values()), default=0.0)
    rows = []
    for client, line in cells.items():
        row = [Cell(client_head(table, client))]
        for category in categories:
            value = line.get(category)
            if value is None:
                row.append(Cell(NOTHING))
                continue
            is_own = table["shares"][client].get(category, 0.0) >= OWN_SHARE
            note = f"at least {OWN_SHARE:.0%} of the client's rows" if is_own else ""
            row.append(Cell(f"{value:+.3f}", value, shade=side_of(-value, most), is_strong=is_own, note=note))
        rows.append(row)
    caption = (
        f"Client by {'test rows' if table.get('names') else 'category'}: loss under {method} less that of the client "
        f"alone, below zero joining helps; a frame marks at least {OWN_SHARE:.0%} of the client's rows{of}"
    )
    return Table(caption, ["client", *categories], rows, is_matrix=True)


def data_section(result: Mapping[str, Any]) -> Section:
    """The clients' rows where they are a folder, else how `allocate` divided the categories."""
    blocks: list[Block] = []
    experiment = result["experiment"]
    if silos := result.get("silos"):
        rows = [(name, *map(str, counts)) for name, counts in silos["rows"].items()]
        heads = ("client", "training rows", "validation", "test")
        blocks.append(text_table("Rows of the clients under the first seed", (heads, rows), is_sortable=True))
        if remarks := silo_remarks(silos):
            blocks.append(Items(remarks))
    for table in result["clients"]:
        if "silos" not in result:
            blocks.append(_mix_matrix(table))
    data = experiment["data"]
    folder = data if isinstance(data, str) else data.get("input_file", "the skills data")
    if isinstance(data, str):
        about = "Duplicates within and across the files, and with the test rows:"
        blocks.append(Commands(about, [f"fedlora plan --data {data} --probe false"]))
    elif data:
        text = ", ".join(f"{name} {value}" for name, value in sorted(data.items()))
        blocks.append(Items([f"divided by allocate with {text}"]))
    seeds = counted(len(experiment["seeds"]), "seed")
    return Section("data", "Data", [f"Rows of {folder}; every one of {seeds} draws its own split."], blocks)


def _mix_matrix(table: Mapping[str, Any]) -> Table:
    categories = sorted({name for mix in table["shares"].values() for name in mix})
    rows = [
        [
            Cell(table.get("names", {}).get(client, f"client {client}")),
            *(Cell(f"{(share := mix.get(one, 0.0)):.2f}", share, shade=shade_of(share)) for one in categories),
        ]
        for client, mix in table["shares"].items()
    ]
    of = f", {table['setting']}" if table["setting"] else ""
    return Table(
        f"Share of each client's rows by category, first seed{of}", ["client", *categories], rows, is_matrix=True
    )
