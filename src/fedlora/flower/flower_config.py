"""Configurations of the commands that run a federation across machines, but for the node's own (`node.py`)."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator, model_validator

from fedlora.config.schema import Config, Names, OptionalInt, flag
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.paths import is_number


class InitConfig(Config):
    """Make what a federation across machines needs: a certificate authority, the server's certificate, a key and a
    configuration for every node.

    Each node's folder goes to its owner; nothing in it is needed on the server but the public key, which stays there.
    """

    folder: Path = flag(Path("./federation"), "new folder for server/ and client-<i>/")
    nodes: int = flag(3, "number of nodes", ge=1, le=1000)
    hosts: Names = flag(("127.0.0.1", "localhost"), "names and addresses under which nodes reach the server")
    port: int = flag(9092, "port under which nodes reach the server", ge=1, le=65535)
    listen_port: OptionalInt = flag(
        None, "port that the server listens on, behind a proxy", ge=1, le=65535, if_none="the same as --port"
    )
    base_models: Names = flag(("smollm2-135m",), "base models that the nodes' configurations allow at first")
    days: int = flag(365, "how long the certificates hold", ge=1, le=3650)


class ServerConfig(Config):
    """Run the server: Flower's SuperLink and the process that trains; both are restarted when they end."""

    folder: Path = flag(Path("./federation/server"), "the server's folder, made by `fedlora flower init`")
    host: str = flag("127.0.0.1", "address to listen on: loopback, behind a proxy that forwards only /v1/fleet/")
    port: int = flag(9092, "port to listen on", ge=1, le=65535)
    trial: bool = flag(
        False, "keep the state of runs in memory and end when a process ends, as `flower local` needs it"
    )


class StatusConfig(Config):
    """Print the nodes and runs of a server, on the machine that it runs on."""

    server: Path = flag(Path("./federation/server"), "the server's folder")


def check_installed(config: TrainConfig) -> None:
    """UsageError for a method that nodes cannot load by its name: another machine has no file of this one."""
    source = config.method.source
    if source is not None and source.kind != "entry point":
        raise UsageError(
            f"federation_mode={config.federation_mode}: nodes load a method by the name of an installed package",
            hint="register it under the entry-point group fedlora.methods, and install the package on every node: "
            "see examples/own_method",
        )


class OneRunConfig(Config):
    """A run of a server, on the machine that the server runs on."""

    run: str = flag("", "number of the run, from `flower status`", if_none="the only run that is open")
    server: Path = flag(Path("./federation/server"), "the server's folder, on this machine")

    @field_validator("run")
    @classmethod
    def _is_a_number(cls, value: str) -> str:
        if value and not is_number(value):
            raise ValueError("not the number of a run, which `fedlora flower status` lists")
        return value


class FollowConfig(OneRunConfig):
    """Watch a run on the nodes, as `fedlora watch` does, until it ends; ends with its exit code.

    Without a terminal, what the run has printed and prints is shown.
    """

    interval: float = flag(1.0, "seconds between two looks", ge=0.1, le=3600)


class StopConfig(OneRunConfig):
    """End a run on the nodes; its rounds stay, and the same `fedlora flower run` resumes after them."""


class SubmitConfig(TrainConfig):
    """Train on the connected nodes; takes the configuration of `train`, as a file, as flags, or both.

    data_path is not used: each node's configuration names its rows. model_dir is on the server's machine.
    """

    server: Path = flag(Path("./federation/server"), "the server's folder, on this machine")
    start_seconds: float = flag(600.0, "how long to wait for all nodes at the start, or at a restart", gt=0)
    absent_seconds: float = flag(10.0, "how long a round waits for a node that is not connected", ge=0)
    round_seconds: float = flag(3600.0, "how long a round waits for updates", gt=0)

    @model_validator(mode="after")
    def _nodes_can_load_the_method(self) -> SubmitConfig:
        check_installed(self)
        return self

    def training(self) -> TrainConfig:
        """The configuration that `train` would be called with."""
        fields = self.model_fields_set & TrainConfig.model_fields.keys()
        return TrainConfig.model_validate({name: getattr(self, name) for name in fields})


class LocalConfig(SubmitConfig):
    """Try a federation across machines on this one: server, one node per client of data_path, and a run."""

    folder: Path = flag(Path("./federation"), "folder for keys, configurations and logs; made if it is not there")
    nodes: int = flag(3, "number of nodes; client i has file i of data_path", ge=1, le=32)
    port: int = flag(9092, "first of the ports on the loopback that are used", ge=1, le=65000)
