"""Where every output lies: the one module that builds an output path.

Names that become folders are checked first, so that nothing is ever written outside its root.
Rounds count from 1 in every tree; clients count from 0.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedlora.errors import UsageError
from fedlora.home import user_folder

POOLED = -1
"""The client id under which `pooled` trains: all rows of a cohort together."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
"""Names that are devices, not folders, on some systems."""


BesideRounds = Literal["steps.jsonl", "trackers.json", ".progress.json"]


def check_name(name: str, what: str) -> str:
    """`name` itself when it can be a folder name; UsageError otherwise."""
    if _NAME.fullmatch(name) is None or name.endswith(".") or name.split(".")[0].lower() in _RESERVED:
        raise UsageError(
            f"{what}={name!r} cannot be a folder name",
            hint="use 1 to 100 letters, digits, '.', '_' or '-', no dot first or last",
        )
    return name


def _below(root: Path, *parts: str) -> Path:
    """`root` and `parts`; UsageError when a symbolic link takes the way out of `root`."""
    path = root.joinpath(*parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise UsageError(f"{path} leads outside {root}", hint="remove the symbolic link")
    return path


def is_number(name: str) -> bool:
    """Whether `name` is a number as this project writes it into names: `12`, but not `012` nor other digits."""
    return name.isascii() and name.isdigit() and (name == "0" or not name.startswith("0"))


def client_name(client_id: int) -> str:
    """Folder and file stem of a client."""
    return "pooled" if client_id == POOLED else f"client_{client_id}"


def client_number(name: str) -> int:
    """The client whose folder is called `name`."""
    return POOLED if name == client_name(POOLED) else int(name.removeprefix("client_"))


@dataclass(frozen=True)
class RunPaths:
    """The tree of one experiment under `model_dir`."""

    model_dir: Path
    exp_name: str

    @property
    def root(self) -> Path:
        return _below(self.model_dir, self._name)

    @property
    def _name(self) -> str:
        return check_name(self.exp_name, "exp_name")

    @property
    def run_file(self) -> Path:
        return _below(self.model_dir, self._name, "run.json")

    @property
    def metrics_file(self) -> Path:
        return _below(self.model_dir, self._name, "metrics.jsonl")

    @property
    def nodes_file(self) -> Path:
        """The ids by which the nodes of a run across machines know it."""
        return self.root / "nodes.json"

    def beside(self, name: BesideRounds) -> Path:
        """A file that is no part of a round, and that the run does not need: the loss of every step, its runs in
        experiment trackers, and how far the process is that holds the lock."""
        return self.root / name

    @property
    def start_file(self) -> Path:
        """The adapter of another run that this one started from."""
        return self.root / "start.safetensors"

    @property
    def lock_file(self) -> Path:
        return _below(self.model_dir, self._name, ".lock")

    @property
    def holder_file(self) -> Path:
        """Names the process that holds the lock; it means nothing when no process does."""
        return _below(self.model_dir, self._name, ".holder.json")

    def round_folder(self, round_number: int) -> Path:
        return _below(self.model_dir, self._name, str(round_number))

    def partial_folder(self, round_number: int) -> Path:
        """Where a round is put together before it is renamed to its final place."""
        return _below(self.model_dir, self._name, f"{round_number}.partial")

    def damaged_folder(self, round_number: int) -> Path:
        """The place of a committed round with damaged files."""
        return _below(self.model_dir, self._name, f"{round_number}.damaged")

    def committed_rounds(self) -> list[int]:
        """Rounds whose folder is complete, ascending."""
        if not self.root.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.root.iterdir() if is_number(entry.name) and entry.is_dir())


@dataclass(frozen=True)
class OutputName:
    """Which adapter a prediction or a score belongs to: `base`, `global` or `client_<i>`."""

    kind: str
    client_id: int = 0

    @classmethod
    def of_stem(cls, stem: str) -> OutputName | None:
        """The name that is written `base`, `global` or `client_<i>`; None for any other text."""
        if stem in ("base", "global"):
            return cls(stem)
        number = stem.removeprefix("client_")
        return cls("client", int(number)) if number != stem and is_number(number) else None

    @property
    def place(self) -> tuple[int, int]:
        """Sorts base, then global, then the clients by number."""
        return ("base", "global", "client").index(self.kind), self.client_id

    def __str__(self) -> str:
        return client_name(self.client_id) if self.kind == "client" else self.kind


@dataclass(frozen=True)
class ResultPaths:
    """Predictions, ROUGE and judge results of one experiment and round."""

    root: Path
    exp_name: str
    round_number: int

    @property
    def folder(self) -> Path:
        return _below(self.root, check_name(self.exp_name, "exp_name"), str(self.round_number))

    @property
    def rounds(self) -> list[int]:
        """Rounds of this experiment that have a folder, ascending, whatever `round_number` is."""
        return RunPaths(self.root, self.exp_name).committed_rounds()

    def predicted(self) -> list[OutputName]:
        """Everyone whose predictions lie here: base, global, then the clients by number."""
        stems = (file.name.removesuffix("_output.jsonl") for file in self.folder.glob("*_output.jsonl"))
        return sorted(filter(None, map(OutputName.of_stem, stems)), key=lambda name: name.place)

    def predictions(self, name: OutputName) -> Path:
        return self.folder / f"{name}_output.jsonl"

    def predictions_meta(self, name: OutputName) -> Path:
        return self.folder / f"{name}_output.meta.json"

    def rouge(self, name: OutputName) -> Path:
        return self.folder / f"{name}_output_rouge.json"

    def scores(self, name: OutputName, suffix: Literal[".json", ".jsonl"], kind: str = "scores") -> Path:
        """Every measure of the answers, or of kind `losses`: `.json` with intervals, `.jsonl` row by row."""
        return self.folder / f"{name}_{kind}{suffix}"

    def task(self, name: OutputName, task: str, suffix: Literal[".json", ".jsonl"]) -> Path:
        """What one standard task measured: `.json` the scores, `.jsonl` row by row."""
        return self._below_root(str(name), f"{check_name(task, 'task')}{suffix}")

    def judge(self, name: OutputName) -> Path:
        return self.folder / f"{name}_results.json"

    def pair(self, stem: str, suffix: str = "json") -> Path:
        """What judges said of one pair (`<pair>/<judge>`: one of several); with txt the texts, for a person."""
        return self._below_root("pairs", f"{stem}.{suffix}")

    def pairs(self, name: OutputName) -> list[Path]:
        """Every pair whose baseline is `name`, by name."""
        return sorted((self.folder / "pairs").glob(f"*--{name}.json"))

    def verdicts(self, name: OutputName) -> Path:
        return self._below_root(f"{name}_verdicts.jsonl")

    def beside_verdicts(self, name: OutputName, what: Literal["unusable_reply.txt", "batches.json"]) -> Path:
        """The first reply of a run that could not be used, or the batches that an endpoint works on."""
        return self._below_root(f"{name}_{what}")

    def judge_lock(self, name: OutputName) -> Path:
        """Held while verdicts are asked for and stored."""
        return self._below_root(f".{name}_verdicts.lock")

    def _below_root(self, *parts: str) -> Path:
        return _below(self.root, check_name(self.exp_name, "exp_name"), str(self.round_number), *parts)


@dataclass(frozen=True)
class DataPaths:
    """The tree that allocation writes: client files, the test set, a manifest."""

    output_root: Path
    dataset_name: str

    @property
    def folder(self) -> Path:
        return _below(self.output_root, check_name(self.dataset_name, "dataset_name"))

    def client_file(self, num_clients: int, client_id: int) -> Path:
        return self._clients_folder(num_clients) / f"local_training_{client_id}.json"

    def silo_file(self, client: str) -> Path:
        """The training rows of a client that has a name, where a comparison holds out some of its rows."""
        return _below(self.folder, "clients", f"{client}.jsonl")

    def test_file(self, test_per_cat: int | None) -> Path:
        """The test set; None where a share of the rows was asked for."""
        return self.folder / ("test_rows.jsonl" if test_per_cat is None else f"dolly_test_{test_per_cat}.jsonl")

    def part_file(self, part: str) -> Path:
        """`validation`, `test` or `answered`: a part of the test set, where a comparison divides it."""
        return self.folder / f"{check_name(part, 'part')}.jsonl"

    def manifest(self, num_clients: int) -> Path:
        return self._clients_folder(num_clients) / "manifest.json"

    def _clients_folder(self, num_clients: int) -> Path:
        return _below(self.output_root, check_name(self.dataset_name, "dataset_name"), str(num_clients))


@dataclass(frozen=True)
class ComparisonPaths:
    """The tree of one comparison: data sets, runs, what was measured of each, and the result."""

    output_dir: Path
    name: str

    @property
    def root(self) -> Path:
        return _below(self.output_dir, check_name(self.name, "name"))

    @property
    def data_dir(self) -> Path:
        return _below(self.root, "data")

    @property
    def model_dir(self) -> Path:
        return _below(self.root, "runs")

    def rows_file(self, seed: int) -> Path:
        """Rows of the skills data, where no file is given."""
        return _below(self.root, "data", f"skills-{seed}.json")

    @property
    def scores_folder(self) -> Path:
        """What was measured, a file for each run."""
        return _below(self.root, "scores")

    def score_file(self, exp_name: str) -> Path:
        """What was measured of one run."""
        return _below(self.root, "scores", f"{check_name(exp_name, 'exp_name')}.json")

    def answers_dir(self, kind: str) -> Path:
        """`predictions` or `rouge`: the trees that generate and evaluate_rouge write."""
        return _below(self.root, kind)

    def result_file(self, name: str) -> Path:
        """`comparison.md`, `.json`, `.tex`, or a figure."""
        return _below(self.root, name)


def report_file(report_dir: Path, name: str, suffix: str) -> Path:
    """`<report_dir>/<name>/report<suffix>`."""
    return _below(report_dir, check_name(name, "report_name")) / f"report{suffix}"


def secret_file(secret_id: str) -> Path:
    """Where a private run's secret lies, away from what is shared: FEDLORA_SECRETS, else the user's state folder."""
    folder = user_folder("FEDLORA_SECRETS", "XDG_STATE_HOME", ".local/state", "fedlora/secrets")
    return folder / f"{check_name(secret_id, 'secret_id')}.key"
