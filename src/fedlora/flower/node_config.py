"""Configuration of a node: one owner's machine in a federation across machines.

The owner decides: what a run asks for is compared with these bounds before any row is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator

from fedlora.config.private_metrics import PRIVATE_METRICS, check_metrics
from fedlora.config.schema import Config, Names, Pairs, flag
from fedlora.home import expand_home
from fedlora.rows import STRICT, RowFormat


def _names_of_mapping(value: Any) -> Any:
    """`{name: path}` of a YAML file as the `name=path` that a flag takes."""
    return [f"{name}={path}" for name, path in value.items()] if isinstance(value, dict) else value


Models = Annotated[Names, BeforeValidator(_names_of_mapping)]


class NodeConfig(Config):
    """Run one owner's node: its identity, its rows, and the limits of what a run may ask for."""

    folder: Path = flag(Path(), "folder of this node's key and certificate, made by `fedlora flower init`")
    server: str = flag("127.0.0.1:9092", "host:port of the server, or of the proxy in front of it")
    runtime_port: int = flag(9094, "port on this machine's loopback for Flower's processes", ge=1)
    bundles: Names = flag((), "SHA-256 of app bundles that are allowed beside that of this release of fedlora")
    client_id: int = flag(0, "number of this client in the federation, from 0", ge=0, lt=100_000)
    data_path: Path = flag(Path("./train.json"), "file or folder of this client's rows; no run can name another")
    row_kind: RowFormat = flag(STRICT.row_kind, "kind of this client's rows; auto: by their fields")
    columns: Pairs = flag(
        {},
        "fields of a row and this client's columns that hold them, such as prompt=question; no run can name others",
        if_none="columns have the fields' names",
    )
    state_dir: Path = flag(Path("./node"), "folder for this client's memory between rounds, readable by the owner only")
    base_models: Models = flag((), "base models that a run may name, as name or name=local folder")
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>")

    max_lora_r: int = flag(64, "largest rank that a run may ask for", ge=1)
    max_local_epochs: int = flag(10, "most local epochs that a run may ask for", ge=1)
    max_rounds: int = flag(1000, "most rounds of a run", ge=1)
    max_cutoff_len: int = flag(4096, "longest row in tokens that a run may ask for", ge=8)
    max_tokens_per_pass: int = flag(65_536, "largest tokens_per_pass that a run may set", ge=8)
    max_state_gb: float = flag(
        50.0, "refuse a new run while state_dir is larger than this; only the owner deletes the folders of runs", gt=0
    )
    max_message_mb: int = flag(2048, "largest message that is read, in MiB", ge=1, le=4096)
    min_examples: int = flag(1, "fewest training rows; with fewer this client does not take part", ge=1)
    private_metrics: Names = flag(
        (),
        f"numbers of this client's test rows that a run may have: {', '.join(PRIVATE_METRICS)}",
        if_none="no such numbers",
    )
    private_metrics_min: int = flag(
        10, "fewest test rows with different prompts that a number is over; of fewer none is sent", ge=2
    )
    federation_modes: Names = flag((), "methods that a run may use", if_none="every built-in method and no other")
    share_own_adapter: bool = flag(False, "send this client's personal adapter to the server (none, fedsa, ditto ...)")
    trial: bool = flag(False, "end when one of this node's processes ends, as `flower local` needs it")
    keep_rounds: int = flag(3, "earlier rounds whose memory is kept, before the last accepted one", ge=1)

    @field_validator("private_metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_metrics(value)

    @field_validator("base_models")
    @classmethod
    def _well_formed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        value = tuple("=".join(map(expand_home, entry.split("=", 1))) for entry in value)
        for entry in value:
            name, equals, path = entry.partition("=")
            if not name or (equals and not path):
                raise ValueError(f"{entry!r} is neither name nor name=folder")
        return value

    def find_model(self, name: str) -> str | None:
        """What to load for a base model that a run names; None when it may not be used here."""
        known = {entry.partition("=")[0]: entry.partition("=")[2] or entry for entry in self.base_models}
        return known.get(name)
