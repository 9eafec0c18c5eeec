"""Flower's Grid with its faults kept apart: those of the way to the server pass, those of a message are its sender's.

A SuperLink that is started again has forgotten what was half pushed to it, which Flower's client raises as an error of
its own; and an object that cannot be unpacked is raised where all replies are fetched together, after those before it
were marked as received. So messages go one by one, and nothing here ends a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.console import say
from fedlora.flower.codec import to_content
from fedlora.stopping import stop_if_asked

NodeId = int
PASSING = (httpx.HTTPError, OSError, TimeoutError)
"""Faults of the way, which are over once the server is back."""


def push(grid: Grid, node: NodeId, payload: bytes, kind: str, ttl: float) -> str | None:
    """Send one message; its id, or None when Flower did not take it: then it may be tried again."""
    message = Message(to_content(payload), node, kind, ttl=ttl)
    try:
        return next(iter(grid.push_messages([message])), None)
    except Exception as error:  # many kinds, none of them about what is said
        stop_if_asked()
        say(f"a message to node {node} was not taken ({type(error).__name__}); it is sent again")
        return None


def pull(grid: Grid, message_ids: Iterable[str]) -> Iterator[tuple[str, Message | None]]:
    """The replies that are there, by the id of what they reply to; None stands for one that cannot be unpacked."""
    for message_id in list(message_ids):
        try:
            found = list(grid.pull_messages([message_id]))
        except PASSING as error:
            say(f"replies cannot be fetched now ({type(error).__name__}); they are asked for again")
            return
        except Exception as error:  # what a node sent could not be unpacked
            stop_if_asked()
            say(f"a reply cannot be unpacked ({type(error).__name__})")
            yield message_id, None
            continue
        for message in found:
            yield message_id, message


def connected(grid: Grid) -> dict[NodeId, str] | None:
    """Node -> name of those that are connected; None while the server does not say."""
    try:
        return {int(node.node_id): str(getattr(node, "name", "")) for node in grid.get_nodes()}
    except PASSING as error:
        say(f"the server does not say who is connected ({type(error).__name__}); it is asked again")
        return None
