"""A measurement in a process of its own: peak memory, malloc's state and caches of one are not those of the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FLAG = "--point"
MEGABYTE = 1e6


def run_point(script: str, **arguments: Any) -> dict[str, Any]:
    """Run `script --point <arguments as JSON>` and return the JSON object on its last line."""
    # OpenMP reads it once, when torch is first imported
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}
    command = [sys.executable, script, FLAG, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def answer_points(measures: Mapping[str, Callable[..., dict[str, Any]]]) -> bool:
    """In a process that `run_point` started: measure what `kind` names and print it. False in any other process."""
    if FLAG not in sys.argv:
        return False
    arguments = json.loads(sys.argv[sys.argv.index(FLAG) + 1])
    print(json.dumps(measures[arguments.pop("kind")](**arguments)))
    return True


def peak_megabytes() -> float:
    """Most memory that this process has had resident, mapped files included (Linux)."""
    return _status("VmHWM")


def resident_megabytes() -> float:
    """What this process has resident now, mapped files included (Linux)."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Let the peak start anew from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> float:
    # getrusage would do, were it not that a process begins with the peak of the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024 / MEGABYTE
