"""A federation of real processes on the loopback, with TLS and node keys as `flower init` makes them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import yaml

from fedlora.flower.command_lines import make_node_environment, supernode_command
from fedlora.flower.guard import own_bundle_sha256
from fedlora.flower.node_config import NodeConfig

SIZES = [3, 2, 4]
ANSWER_SECONDS = 240.0


class Deployment:
    """Everything below `root`: federation/ with keys, configurations and logs, models/ with runs."""

    def __init__(self, root: Path, model: Path | str, data: Path) -> None:
        self.root, self.model, self.data = root, model, data
        self.folder = root / "federation"
        self.logs = root / "logs"
        self.logs.mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port, *self.node_ports = free_ports(1 + len(SIZES))
        init = ["--folder", str(self.folder), "--nodes", str(len(SIZES)), "--port", str(self.port)]
        self.call("flower", "init", *init, "--base_models", str(model))

    @property
    def server(self) -> Path:
        return self.folder / "server"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "fedlora", *arguments]

    def call(self, *arguments: str, seconds: float = ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=seconds, check=False)
        with (self.logs / "calls.log").open("a") as log:
            log.write(f"$ {arguments}\n{done.stdout}{done.stderr}")
        return done

    def popen(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A command that runs beside others."""
        with (self.logs / "calls.log").open("ab") as log:
            return subprocess.Popen(self.command(*arguments), stdout=log, stderr=log)

    def start(self, name: str, *arguments: str, **environment: str) -> None:
        self.start_command(name, self.command(*arguments), {**os.environ, **environment})

    def start_command(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with (self.logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(list(command), env=dict(environment), stdout=log, stderr=log)

    def start_server(self) -> None:
        heard = len(self.log("server"))
        self.start("server", "flower", "server", str(self.server / "server.yaml"))
        until = time.monotonic() + 60
        while "the server listens" not in self.log("server")[heard:]:
            assert time.monotonic() < until, self.log("server")[-2000:]
            time.sleep(0.3)

    def start_node(self, client: int, *flags: str, **environment: str) -> None:
        settings = self.folder / f"client-{client}" / "node.yaml"
        changes = [text for name, value in self._changes(client).items() for text in (f"--{name}", str(value).lower())]
        self.start(f"node-{client}", "flower", "node", "--config", str(settings), *changes, *flags, **environment)

    def start_node_with(self, worker: Path, client: int, *arguments: str, **changes: object) -> None:
        """A node with another worker: `python worker <configuration> <arguments>`."""
        folder = self.folder / f"client-{client}"
        config = NodeConfig.make({**self._changes(client), **changes}, file=folder / "node.yaml")
        settings = folder / "other.yaml"
        settings.write_text(json.dumps(config.model_dump(mode="json")))
        command = [sys.executable, str(worker), str(settings), *arguments]
        self.start_command(f"worker-{client}", command, os.environ)
        environment = make_node_environment(config, own_bundle_sha256())
        self.start_command(f"node-{client}", supernode_command(config), environment)

    def _changes(self, client: int) -> dict[str, object]:
        return {
            "data_path": self.data / str(len(SIZES)) / f"local_training_{client}.json",
            "runtime_port": self.node_ports[client],
            "max_local_epochs": 100_000,
            "share_own_adapter": True,
            "device": "cpu",
        }

    def state_of(self, client: int) -> Path:
        """Where a node keeps what stays with it."""
        return self.folder / f"client-{client}" / "state"

    def wait_until_online(self, seconds: float = 150.0) -> None:
        """Start what does not run, and wait until the server has all nodes."""
        if "server" not in self.processes:
            self.start_server()
        for client in range(len(SIZES)):
            if f"node-{client}" not in self.processes:
                self.start_node(client)
        until = time.monotonic() + seconds
        while (told := self.call("flower", "status", "--server", str(self.server)).stdout).count("online") < len(SIZES):
            assert time.monotonic() < until, told
            time.sleep(1)

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        process.terminate()
        process.wait(20)

    def stop_all(self) -> None:
        for name in list(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop(name)

    def log(self, name: str) -> str:
        file = self.logs / f"{name}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    def config(self, name: str, mode: str, **changes: object) -> Path:
        """A YAML file for `train` and `flower run` alike."""
        options = {
            "exp_name": name,
            "federation_mode": mode,
            "base_model": str(self.model),
            "base_dtype": "float32",
            "data_path": str(self.data),
            "model_dir": str(self.root / "models"),
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
        file = self.root / f"{name}.yaml"
        file.write_text(yaml.safe_dump(options))
        return file

    def run_arguments(self, file: Path, *flags: str) -> list[str]:
        return ["flower", "run", "--server", str(self.server), "--config", str(file), *flags]

    def run(self, file: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        return self.call(*self.run_arguments(file, *flags))

    def start_run(self, file: Path, *flags: str) -> None:
        self.start("run", *self.run_arguments(file, *flags))

    def wait_for(self, name: str, pattern: str, seconds: float = 120.0, *, since: int = 0) -> None:
        until = time.monotonic() + seconds
        while not re.search(pattern, self.log(name)[since:]):
            assert time.monotonic() < until, f"{name}: no {pattern!r} in {self.log(name)[-3000:]}"
            time.sleep(0.2)

    def finish_run(self, seconds: float = ANSWER_SECONDS) -> int:
        return self.processes.pop("run").wait(seconds)

    def family(self, name: str, words: Sequence[str] = ()) -> list[psutil.Process]:
        """The processes that one has started, or those of them whose command has one of the words."""
        children = psutil.Process(self.processes[name].pid).children(recursive=True)
        return [child for child in children if not words or any(word in _command_of(child) for word in words)]

    def kill(self, name: str, *words: str) -> int:
        """SIGKILL to what `name` has started; returns how many processes that were."""
        found = self.family(name, words)
        for child in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(child.pid, signal.SIGKILL)
        return len(found)

    def kill_all(self, name: str) -> None:
        """SIGKILL to a command and to everything that it has started."""
        family = self.family(name)
        self.processes[name].kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.processes.pop(name).wait()

    def remove(self) -> None:
        self.stop_all()
        shutil.rmtree(self.root, ignore_errors=True)


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended a moment ago
        return ""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
