"""Configuration of the commands that look at runs: `runs`, `watch` and `verify`."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.method_options import NamesMethod
from fedlora.config.schema import Config, flag, place_of_base


class RunsConfig(Config):
    """List the runs under model_dir: rounds done, the process that trains, best round, size."""

    model_dir: Path = flag(Path("./models"), "root folder of all runs")


class WatchConfig(Config):
    """Watch a run: rounds, losses, clients at work, speed, time left, memory, excluded clients.

    Only the run's files are read, so it works from another terminal. A run that has ended is shown once; one that has
    not begun is waited for. Without a terminal the changes are lines; with --json each change is a JSON object.
    """

    exp_name: str = flag("fedavg-1B", "name of the run: its folder under model_dir")
    model_dir: Path = flag(Path("./models"), "root folder of all runs")
    interval: float = flag(1.0, "seconds between two looks", ge=0.1, le=3600)
    once: bool = flag(False, "show the run as it is now, and end")


class VerifyConfig(NamesMethod):
    """Recheck every hash of a run and recompute every aggregate from the clients' files.

    The base model is not needed; where it is on this machine, its identity is compared.
    """

    exp_name: str = flag("fedavg-1B", "name of the run: its folder under model_dir")
    model_dir: Path = flag(Path("./models"), "root folder of all runs")
    base_model: str = place_of_base()
    verify_base: bool = flag(
        False, "compare every byte of the base model's weights, of a run that was trained with verify_base"
    )
    federation_mode: str = flag(
        "", "method from outside that the run was trained with: file.py:name", if_none="built in"
    )
    allow_drift: bool = flag(False, "verify although the source of the run's method has changed")
