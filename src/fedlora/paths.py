"""Where every output lies: the one module that builds an output path.

Names that become folders are checked first, so that nothing is ever written outside its root.
Rounds count from 1 in every tree; clients count from 0.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import UsageError

POOLED = -1
"""The client id under which `pooled` trains: all rows of a cohort together."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
"""Names that are devices, not folders, on some systems."""


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
    def lock_file(self) -> Path:
        return _below(self.model_dir, self._name, ".lock")

    @property
    def holder_file(self) -> Path:
        """Tells which process holds the lock; it means nothing when nobody does."""
        return _below(self.model_dir, self._name, ".holder.json")

    def round_folder(self, round_number: int) -> Path:
        return _below(self.model_dir, self._name, str(round_number))

    def partial_folder(self, round_number: int) -> Path:
        """Where a round is put together before it is renamed to its final place."""
        return _below(self.model_dir, self._name, f"{round_number}.partial")

    def damaged_folder(self, round_number: int) -> Path:
        """Where a committed round goes whose files are not what was written."""
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
    def choose(cls, *, is_base_model: bool, is_global_model: bool, client_id: int) -> OutputName:
        """The contract's three flags as one name; the base model wins over the others."""
        if is_base_model:
            return cls("base")
        return cls("global") if is_global_model else cls("client", client_id)

    def __str__(self) -> str:
        return client_name(self.client_id) if self.kind == "client" else self.kind


@dataclass(frozen=True)
class NodePaths:
    """What one node of a federation across machines keeps, run by run; `run_key` names a run by what it computes."""

    state_dir: Path
    run_key: str

    @property
    def layout_file(self) -> Path:
        return _below(self.state_dir, "runs", self.run_key, "layout.json")

    @property
    def folder(self) -> Path:
        return _below(self.state_dir, "runs", self.run_key)

    def update_file(self, round_number: int) -> Path:
        """The update of a round with everything this client keeps."""
        return _below(self.state_dir, "runs", self.run_key, f"{round_number}.update")

    def kept_rounds(self) -> list[int]:
        """Rounds of which an update is kept, ascending."""
        if not self.folder.is_dir():
            return []
        stems = [entry.stem for entry in self.folder.iterdir() if entry.suffix == ".update"]
        return sorted(int(stem) for stem in stems if is_number(stem))


@dataclass(frozen=True)
class ServerFolder:
    """Keys, certificates and state of the server of a federation across machines."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "server.yaml"

    @property
    def ca_certificate(self) -> Path:
        return self.root / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.root / "ca.key"

    @property
    def certificate(self) -> Path:
        return self.root / "server.crt"

    @property
    def key(self) -> Path:
        return self.root / "server.key"

    @property
    def secret(self) -> Path:
        return self.root / "superexec.secret"

    @property
    def database(self) -> Path:
        return self.root / "state.db"

    @property
    def home(self) -> Path:
        return self.root / "flower"

    def public_key(self, client_id: int) -> Path:
        return self.root / "nodes" / f"client-{client_id}.pub"

    def public_keys(self) -> dict[int, Path]:
        """Client -> its node's public key, for every node that was made or brought."""
        found = self.root.glob("nodes/client-*.pub")
        stems = {path.stem.removeprefix("client-"): path for path in found}
        return {int(stem): path for stem, path in sorted(stems.items()) if is_number(stem)}


@dataclass(frozen=True)
class NodeFolder:
    """Key, configuration and state of one node."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "node.yaml"

    @property
    def ca_certificate(self) -> Path:
        return self.root / "ca.crt"

    @property
    def key(self) -> Path:
        return self.root / "node.key"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def home(self) -> Path:
        return self.root / "flower"

    @property
    def guarded_command(self) -> Path:
        """What runs in the place of Flower's command of this name."""
        return self.root / "bin" / "flwr-clientapp"


def client_folder(root: Path, client_id: int) -> Path:
    """The folder of one node among those that are made together."""
    return root / f"client-{client_id}"


def node_salt_file(state_dir: Path) -> Path:
    """A secret of a node: what it tells of its data is salted with it."""
    return _below(state_dir, "salt")


def node_socket(state_dir: Path) -> Path:
    """Where a node's worker listens."""
    return _below(state_dir, "worker.sock")


@dataclass(frozen=True)
class ResultPaths:
    """Predictions, ROUGE and judge results of one experiment and round."""

    root: Path
    exp_name: str
    round_number: int

    @property
    def folder(self) -> Path:
        return _below(self.root, check_name(self.exp_name, "exp_name"), str(self.round_number))

    def predictions(self, name: OutputName) -> Path:
        return self.folder / f"{name}_output.jsonl"

    def predictions_meta(self, name: OutputName) -> Path:
        return self.folder / f"{name}_output.meta.json"

    def rouge(self, name: OutputName) -> Path:
        return self.folder / f"{name}_output_rouge.json"

    def judge(self, name: OutputName) -> Path:
        return self.folder / f"{name}_results.json"

    def verdicts(self, name: OutputName) -> Path:
        return self._below_root(f"{name}_verdicts.jsonl")

    def judge_lock(self, name: OutputName) -> Path:
        """Held while verdicts are asked for and stored."""
        return self._below_root(f".{name}_verdicts.lock")

    def _below_root(self, file: str) -> Path:
        return _below(self.root, check_name(self.exp_name, "exp_name"), str(self.round_number), file)


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

    def test_file(self, test_per_cat: int) -> Path:
        return self.folder / f"dolly_test_{test_per_cat}.jsonl"

    def manifest(self, num_clients: int) -> Path:
        return self._clients_folder(num_clients) / "manifest.json"

    def _clients_folder(self, num_clients: int) -> Path:
        return _below(self.output_root, check_name(self.dataset_name, "dataset_name"), str(num_clients))


def report_file(report_dir: Path, name: str, suffix: str) -> Path:
    """`<report_dir>/<name>/report<suffix>`."""
    return _below(report_dir, check_name(name, "report_name")) / f"report{suffix}"


def cache_folder() -> Path:
    """Where converted models and tokenised rows are kept: FEDLORA_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("FEDLORA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedlora"


def tokens_folder() -> Path:
    """Where tokenised rows are kept between runs."""
    return cache_folder() / "tokens"
