"""An old commit and the working tree side by side on one machine: their commands, and how their runs are compared.

Each side is a fork server that imports fedlora from its own sources. Model, rows and the secret of private runs are the
same on both.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fork_server import Ending, ForkServer
from tiny_run import make_client_files, make_tiny_model, options_of

from fedlora.files import sha256_of, write_text

ROOT = Path(__file__).resolve().parents[1]
SIZES = (5, 4, 3, 4, 3, 2)
"""Rows of the six clients. Five are drawn in a round: as many as Krum needs against one hostile client."""
RECORDS = ("run.json", "manifest.json", "update.json")
NOT_COMPARED = frozenset(
    {"check", "config_sha256", "environment", "files", "parent_sha256", "seconds", "sha256", "task_id", "versions"}
)
"""Fields of records that hold times, the machine, or hashes that cover the configuration."""


@dataclass(frozen=True)
class Side:
    """One version of fedlora, and the folder for what it writes."""

    server: ForkServer
    folder: Path

    def run(self, command: str, options: Mapping[str, Any], **job: Any) -> Ending:
        """`fedlora command`, which may be several words, with the options as flags."""
        # a run of the old side goes on in the new one, so its secret must be found there
        folders = {"FEDLORA_CACHE": f"{self.folder}-cache", "FEDLORA_SECRETS": str(self.folder.parent / "secrets")}
        argv = [*command.split(), *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
        return self.server.run(argv, environment=folders, known_secret=True, flushes=False, **job)


@dataclass(frozen=True)
class TwoCommits:
    """Both sides, and what they share."""

    old: Side
    new: Side
    model: Path
    data: Path
    questions: Path
    dropout: float

    def training(self, method: str, folder: Path, **changes: Any) -> dict[str, Any]:
        """The flags of a tiny run whose models go into `folder`."""
        common = {"num_clients": len(SIZES), "lora_dropout": self.dropout}
        return {**options_of(method, self.model, self.data, folder), **common, **changes}

    def answering(self, models: Path, predictions: Path) -> dict[str, Any]:
        """The flags with which every adapter of the last round answers."""
        where = {"exp_name": "run", "model_dir": models, "prediction_dir": predictions, "communication_rounds": 3}
        how = {"test_file_path": self.questions, "max_new_tokens": 8, "device": "cpu", "base_dtype": "float32"}
        return {**where, **how, "all": "true"}


@contextlib.contextmanager
def open_two_commits(old: str, *, dropout: float) -> Iterator[TwoCommits]:
    """Both sides in a temporary folder, the old one from a git worktree; all of it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fedlora-commits-") as name, contextlib.ExitStack() as opened:
        work = Path(name)
        _git("worktree", "add", "--detach", str(work / "checkout"), old)
        opened.callback(_git, "worktree", "remove", "--force", str(work / "checkout"))
        model, data = make_tiny_model(work / "model"), make_client_files(work / "data", SIZES)
        questions = work / "questions.jsonl"
        write_text(
            questions, "".join(json.dumps({"instruction": f"say {n}", "output": "red"}) + "\n" for n in range(3))
        )

        def start(name: str, source: Path) -> Side:
            return Side(opened.enter_context(ForkServer(model, source)), work / name)

        old_side, new_side = start("old", work / "checkout/src"), start("new", ROOT / "src")
        yield TwoCommits(old_side, new_side, model, data, questions, dropout)


def compare_runs(old: Path, new: Path) -> list[str]:
    """Each file, or field of a record, in which two runs differ."""
    return _differences(_facts_of(old), _facts_of(new))


def compare_folders(old: Path, new: Path) -> list[str]:
    """Each file that differs in one byte, or is missing in one of the folders."""
    was, now = ({path.name: sha256_of(path) for path in folder.rglob("*.jsonl")} for folder in (old, new))
    return _differences(was, now)


def _facts_of(run: Path) -> dict[str, Any]:
    """File of a run -> its SHA-256, or its values where times or hashes of the configuration are among them."""
    facts: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if path.name in RECORDS:
            facts[name] = _values_of(json.loads(path.read_text(encoding="utf-8")))
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            # a row of kind "update" marks an arrival: a client, a round and a time
            measured = [row for row in rows if row["kind"] != "update"]
            facts[name] = {str(index): _values_of(row) for index, row in enumerate(measured)}
        elif ".damaged/" not in name and path.parent != run:
            facts[name] = sha256_of(path)
    return facts


def _values_of(record: Any) -> Any:
    """A record without the fields of NOT_COMPARED, and without null fields, which say nothing."""
    if isinstance(record, list):
        return [_values_of(value) for value in record]
    if not isinstance(record, dict):
        return record
    return {name: _values_of(it) for name, it in record.items() if it is not None and name not in NOT_COMPARED}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    found = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, f"{place}{name} ")
        elif was != now:
            values = "" if _is_hash(was) or _is_hash(now) else f" is {now}, was {was}"
            found.append(f"{place}{name}{values}"[:160])
    return found


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _git(*words: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True)
