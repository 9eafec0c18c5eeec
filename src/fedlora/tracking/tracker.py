"""What an experiment tracker does for us; there is a module for each, and none is imported before it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fedlora.errors import UsageError
from fedlora.plain_text import Table

MODULES = {
    "tensorboard": "fedlora.tracking.tensorboard_tracker:TensorBoardTracker",
    "wandb": "fedlora.tracking.wandb_tracker:WandbTracker",
    "mlflow": "fedlora.tracking.mlflow_tracker:MlflowTracker",
    "trackio": "fedlora.tracking.trackio_tracker:TrackioTracker",
}


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked: its name, configuration, the project that it belongs to there, and the folder for what
    the tracker writes on this machine."""

    name: str
    project: str
    configuration: Mapping[str, Any]
    folder: Path


class Tracker(Protocol):
    """One run in a tracker. Every method may raise whatever the tracker's library raises."""

    def open(self, run: Tracked, known: str) -> str:
        """Begin a run there, or resume the one whose id is `known`; returns its id."""
        ...

    def log(self, round_number: int, values: Mapping[str, float]) -> None:
        """The numbers of one round, by name; a slash separates the parts of a name."""
        ...

    def finish(self, table: Table, files: Sequence[Path]) -> None:
        """The table of all rounds, and the files of the report."""
        ...

    def close(self) -> None:
        """Send what has gathered, and leave the run as it is."""
        ...


def make_tracker(name: str) -> Tracker:
    """The tracker of this name. Raises UsageError where its library is not installed."""
    module, kind = MODULES[name].split(":")
    try:
        return getattr(import_module(module), kind)()
    except ImportError as error:
        raise UsageError(
            f"{name} cannot be imported ({error})", hint=f"`pip install 'fedlora[{name}]'`, or choose another tracker"
        ) from None


def flat(configuration: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """A configuration without nested values: lists and mappings as text, null left out."""
    plain = (str, int, float, bool)
    return {
        name: value if isinstance(value, plain) else str(value)
        for name, value in sorted(configuration.items())
        if value is not None
    }


def set_default(variable: str, value: str) -> None:
    """An environment variable that the library reads, unless the user has set it."""
    os.environ.setdefault(variable, value)
