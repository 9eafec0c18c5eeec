"""Write a commented run.yaml for the rows in a folder, which plan and train take unchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config.init import InitRunConfig
from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.client_facts import read_client_files
from fedlora.data.client_files import find_client_files, find_counts, is_silo_folder, list_rows
from fedlora.data.held_out import own_test_files
from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.files import is_saved_dataset, write_text
from fedlora.plain_text import counted
from fedlora.planning.starting_point import Rows, command, kinds_text, run_yaml, split_steps
from fedlora.results import Result
from fedlora.rows import Row, RowKind
from fedlora.types import ClientId


@dataclass(frozen=True, repr=False)
class WrittenConfiguration(Result):
    """The file that was written, and the clients that it is for."""

    file: Path
    clients: dict[str, int]
    """Name -> rows."""
    kinds: Mapping[RowKind, int] = field(default_factory=dict)
    """Kind -> rows with a response."""

    def text(self) -> str:
        """The file, and what it is for."""
        counts = f"{counted(len(self.clients), 'client')}, {counted(sum(self.clients.values()), 'row')}"
        kinds = kinds_text(self.kinds)
        return f"{self.file}: {counts}" + (f" ({kinds})" if kinds else "")

    @property
    def next_command(self) -> str:
        """What training from the file takes."""
        return command("plan", self.file)

    def as_dict(self) -> dict[str, Any]:
        """Where the file lies, and the rows of every client and kind."""
        return {"file": str(self.file), "clients": self.clients, "kinds": dict(self.kinds)}


def run(config: InitRunConfig) -> WrittenConfiguration:
    """Look at the rows and write the file.

    UsageError where the file exists, and where there is one file of rows: its hint has the commands that split it.
    """
    if config.config_file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"config_file={config.config_file}: not a .yaml file", hint="name it run.yaml")
    _refuse_one_file(config)
    counts = find_counts(config.data_path)
    if len(counts) > 1:
        found = ", ".join(map(str, counts))
        raise UsageError(
            f"{config.data_path} holds allocated data for several numbers of clients: {found}",
            hint=f"name one data set, for example `{command('init', counts[0].parent)}`",
        )
    count = int(counts[0].name) if counts else 0
    files = find_client_files(config.data_path, count, chosen=bool(counts))
    if config.config_file.exists() and not config.overwrite:
        raise UsageError(f"{config.config_file}: exists", hint="give --overwrite to replace it, or --config_file NAME")
    rows = _read_folder(config, files, allocated=bool(counts))
    if not rows.smallest:
        raise DataError(f"{config.data_path}: no row has a response", hint="give rows with instruction and response")
    for name, one in zip(rows.names, rows.clients, strict=True):
        if not one.num_examples:
            say(f"warning: {name} has no row to train on and is never selected")
    write_text(config.config_file, run_yaml(rows, config.base_model, config.config_file))
    sizes = {name: one.num_examples for name, one in zip(rows.names, rows.clients, strict=True)}
    return WrittenConfiguration(config.config_file, sizes, rows.kinds)


def _read_folder(config: InitRunConfig, files: Sequence[Path], *, allocated: bool) -> Rows:
    kinds: Counter[RowKind] = Counter()
    has_turns = False

    def note(client: ClientId, row: Row) -> None:
        nonlocal has_turns
        if row.output.strip():
            kinds[row.kind] += 1
            has_turns |= bool(row.before)

    rules, reading = config.read_rules, config.read_rules.record()
    clients = read_client_files(dict(enumerate(files)), TrainConfig.of(**reading), on_row=note)
    own = {} if allocated else own_test_files(files)
    tests = {name: len(read_rows(file, rules=rules)) for name, file in own.items()}
    facts = [client.facts for client in clients.values()]
    return Rows(config.data_path, facts, tests, allocated, kinds, has_turns, reading)


def _refuse_one_file(config: InitRunConfig) -> None:
    """UsageError with the commands that split it where there is one file of rows, and no allocated data."""
    path = config.data_path
    files = [path] if path.is_file() or is_saved_dataset(path) else list_rows(path)
    if len(files) != 1 or is_silo_folder(files[0]) or (is_silo_folder(path) and find_counts(path)):
        return
    first, second = split_steps(files[0], read_rows(files[0], rules=config.read_rules), config.read_rules.record())
    raise UsageError(
        f"{files[0]} is one file of rows; a federation has a file for each client",
        hint=f"put a file for each client into a folder, or split this one: `{first}`, then `{second}`",
    )
