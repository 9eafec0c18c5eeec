"""A node's worker that keeps nothing: a new process for every message, as it would be without a worker.

    python benchmarks/afresh.py <node's configuration>

It stands where the worker stands, so that nothing else differs: the process imports torch and loads the model, answers
one message and ends.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedlora.flower.folders import node_socket
from fedlora.flower.node_config import NodeConfig
from fedlora.flower.worker import serve

ONCE = "--once"


def main() -> None:
    settings = Path(sys.argv[1])
    config = NodeConfig.make({}, file=settings)
    if ONCE in sys.argv:
        from fedlora.flower.node import Node

        sys.stdout.buffer.write(Node(config).answer(sys.stdin.buffer.read()))
        return

    def answer(request: bytes) -> bytes:
        command = [sys.executable, __file__, str(settings), ONCE]
        return subprocess.run(command, input=request, stdout=subprocess.PIPE, check=True).stdout

    serve(node_socket(config.state_dir.resolve()), answer, config.max_message_mb << 20, until=lambda: False)


if __name__ == "__main__":
    main()
