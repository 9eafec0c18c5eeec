"""A Grid of this process: real Flower messages to nodes that are functions, without Flower's processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Handler = Callable[[Message], Message | None]
"""What a node does with a message; None is silence."""


class MemoryGrid(Grid):
    """Every node answers while its message is pushed; `late` keeps answers back for so many looks."""

    def __init__(self, nodes: Mapping[int, Handler], names: Mapping[int, str] | None = None, late: int = 0) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.nodes = dict(nodes)
        self.names = dict(names or {})
        self.late = late
        self.sent: list[Message] = []
        self._replies: dict[str, tuple[int, Message]] = {}
        self._looks = 0

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *arguments, **options) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *arguments, **options) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return sorted(self.nodes)

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names.get(node, "")) for node in sorted(self.nodes)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        name = f"message-{len(self.sent)}"
        message.metadata.__dict__["_message_id"] = name
        self.sent.append(message)
        handler = self.nodes.get(message.metadata.dst_node_id)
        answer = handler(message) if handler else Message(Error(5, "gone"), reply_to=message)
        if answer is not None:
            self._replies[name] = (self._looks + self.late, answer)
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._looks += 1
        ready = [name for name in message_ids if name in self._replies and self._replies[name][0] < self._looks]
        return [self._replies.pop(name)[1] for name in ready]
