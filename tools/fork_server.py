"""A process with everything imported that forks a child per command: starting fedlora takes milliseconds, not seconds.

One thread only: a fork copies no others, and a child that waits for one waits for ever. So torch has a single thread
here and the server itself computes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Ending:
    """How a child ended: its exit code, or minus the signal; how long it took; the points its trap counted."""

    code: int
    seconds: float
    points: int
    said: str


class ForkServer:
    """The server as its user sees it; a context manager."""

    def __init__(self, model: Path, source: Path | None = None) -> None:
        """Import fedlora from the folder `source`; without it, the installed one."""
        threads = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, **({"PYTHONPATH": str(source)} if source else {})},
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()

    def run(self, argv: Sequence[str], **job: Any) -> Ending:
        """`fedlora *argv` in one child; `trap` as Trap's arguments, `signals` as [seconds, number] pairs."""
        return self.run_all([{"argv": list(argv), **job}])[0]

    def run_all(self, jobs: Sequence[Mapping[str, Any]], *, gate: str = "") -> list[Ending]:
        """Several children at once. The file `gate` is made when all but one have ended."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"jobs": list(jobs), "gate": gate}) + "\n")
        self._process.stdin.flush()
        return [Ending(**ending) for ending in json.loads(self._process.stdout.readline())]


class Child:
    """One forked command, seen from the server."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.began = time.monotonic()
        self.signals = [(self.began + after, number) for after, number in job.get("signals", [])]
        self.signals.append((self.began + LIMIT_SECONDS, signal.SIGKILL))
        self._output = os.memfd_create("output")
        self._points = os.memfd_create("points")
        self.ending: dict[str, Any] | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(job, self._output, self._points)

    def look(self) -> bool:
        """Send what is due; whether the child has ended."""
        now = time.monotonic()
        while self.signals and self.signals[0][0] <= now:
            os.kill(self.pid, self.signals.pop(0)[1])
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if not ended:
            return False
        seconds = time.monotonic() - self.began
        said, points = (_take(descriptor) for descriptor in (self._output, self._points))
        code = os.waitstatus_to_exitcode(status)
        self.ending = {"code": code, "seconds": seconds, "points": int(points or 0), "said": said}
        return True


def _take(descriptor: int) -> str:
    content = os.pread(descriptor, 1 << 20, 0).decode(errors="replace")
    os.close(descriptor)
    return content


def _be_child(job: Mapping[str, Any], output: int, points: int) -> None:
    code = 70
    try:
        from trap import Trap

        from fedlora.cli import main

        os.environ.update(job.get("environment", {}))
        if job.get("known_secret"):
            # 32 zero bytes: two runs can be compared only if both draw their noise from the same secret
            secrets.token_bytes = bytes
        if not job.get("flushes", True):
            # a third of a tiny run's time, and nothing here outlives a power cut
            setattr(os, "fsync", int)  # noqa: B010
        sys.stdin.close()
        os.dup2(output, 1)
        os.dup2(output, 2)
        trap = Trap(**job.get("trap", {}))
        trap.install()
        code = main(job["argv"])
        sys.stdout.flush()
        os.pwrite(points, str(trap.passed).encode(), 0)
    finally:
        os._exit(code)


def _serve(jobs: Sequence[Mapping[str, Any]], gate: str) -> list[dict[str, Any]]:
    children = [Child(job) for job in jobs]
    left = list(children)
    while left:
        left = [child for child in left if not child.look()]
        if gate and len(left) <= 1:
            Path(gate).touch()
        time.sleep(0.001)
    return [child.ending for child in children if child.ending]


def _prepare(model: Path) -> None:
    """Import everything, build the model in a child, and load it once for the imports that loading makes."""
    if not (model / "config.json").exists():
        from tiny_run import make_tiny_model

        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                make_tiny_model(model)
            os._exit(0)
        os.waitpid(pid, 0)
    import torch

    torch.set_num_threads(1)
    from fedlora.llm.base_model import load_base_model

    load_base_model(str(model), device="cpu", dtype="float32")


def main() -> None:
    """Answer one line of JSON after another until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # children shall hear what a shell that started this in the background made it deaf to
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _prepare(Path(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_serve(request["jobs"], request["gate"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
