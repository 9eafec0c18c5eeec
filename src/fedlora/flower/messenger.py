"""The node's side of a Flower message: hand its bytes to the worker, and the worker's bytes back.

Flower runs this in a process that lives for one message, so neither torch nor a model is loaded here. The text of an
exception would travel to the server; here it goes to the node's log, and the server hears that the client is lost.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from fedlora.console import say
from fedlora.flower.codec import from_content, to_content
from fedlora.flower.worker import ask

CONNECT_SECONDS = 60.0
"""A worker that died has been started again by then."""
ANSWER_SECONDS = 12 * 3600.0


def handle(message: Message, context: Context) -> Message:
    """The reply to one message, by the worker whose socket the node's configuration names."""
    settings = context.node_config
    most_bytes = int(settings["max-message-mb"]) << 20

    def ask_worker(request: bytes) -> bytes:
        path = Path(str(settings["socket"]))
        return ask(path, request, most_bytes, connect_seconds=CONNECT_SECONDS, answer_seconds=ANSWER_SECONDS)

    return reply(message, ask_worker, most_bytes)


def reply(message: Message, ask_worker: Callable[[bytes], bytes], most_bytes: int) -> Message:
    """The reply with the worker's answer; an error on the way is a failure without its text."""
    try:
        answer = ask_worker(from_content(message.content, most_bytes))
    except Exception as error:  # its text may quote anything
        ended = isinstance(error, (EOFError, ConnectionError))
        why = " the worker is gone, or ended over it" if ended else f"\n{traceback.format_exc()}"
        say(f"a message could not be answered:{why}")
        answer = _failure("lost", "the node's worker gave no answer; the log of the node has the details")
    return Message(to_content(answer), reply_to=message)


def _failure(kind: str, reason: str) -> bytes:
    """What `messages.pack_outcome` makes of a failure, without torch, which this process need not load."""
    failure: dict[str, Any] = {"client_id": 0, "kind": kind, "reason": reason}
    line = json.dumps({"header": {"failure": failure, "more": {}}, "groups": {}})
    empty = b"{}"
    return line.encode() + b"\n" + len(empty).to_bytes(8, "little") + empty
