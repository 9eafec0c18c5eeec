"""What-ifs of a run as results: a table for people, and the same numbers as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.generate import GenerateConfig
from fedlora.console import printable
from fedlora.data.client_names import name_of_file, shown_client
from fedlora.paths import RunPaths
from fedlora.plain_text import NOTHING, table_text
from fedlora.results import Result
from fedlora.types import ClientId

LOSS_HEADS = ("held-out loss, actual", "what-if", "difference")

NOTE = (
    "Each line is a what-if of one round: it starts from the adapter that the run really had before that round. How a "
    "run would have gone on from there is not known, for later updates were trained on the actual adapters."
)
EACH_NOTE = (
    "Each line is the mean over the rounds to which the client sent an update. Distances are in lengths of the step "
    "that the round really took. Every round starts from the adapter that the run really had."
)


@dataclass(frozen=True, repr=False)
class Reaggregated(Result):
    """The what-ifs of a run: their folder, what was changed, and the numbers of each round."""

    paths: RunPaths
    origin: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]
    files: Mapping[ClientId, str]
    """Client -> the name of its file."""

    @property
    def root(self) -> Path:
        """The folder of the what-ifs."""
        return self.paths.root

    @property
    def next_command(self) -> str:
        """How the what-ifs answer test rows."""
        asked = {"exp_name": self.paths.exp_name, "test_file_path": "FILE", "model_dir": self.paths.model_dir}
        return command_line("generate", GenerateConfig, asked, positional="exp_name")

    def as_dict(self) -> dict[str, Any]:
        return {"folder": str(self.root), "origin": dict(self.origin), "rounds": list(map(dict, self.rounds))}

    def parts(self) -> Sequence[str]:
        """What was changed, the table by round, and the folder."""
        run = f"{printable(self.origin['exp_name'])} ({self.origin['federation_mode']})"
        change = _say_change(self.origin["changed"], self.files)
        head = f"{run} -> {printable(self.paths.exp_name)}: {change}"
        return (head, table_text(*_table(self.rounds)), NOTE, str(self.root))


@dataclass(frozen=True, repr=False)
class LeftOutEach(Result):
    """How a run's rounds change when one client is left out, for every client in turn."""

    origin: Mapping[str, Any]
    clients: tuple[Mapping[str, Any], ...]
    """A line for each client: number, name, examples, the means over its rounds, and `rounds` one by one."""

    def as_dict(self) -> dict[str, Any]:
        """`rounds` of a client are those to which it sent an update."""
        return {"origin": dict(self.origin), "clients": list(map(dict, self.clients))}

    def parts(self) -> Sequence[str]:
        """What was changed, and the table by client."""
        run = f"{printable(self.origin['exp_name'])} ({self.origin['federation_mode']})"
        head = f"{run}: every client left out in turn, {_say_change(self.origin['changed'], {})}"
        heads = ["left out", "examples", "rounds", "distance / step"]
        if any("val_loss" in line for line in self.clients):
            heads += LOSS_HEADS
        rows = []
        for line in self.clients:
            cells = [printable(line["name"]), str(line["num_examples"]), str(len(line["rounds"]))]
            rows.append([*cells, *_measured_cells(line, len(heads) > len(cells) + 1)])
        return (head, table_text(heads, rows), EACH_NOTE)


def _table(lines: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[Sequence[str]]]:
    heads = ["round", "clients", "distance / step"]
    has_losses = "val_loss" in lines[0]
    cells: list[Sequence[str]] = [
        [str(line["round"]), str(len(line["counts"])), *_measured_cells(line, has_losses)] for line in lines
    ]
    return heads + list(LOSS_HEADS if has_losses else ()), cells


def _measured_cells(line: Mapping[str, Any], has_losses: bool) -> list[str]:
    """Distance, and where losses were measured the actual one, the other and the difference."""
    distance = line["distance"]
    cells = [NOTHING if distance is None else f"{distance:.4f}"]
    if not has_losses:
        return cells
    if "val_loss" not in line:
        return [*cells, NOTHING, NOTHING, NOTHING]
    actual, other = line["actual_val_loss"], line["val_loss"]
    return [*cells, f"{actual:.4f}", f"{other:.4f}", f"{other - actual:+.4f}"]


def _say_change(changed: Mapping[str, Any], files: Mapping[ClientId, str]) -> str:
    weights = changed["weights"]
    if isinstance(weights, Mapping):
        named = {name_of_file(files[client]) if client in files else str(client): weights[client] for client in weights}
        weights = ", ".join(f"{printable(name)}:{weight}" for name, weight in named.items())
    parts = [f"server {changed['federation_mode']}", f"weights {weights}"]
    if left_out := changed.get("leave_out"):
        parts.append(f"without {', '.join(printable(shown_client(client, files)) for client in left_out)}")
    return ", ".join(parts)
