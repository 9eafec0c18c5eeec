"""A worker that spoils what it answers: python hostile_worker.py worker.yaml '{"<round>": "<how>"}'."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

from fedlora.engines.messages import pack_outcome, unpack_outcome
from fedlora.flower.folders import node_socket
from fedlora.flower.node import Node
from fedlora.flower.node_config import NodeConfig
from fedlora.flower.worker import serve
from fedlora.types import ClientUpdate


def spoil(update: ClientUpdate, how: str) -> ClientUpdate:
    """The update with a NaN in it, or with other keys."""
    upload = {key: value.clone() for key, value in (update.upload or {}).items()}
    if how == "nan":
        next(iter(upload.values())).view(-1)[0] = math.nan
    else:
        upload = {f"other.{key}": value for key, value in upload.items()}
    return dataclasses.replace(update, upload=upload)


def main() -> None:
    config = NodeConfig.make({}, file=Path(sys.argv[1]))
    faults = {int(number): how for number, how in json.loads(sys.argv[2]).items()}
    node = Node(config)

    def answer(request: bytes) -> bytes:
        reply = node.answer(request)
        if b'"update"' not in reply.partition(b"\n")[0]:
            return reply
        outcome, more = unpack_outcome(reply)
        if isinstance(outcome, ClientUpdate) and outcome.round in faults:
            return pack_outcome(spoil(outcome, faults[outcome.round]), more)
        return reply

    serve(node_socket(config.state_dir.resolve()), answer, config.max_message_mb << 20, until=lambda: False)


if __name__ == "__main__":
    main()
