"""Settings to begin with, from the rows that are there: what `fedlora init` writes into run.yaml.

They are those of the demo where the rows allow it. With few rows a round has more epochs, so that a run takes enough
steps to learn from them.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.init import InitRunConfig
from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import ClientFacts
from fedlora.data.client_names import name_of_file
from fedlora.errors import UsageError
from fedlora.llm.embedded_model import NAME
from fedlora.methods.table import METHODS
from fedlora.paths import check_name
from fedlora.plain_text import counted, one_line
from fedlora.rows import Row, RowKind

LARGEST_BATCH, STEPS_PER_ROUND, MOST_EPOCHS, ROUNDS = 16, 12, 4, 6
"""Three silos of 32 rows learn their answers with these in under 4 minutes on two cores: see examples/silos.yaml."""
TEST_SHARE = 0.2
FEWEST_TO_SPLIT = 5
"""Rows of the smallest client from which on a share is held out."""
SPLIT_CLIENTS = 4
"""Clients that rows without categories are split among."""
SHOWN = 8
_NOUNS: Mapping[RowKind, str] = {
    "instruction": "instruction row",
    "conversation": "conversation",
    "completion": "completion",
    "text": "text",
}


@dataclass(frozen=True)
class Rows:
    """What lies in the folder: its clients in id order, and how many test rows each has in a file of its own.

    `kinds` counts the rows with a response by kind; `has_turns` says whether one has a system turn or several turns.
    """

    folder: Path
    clients: Sequence[ClientFacts]
    tests: Mapping[str, int]
    allocated: bool = False
    kinds: Mapping[RowKind, int] = field(default_factory=dict)
    has_turns: bool = False
    reading: Mapping[str, Any] = field(default_factory=dict)
    """The rules by which the rows are read, where they are not the usual ones."""

    @property
    def smallest(self) -> int:
        """Rows of the smallest client that has some."""
        return min((facts.num_examples for facts in self.clients if facts.num_examples), default=0)

    @property
    def names(self) -> list[str]:
        return [name_of_file(facts.file) for facts in self.clients]


def run_yaml(rows: Rows, base_model: str, file: Path) -> str:
    """The text of a run.yaml in short names, with a comment where a choice is explained."""
    shares = not rows.tests and not rows.allocated and rows.smallest >= FEWEST_TO_SPLIT
    kept = rows.smallest - (math.ceil(TEST_SHARE * rows.smallest) if shares else 0)
    held_back = kept // 8
    training = kept - held_back
    batch = max(size for size in (1, 2, 4, 8, LARGEST_BATCH) if size <= max(1, training // 3))
    epochs = min(MOST_EPOCHS, max(1, round(STEPS_PER_ROUND / math.ceil(training / batch))))
    embedded = base_model == NAME
    method = TrainConfig.model_fields["federation_mode"].default
    fields: list[tuple[str, Any, str]] = [
        ("name", run_name(rows.folder), "the run's folder under ./models"),
        ("model", base_model, "embedded; or a local folder, or a hub id" if embedded else "a local folder or a hub id"),
        ("template", *_template(rows, embedded=embedded)),
        ("data", str(rows.folder), _count_text(rows)),
    ]
    fields += [(name, value, "how the rows are read") for name, value in rows.reading.items()]
    if rows.allocated:
        fields.append(("num_clients", len(rows.clients), "as allocate split the rows"))
    if shares:
        fields.append(("test_share", TEST_SHARE, "of each client's rows: test rows, never trained on"))
    fields += [
        ("local_val_set_size", held_back, "rows that each client holds back to measure every round"),
        ("seed", 42, "of every random draw"),
        ("method", method, f"{METHODS[method].summary}; `fedlora methods` lists all"),
        ("rounds", ROUNDS, "a finished run takes more: --rounds 10"),
        ("client_fraction", 1, "every client takes part in every round"),
        ("batch_size", batch, "examples per optimizer step"),
        ("epochs", epochs, "of a client in a round"),
        ("learning_rate", 2e-3 if embedded else 3e-4, "if the loss rises, try a third of it"),
        ("rank", 16, "of the adapters"),
        ("dropout", 0.0, ""),
        ("target_modules", "all-linear", "the adapted layers; fewer: [q_proj, v_proj]"),
    ]
    width = max(len(f"{name}: {_scalar(value)}") for name, value, _ in fields if name != "data")
    written = f"A run on the rows in {rows.folder}, written by `{command('init', rows.folder)}{_flags(rows.reading)}`."
    lines = [f"# {one_line(note)}" for note in (written, *_notes(rows, file))]
    for name, value, note in fields:
        text = f"{name}: {_scalar(value)}"
        lines.append(f"{text:<{width}}  # {one_line(note)}" if note else text)
    return "\n".join(lines) + "\n"


def _template(rows: Rows, *, embedded: bool) -> tuple[str, str]:
    """The prompt format, and why it is this one."""
    name = "chat" if embedded or rows.has_turns or "conversation" in rows.kinds else "alpaca"
    why = "prompt format: chat needs a tokenizer with a chat template"
    if rows.has_turns:
        why = "prompt format: alpaca takes neither a system turn nor several turns"
    elif rows.kinds and not {"instruction", "conversation"} & rows.kinds.keys():
        why = "prompt format of questions asked later; these rows have none"
    return name, why


def kinds_text(kinds: Mapping[RowKind, int]) -> str:
    """How many rows of which kind; empty where all are instruction rows."""
    if not kinds.keys() - {"instruction"}:
        return ""
    return ", ".join(counted(kinds[kind], noun) for kind, noun in _NOUNS.items() if kinds.get(kind))


def _notes(rows: Rows, file: Path) -> list[str]:
    notes = [
        f"`{command('plan', file)}` says what it takes, `{command('train', file)}` trains it and resumes it.",
        "A flag wins over a line: --rounds 3. `fedlora train --help` explains the fields.",
    ]
    if kinds := kinds_text(rows.kinds):
        notes.append(f"The rows with a response: {kinds}.")
    if rows.tests:
        of = ", ".join(f"{name} {count}" for name, count in list(rows.tests.items())[:SHOWN])
        notes.append(f"Test rows, never trained on, have files of their own: {of}.")
    elif rows.allocated:
        notes.append("The test rows are in the file that allocate named.")
    if not rows.allocated:
        name, where = run_name(rows.folder), shlex.join(["--test", str(rows.folder)]) + _flags(rows.reading)
        then = f"`fedlora generate {name} {where} --of base,global` and `fedlora score {name} {where} --of all`"
        if "text" in rows.kinds:
            then = f"`fedlora loss {name} {where} --of base,global`: a text asks nothing that could be answered"
        notes.append(f"Then {then}.")
    return notes


def command(name: str, *paths: Path) -> str:
    """A command line to type."""
    return shlex.join(["fedlora", name, *map(str, paths)])


def _flags(reading: Mapping[str, Any]) -> str:
    """The rules of reading as flags after a command."""
    return command_line("", InitRunConfig, reading).removeprefix("fedlora")


def run_name(folder: Path) -> str:
    """A run's name from that of its folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip(".-")[:40]
    try:
        return check_name(name, "name")
    except UsageError:
        return "run"


def split_steps(file: Path, rows: Sequence[Row], reading: Mapping[str, Any]) -> list[str]:
    """The commands that make clients of one file of rows; UsageError when it has too few.

    `reading` has the rules by which the file is read, where they are not the usual ones.
    """
    distinct = {row.prompt: row.category for row in rows if row.output.strip()}
    categories = Counter(distinct.values())
    by_category = len(categories) > 1 and all(categories) and min(categories.values()) >= FEWEST_TO_SPLIT
    fewest = min(categories.values(), default=0)
    clients = min(SPLIT_CLIENTS, len(distinct) // FEWEST_TO_SPLIT)
    if not by_category and (clients < 2 or fewest < 2):
        raise UsageError(
            f"{file}: {counted(len(distinct), 'row')} with different prompts and a response are too few to "
            f"split among clients",
            hint=f"give at least {2 * FEWEST_TO_SPLIT}",
        )
    words = ["fedlora", "allocate", str(file), "--dataset_name", run_name(file.with_suffix(""))]
    if not by_category:
        words += ["--partition", "iid", "--num_clients", str(clients)]
    words += ["--test_share", f"{TEST_SHARE:g}"]
    return [shlex.join(words) + _flags(reading), command("init", Path("data") / run_name(file.with_suffix("")))]


def _count_text(rows: Rows) -> str:
    """How many rows which client has; clients without a name of their own are only counted."""
    counts = [facts.num_examples for facts in rows.clients]
    text = f"{counted(len(counts), 'client')}, {counted(sum(counts), 'row')}"
    if rows.allocated:
        return text
    shown = ", ".join(f"{name} {count}" for name, count in list(zip(rows.names, counts, strict=True))[:SHOWN])
    return f"{text}: {shown}" + (", ..." if len(counts) > SHOWN else "")


def _scalar(value: Any) -> str:
    """A value as YAML has it."""
    import yaml

    if isinstance(value, float):
        return f"{value:g}"
    # a mapping on one line, beside its comment
    return (
        yaml.safe_dump(value, allow_unicode=True, width=math.inf, default_flow_style=isinstance(value, dict))
        .removesuffix("\n")
        .removesuffix("\n...")
    )
