"""Three clients with the tiny model: as a simulation, and as nodes of a Grid in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from memory_grid import Handler, MemoryGrid

from fedlora.config.train import TrainConfig
from fedlora.files import sha256_of
from fedlora.flower import server
from fedlora.flower.messenger import reply
from fedlora.flower.node import Node
from fedlora.flower.node_config import NodeConfig
from fedlora.flower.pool import Patience
from fedlora.stages import train

SIZES = [3, 2, 4]
QUICK = server.Waits(start=5.0, wave=Patience(poll=0.0, absent=0.05, wave=5.0))
BAD = 1
"""The client in whose place something else stands."""


class Federation:
    """Rows of three clients under `root`; runs lie in `root/models`, what nodes keep in `root/nodes`."""

    def __init__(self, root: Path, data: Path, model: Path) -> None:
        self.root, self.data, self.model = root, data, model
        self.nodes: dict[int, Node] = {}
        self.asked: list[tuple[int, bytes]] = []

    def config(self, name: str, mode: str = "homo", **changes: Any) -> TrainConfig:
        options = {
            "exp_name": name,
            "federation_mode": mode,
            "base_model": str(self.model),
            "base_dtype": "float32",
            "data_path": self.data,
            "model_dir": self.root / "models",
            "client_selection_strategy": "all",
            "num_communication_rounds": 2,
            "num_clients": len(SIZES),
            "local_batch_size": 2,
            "local_num_epochs": 1,
            "local_learning_rate": 1e-2,
            "tokens_per_pass": 256,
            "prompt_template": "chat",
            "device": "cpu",
            **changes,
        }
        return TrainConfig.of(**options)

    def simulate(self, name: str, mode: str = "homo", **changes: Any) -> Path:
        return train.run(self.config(name, mode, **changes)).root

    def policy(self, client: int, **changes: Any) -> NodeConfig:
        options = {
            "client_id": client,
            "data_path": self.data / str(len(SIZES)) / f"local_training_{client}.json",
            "state_dir": self.root / "nodes" / str(client),
            "base_models": [str(self.model)],
            "device": "cpu",
            **changes,
        }
        return NodeConfig.of(**options)

    def handler(self, client: int, **changes: Any) -> Handler:
        """A node that answers as it should."""
        node = self.nodes[client] = Node(self.policy(client, **changes))

        def ask(request: bytes) -> bytes:
            self.asked.append((client, request))
            return node.answer(request)

        return lambda message: reply(message, ask, 1 << 30)

    def grid(self, others: Mapping[int, Callable[[Handler], Handler]] | None = None, **changes: Any) -> MemoryGrid:
        """Nodes 100, 101, 102; `others` puts something else in the place of a client's node."""
        handlers = {client: self.handler(client, **changes) for client in range(len(SIZES))}
        for client, change in (others or {}).items():
            handlers[client] = change(handlers[client])
        return MemoryGrid({100 + client: handler for client, handler in handlers.items()})

    def serve(self, name: str, mode: str = "homo", grid: MemoryGrid | None = None, **changes: Any) -> Path:
        return server.run(grid or self.grid(), self.config(name, mode, **changes), QUICK).root


def adapters(run: Path) -> dict[str, str]:
    """File of an adapter or of a server's state -> its SHA-256."""
    return {
        path.relative_to(run).as_posix(): sha256_of(path)
        for path in sorted(run.rglob("*"))
        if path.suffix in (".bin", ".safetensors")
    }


def is_training(message: Message) -> bool:
    return message.metadata.message_type == "train"


def instead(make):
    """A node that answers training requests with `make(message, honest reply)`."""

    def change(honest: Handler) -> Handler:
        return lambda message: make(message, honest(message)) if is_training(message) else honest(message)

    return change


def arrives_at(grid: MemoryGrid, node: int, look: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A node that is there from so many looks on; returns the counter of looks."""
    late, looks, get_nodes = grid.nodes.pop(node), itertools.count(), grid.get_nodes

    def arrives() -> Any:
        if next(looks) == look:
            grid.nodes[node] = late
        return get_nodes()

    monkeypatch.setattr(grid, "get_nodes", arrives)
    return looks


class _KilledError(BaseException):
    """The end of a server's process."""


def interrupted(
    federation: Federation, name: str, mode: str = "homo", *, policy: Mapping[str, Any] | None = None, **changes: Any
) -> None:
    """A run whose server was killed in the second round, with an update of that round committed."""
    calls = itertools.count()

    def kills(message: Message, answer: Message) -> Message:
        if next(calls) == 1:
            raise _KilledError
        return answer

    with pytest.raises(_KilledError):
        federation.serve(name, mode, federation.grid({BAD: instead(kills)}, **(policy or {})), **changes)
