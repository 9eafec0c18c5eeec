"""Where the files of a federation across machines lie: the server's folder, a node's folder, what a node keeps.

Roots come from configurations that their owners wrote themselves; nothing that travels becomes part of a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora.paths import is_number


@dataclass(frozen=True)
class NodePaths:
    """What one node of a federation across machines keeps, run by run; `run_key` names a run by what it computes."""

    state_dir: Path
    run_key: str

    @property
    def layout_file(self) -> Path:
        return self.folder / "layout.json"

    @property
    def model_folder(self) -> Path:
        """The client's personal model, for its owner."""
        return self.folder / "model"

    @property
    def base_file(self) -> Path:
        """What the run has added to its base."""
        return self.folder / "base.additions"

    @property
    def folder(self) -> Path:
        return self.state_dir / "runs" / self.run_key

    def update_file(self, round_number: int) -> Path:
        """The update of a round with everything this client keeps."""
        return self.folder / f"{round_number}.update"

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
    def lock_file(self) -> Path:
        return self.root / ".lock"

    @property
    def database(self) -> Path:
        return self.root / "state.db"

    @property
    def home(self) -> Path:
        return self.root / "flower"

    @property
    def names_file(self) -> Path:
        """Number of a registered node -> its name, which Flower's list of nodes does not tell."""
        return self.root / "nodes" / "names.json"

    def run_file(self, run_id: str) -> Path:
        """What was submitted as the run of this number: Flower knows an app, and no experiment."""
        return self.root / "runs" / f"{run_id}.json"

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
    def lock_file(self) -> Path:
        return self.root / ".lock"

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
    """A secret of a node: it salts the hash of the node's data."""
    return state_dir / "salt"


def node_socket(state_dir: Path) -> Path:
    """Where a node's worker listens."""
    return state_dir / "worker.sock"
