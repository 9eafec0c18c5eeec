"""A plan as plain text: the clients, the run, what it takes, and the warnings last.

The record is what `--plan_file` holds; nothing is computed here. What needs the probe is shown as `-` without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora.console import duration, printable
from fedlora.data.client_names import name_of_file, shown_client
from fedlora.data.doctor import PLACES
from fedlora.plain_text import NOTHING, counted, one_line, size_text, table_text
from fedlora.planning.shown_rows import row_lines, template_text

COLUMNS = ("client", "file", "rows", "train", "empty", "cut", "masked tok", "trained tok", "rounds", "steps")
COUNTED = {"turns": "num_turns", "cut turns": "num_cut_turns", "control": "num_control"}
"""Further columns, each shown where it says something of a client."""

MOST_CLIENTS = 20
"""Clients and warnings beyond these numbers are counted, and listed in the plan file only."""

MOST_WARNINGS = 40
CATEGORIES = 3


def plan_parts(record: Mapping[str, Any], *, coloured: bool = False) -> list[str]:
    """The whole plan, in pieces that each begin a line; `coloured` is for a terminal."""
    clients = record["clients"]
    counts = {head: name for head, name in COUNTED.items() if any(_says_something(one, name) for one in clients)}
    cells = [_client_cells(client, list(counts.values())) for client in clients[:MOST_CLIENTS]]
    table = table_text((*COLUMNS, *counts, "categories"), cells)
    more = len(clients) - MOST_CLIENTS
    intro = one_line(
        f"plan of {record['exp_name']}: {record['mode']}, {counted(record['rounds'], 'round')} of "
        f"{record['base_model']} "
        f"({record['base_dtype']} on {record['device']})"
    )
    # an empty line stands between the pieces
    return [
        f"{intro}\n",
        table,
        *([f"... and {counted(more, 'client')} more, in --plan_file"] if more > 0 else []),
        "\n" + "\n".join(row_lines(clients[:MOST_CLIENTS], coloured=coloured)),
        "\n" + "\n".join(printable(line) for line in _run_lines(record)),
        "\n" + "\n".join(_warning_lines(record["warnings"])),
    ]


def _says_something(client: Mapping[str, Any], name: str) -> bool:
    """Whether a client's count is not what it is for every instruction row."""
    usual = 2 * client["num_examples"] if name == "num_turns" else 0
    return client[name] > usual


def _client_cells(client: Mapping[str, Any], counts: Sequence[str]) -> tuple[str, ...]:
    return (
        one_line(name_of_file(client["file"])),
        one_line(client["file"]),
        f"{client['num_rows']:,}",
        f"{client['num_examples']:,}",
        f"{client['num_empty']:,}",
        f"{client['num_shortened']:,}",
        f"{client['num_prompt_tokens']:,}",
        f"{client['num_response_tokens']:,}",
        str(client["num_rounds"]),
        f"{client['num_steps']:,}",
        *(f"{client[name]:,}" for name in counts),
        _category_text(client["categories"]),
    )


def _category_text(categories: Mapping[str, int]) -> str:
    """The largest categories with their shares."""
    total = sum(categories.values())
    largest = sorted(categories.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{one_line(name) or '(none)'} {count / total:.0%}" for name, count in largest[:CATEGORIES]]
    return ", ".join([*shown, f"{len(largest) - CATEGORIES} more"] if len(largest) > CATEGORIES else shown) or NOTHING


def _run_lines(record: Mapping[str, Any]) -> Iterator[str]:
    run, adapter, memory, layout = (record[name] for name in ("run", "adapter", "memory", "layout"))
    yield f"template     {template_text(record['template'])}"
    if record["label_skew"] is not None:
        yield f"label skew   {record['label_skew']:.2f} (0: every client has the pool's mix)"
    if record["test"] is not None:
        yield f"test rows    {counted(record['test']['num_rows'], 'row')} ({record['test']['file']})"
    amounts = [f"{run[name]:,}" for name in ("num_steps", "num_tokens", "num_updates")]
    yield "steps        {} optimizer steps, {} tokens, {} updates".format(*amounts)
    yield (
        f"adapter      {adapter['num_parameters']:,} parameters; .bin {size_text(adapter['bin_bytes'])}, "
        f".safetensors {size_text(adapter['safetensors_bytes'])}"
    )
    yield (
        f"a round      at most {counted(run['most_updates'], 'update')}, {size_text(run['bytes_down'])} down and "
        f"{size_text(run['bytes_up'])} up"
    )
    yield f"disk         {size_text(run['disk_bytes'])} for all rounds, {size_text(record['disk_free_bytes'])} free"
    program = f"program {size_text(memory['program'])}, " if memory["program"] else ""
    background = f"additions to the base {size_text(memory['background'])}, " if memory["background"] else ""
    yield (
        f"memory       about {size_text(memory['total'])} at the peak: {program}base {size_text(memory['base'])}, "
        f"{background}"
        f"adapter and optimizer {size_text(memory['optimizer'])}, a pass {size_text(memory['one_pass'])}; "
        f"{size_text(memory['available'])} can be had"
    )
    checkpoints = ", layers computed twice" if layout["gradient_checkpointing"] else ""
    yield f"layout       {layout['tokens_per_pass']:,} tokens in a pass{checkpoints}"
    yield f"time         {_time_text(record)}"
    if record["privacy"] is not None:
        yield f"privacy      {_privacy_text(record['privacy'])}"
    if record["judge"] is not None:
        yield f"judge        {_judge_text(record['judge'])}"


def _time_text(record: Mapping[str, Any]) -> str:
    probe = record["probe"]
    if probe is None:
        return f"{NOTHING} (the probe trains two steps to tell)"
    name = shown_client(probe["client_id"], {client["client_id"]: client["file"] for client in record["clients"]})
    return (
        f"about {duration(record['seconds'])} for the run, as two steps of {one_line(name)} went: "
        f"{probe['num_tokens'] / probe['seconds']:,.0f} tokens a second"
    )


def _privacy_text(privacy: Mapping[str, Any]) -> str:
    most, unit = privacy["max_epsilon"], privacy["unit"]
    if privacy["epsilon"] is None:
        return f"no {unit}-level guarantee: the noise is too small"
    text = f"{unit}-level epsilon {privacy['epsilon']:.4g} at delta {privacy['delta']:g} after all rounds"
    if most is not None and privacy["epsilon"] > most:
        return f"{text}: above max_epsilon={most:g}, the run ends before it gets there (exit code 8)"
    return text


def _judge_text(judge: Mapping[str, Any]) -> str:
    answers, models = counted(judge["num_samples"], "answer"), judge["model"].replace(",", ", ")
    shown = f"they show a win rate that is {judge['smallest_difference']:.3f} or more from 0.5"
    if not judge["num_calls"]:
        return f"{models} compares {answers} in both orders on this machine; {shown}"
    text = (
        f"{counted(judge['num_calls'], 'call')} to {models} for each comparison of {answers} in "
        f"both orders, about {judge['tokens_in']:,} tokens in and {judge['tokens_out']:,} out; {shown}"
    )
    if judge["cost"] is None:
        return f"{text}; for the cost give --judge_price_in and --judge_price_out"
    return f"{text}: {judge['cost']:,.2f} in the currency of the prices; repairs and retries come on top"


def _warning_lines(warnings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was found and where; what to do is said once for all that ask for the same."""
    if not warnings:
        yield "no warnings"
    shown = warnings[:MOST_WARNINGS]
    for advice in dict.fromkeys(warning["advice"] for warning in shown):
        for warning in (each for each in shown if each["advice"] == advice):
            yield f"warning: {one_line(warning['what'])}"
            if warning["places"]:
                rest = "; ..." if len(warning["places"]) == PLACES < warning["count"] else ""
                yield f"    at {one_line('; '.join(warning['places']))}{rest}"
        yield f"    -> {one_line(advice)}"
    if len(warnings) > MOST_WARNINGS:
        yield f"... and {len(warnings) - MOST_WARNINGS} warnings more, in --plan_file"
