"""Configuration of the commands that look at runs: `runs` and `verify`."""

from __future__ import annotations

from pathlib import Path

from fedlora.config.method_options import NamesMethod
from fedlora.config.schema import Config, flag, place_of_base


class RunsConfig(Config):
    """List the runs under model_dir: rounds done, the process that trains, best round, size."""

    model_dir: Path = flag(Path("./models"), "root folder of all runs")


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
